"""The commands in the documents: where they are, and how the tests exercise each of them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command after `$ ` in a console block; `output` is what the block shows below it."""

    document: str
    text: str
    """On one line, without its comment."""
    output: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands(document: str) -> list[Command]:
    """Return the commands of a document's console blocks, in order."""
    found = []
    for language, block in FENCED.findall((ROOT / document).read_text(encoding="utf-8")):
        parts = re.split(r"^\$ ", block, flags=re.MULTILINE) if language == "console" else [""]
        assert not parts[0].strip(), f"{document}: a console block begins with a command, got {parts[0]!r}"
        for part in parts[1:]:
            lines = part.splitlines()
            count = next(number for number in range(1, len(lines) + 1) if _is_whole("\n".join(lines[:number])))
            text = _without_comment("\n".join(lines[:count]).replace("\\\n", " "))
            found.append(Command(document, " ".join(text.split()), "".join(f"{line}\n" for line in lines[count:])))
    return found


def _is_whole(text: str) -> bool:
    """Whether a shell would not wait for another line."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return not text.endswith("\\")


def _without_comment(text: str) -> str:
    starts = [match.start() for match in re.finditer(r"\s#\s", text)]
    return next((text[:start] for start in starts if _is_whole(text[:start])), text)


def spans(document: str) -> list[str]:
    """Return the code spans of a document's running text that look like commands of this project."""
    text = FENCED.sub("", (ROOT / document).read_text(encoding="utf-8"))
    return [
        span
        for span in re.findall(r"`([^`\n]+)`", text)
        if re.match(r"(\S+/)?(make|borg-serve|python|pytest) \S", span)
    ]


@dataclass(frozen=True)
class Run:
    """A command that a test runs as it is (tests/process/test_documents.py) and that ends with `status`.

    It must print what the document shows; a line of the document that is only `...` stands for any lines.
    """

    status: int = 0


@dataclass(frozen=True)
class Covered:
    """A command that this test runs or, where `why` says that no test can run it, whose parts it checks."""

    test: str
    why: str = ""


STARTED = "test_readme_server_starts_and_answers_its_question"
PROFILES = "test_cli_check_takes_every_shipped_profile"
DEPLOYED = "test_deploy_serve_config_is_what_ray_and_we_take"
CLUSTER = "test_cluster_puts_the_identity_first"
EXAMPLES = "test_example_prints_what_it_shows"
PARTS = "test_command_is_one_of_this_project"
MODULES = "test_document_measurement_explains_its_options"
RAY = "test_document_ray_command_takes_its_options"
GPU = "needs a GPU"
LONG = "measures for minutes"
NODES = "needs more than one machine"

EXERCISED: dict[str, Run | Covered] = {
    "make serve": Covered(STARTED),
    "make test": Covered("test_ci_runs_the_tests_as_a_user_does", why="would not end"),
    (
        "curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
        '-d \'{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}\''
    ): Covered(STARTED),
    "pip install 'borg-serve[gpu]'": Covered(PARTS, why=GPU),
    "borg-serve serve --config configs/7b-h100.yaml": Covered(PROFILES, why=GPU),
    "make cluster-demo": Covered(CLUSTER, why="a test has a cluster with ports of its own"),
    "serve run deploy/7b-autoscale.yaml": Covered(DEPLOYED, why=GPU),
    "borg-serve check --config configs/demo-cpu.yaml --set server.port=99999": Run(status=2),
    ".venv/bin/python examples/openai_chat.py": Covered(EXAMPLES),
    # docs/cluster.md
    "export RAY_AUTH_MODE=token RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1 "
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY=1": Covered(PARTS, why=NODES),
    "export RAY_SERVE_INGRESS_REQUEST_ROUTER_METRICS_ENABLED=1": Covered(PARTS, why=NODES),
    'export RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response"': Covered(PARTS, why=NODES),
    "export RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE=1114112": Covered(PARTS, why=NODES),
    "export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0": Covered(
        PARTS, why=NODES
    ),
    "export RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0": Covered(PARTS, why=NODES),
    "ray get-auth-token --generate": Covered(RAY, why=NODES),
    "ray start --head --metrics-export-port=8080": Covered(RAY, why=NODES),
    "ray start --address=HEAD:6379 --metrics-export-port=8080": Covered(RAY, why=NODES),
    # docs/tenants.md
    "borg-serve usage --since 2026-11-01 --by key,day": Covered(
        "test_usage_prints_an_aligned_table", why="needs a profile with a ledger"
    ),
    # docs/load.md
    "make calibrate": Covered(MODULES, why=LONG),
    "make load PROFILE=steady RATE=0.25 SLO=loadtests/slo/demo-cpu.yaml": Covered(
        "test_load_smoke_passes_and_agrees_with_the_server", why=LONG
    ),
    "make compare": Covered(MODULES, why=LONG),
    "make tails": Covered(MODULES, why=LONG),
    "make compare-runs A=build/a/run.json B=build/b/run.json": Covered(
        "test_compare_command_prints_a_verdict_for_each_figure",
        why="needs two runs",
    ),
    "python3.11 -m venv build/guidellm && build/guidellm/bin/pip install guidellm==0.8.1": Covered(
        PARTS, why="installs another project"
    ),
    'make crosscheck ARGS="--guidellm build/guidellm/bin/guidellm"': Covered(MODULES, why=LONG),
}
"""A console block's command -> how it is exercised. tests/unit/docs/test_commands.py keeps it complete."""
