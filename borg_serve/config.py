"""Reads a YAML profile and `--set` into one frozen model, and reports every problem of the file at once.

Knows our own keys. Does not know vLLM: keys under `engine` are vLLM's names, and the caller passes the check for them.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from borg_serve.errors import ConfigError, Problem
from borg_serve.paths import absolute_url, cache_directory, expand, expand_url, hide_password
from borg_serve.validation import path, sentence
from borg_serve.yaml_file import RepeatedKeys, parse, read_yaml

__all__ = ["Config", "EngineCheck", "cache_directory", "load"]

EngineCheck = Callable[[Mapping[str, Any], str], list[Problem]]
"""(the `engine` section, the file's name) -> problems in it."""

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Origin = Annotated[str, Field(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/\s]+)$")]


File = Annotated[Path, Field(strict=False), AfterValidator(lambda file: Path(expand(str(file))))]
"""YAML has no paths, only text."""


class Section(BaseModel):
    """A section of a profile. The docstring of each key is its description in docs/configuration.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Probe(Section):
    """A question with a known answer. The server asks it before it is ready, and does not start on another answer."""

    question: str = Field(examples=["What is the capital of France?"])
    """What to ask, at temperature 0."""
    answer: str = Field(examples=["The capital of France is"])
    """How the answer begins. Keep it short: long answers differ between processors."""


class Model(Section):
    """The checkpoint."""

    path: Annotated[str, AfterValidator(expand)] = Field(examples=["/models/borg-merge-v1"])
    """A checkpoint directory, or a hub id such as `Optitransfer/Qwen2.5-7B-Instruct-borg-merge-v1`. A relative path
    starts at the current folder; `~` is the home folder, and `$NAME` an environment variable, in every path."""
    revision: str | None = Field(None, examples=["main"])
    """Branch, tag or commit; only with a hub id."""
    served_name: str = Field("borg-merge-v1", min_length=1, examples=["borg-merge-v1"])
    """The model's name in requests and answers."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", examples=["bfloat16"])
    """What the engine computes in; `auto` is the checkpoint's own."""
    load_format: Literal["auto", "dummy"] = Field("auto", examples=["auto"])
    """`dummy` serves random weights and needs no tensors; for benchmarks only."""
    probe: Probe | None = None
    """A question with a known answer, asked before the server is ready."""


class IdentitySection(Section):
    """The text that every prompt begins with."""

    prompt: File = Field(examples=["identity/borg-merge-v1.md"])
    """The file with the text. A relative path starts at the profile's folder."""
    attention: Literal["auto", "shared", "stock"] = Field("auto", examples=["auto"])
    """`shared` reads the identity's KV cache once for all users of a step (attention.md), `stock` is vLLM's own. `auto`
    shares on a Hopper GPU if the identity is long enough; `borg-serve check` prints the choice and its reason."""


class Server(Section):
    """The HTTP server of one machine."""

    host: str = Field("127.0.0.1", examples=["127.0.0.1"])
    """The address to listen on. An address that others can reach needs `server.keys`."""
    port: int = Field(8000, ge=0, le=65535, examples=[8000])
    """The port to listen on; 0 takes a free one."""
    processes: int = Field(1, ge=1, le=64, examples=[1])
    """API processes in front of the engine. One carries about 9,000 streamed tokens/s."""
    keys: File | None = Field(None, examples=["keys.yaml"])
    """The file with hashed API keys (`borg-serve key new`). A relative path starts at the profile's folder. Without it
    no key is needed."""
    cors_origins: list[Origin] = Field([], examples=[["https://chat.example.com"]])
    """Origins whose pages may send requests from a browser; `*` is any."""
    tool_call_parser: str | None = Field(None, examples=["hermes"])
    """vLLM's parser for this model's tool calls. Without it requests with tools are refused."""
    model_aliases: list[str] = Field([], examples=[["claude-*", "gpt-*"]])
    """Other names of the model in requests, `*` for any text. Answers name it as `model.served_name`."""
    unknown_fields: Literal["ignore", "refuse"] = Field("ignore", examples=["ignore"])
    """What is done with a request's field that no protocol knows. An ignored one is named in the header
    `x-borg-ignored`."""
    drain_s: Seconds = Field(30, examples=[30])
    """Seconds that running requests have to finish after SIGTERM."""
    hang_s: Seconds = Field(8, examples=[8])
    """Seconds without progress after which the engine counts as dead. Must be longer than its longest step."""


class Limits(Section):
    """Bounds for requests, and defaults for what a request leaves out."""

    deadline_s: Seconds = Field(60, examples=[60])
    """Seconds from a request's arrival to the last byte of its answer."""
    body_bytes: int = Field(1 << 20, ge=1024, examples=[1048576])
    """The largest request body in bytes."""
    body_s: Seconds = Field(10, examples=[10])
    """Seconds that a request's body may take to arrive."""
    stall_s: Seconds = Field(10, examples=[10])
    """Seconds that a client may leave a part of its answer unread before the request is aborted."""
    max_tokens: PositiveInt = Field(8192, examples=[8192])
    """The most output tokens that a request may ask for."""
    default_max_tokens: PositiveInt = Field(4096, examples=[4096])
    """Output tokens of a request that sets no limit."""
    temperature: float = Field(0.7, ge=0, le=2, examples=[0.7])
    """Temperature of a request that sets none; below 0.01 is greedy."""
    top_p: float = Field(0.9, gt=0, le=1, examples=[0.9])
    """`top_p` of a request that sets none."""
    concurrent: PositiveInt | Auto = Field("auto", examples=["auto"])
    """Sequences in the engine at once, over all API processes, if the KV cache holds what they need. `auto`:
    `max_num_seqs`."""
    max_wait_s: Annotated[float, Field(ge=0)] = Field(1, examples=[1])
    """Seconds that a request may be expected to wait for the engine; it is refused at once where it would wait longer.
    A key that has less than its share of the engine waits less."""
    queued_bytes: PositiveInt | Auto = Field("auto", examples=["auto"])
    """Bytes of client text that may wait. `auto`: as many as the KV cache holds tokens, at least
    `body_bytes`."""
    cache_scope: Literal["key", "user", "all"] | None = Field(None, examples=["user"])
    """Who finds whose KV blocks again behind the identity's, which all share: those of one API key; of one key and one
    `user`, `safety_identifier` or `metadata.user_id` of requests; or everybody. Without it `key` where `server.keys` is
    set, else `all`."""


class Cluster(Section):
    """A Ray cluster. A single machine reads only `expect_root`."""

    replicas: PositiveInt = Field(1, examples=[2])
    """Replicas, each with an engine of its own; the least number if `max_replicas` is set."""
    max_replicas: PositiveInt | None = Field(None, examples=[8])
    """The most replicas that load may start. Without it there are always `replicas`."""
    cpus: float = Field(1, gt=0, examples=[4])
    """Ray CPUs for each worker of a replica. There is a worker for each GPU, or one for an engine on the CPU."""
    quota_url: str | None = Field(None, pattern="^rediss?://", examples=["redis://redis:6379"])
    """The Redis where all replicas count the keys' quotas together. Without it each replica counts alone."""
    expect_root: str | None = Field(None, pattern="^[0-9a-f]{64}$", examples=["<64 hexadecimal digits>"])
    """Root hash of the only checkpoint that may be served (`borg-serve manifest write` prints it)."""


class Usage(Section):
    """The ledger of what each API key has used (`borg-serve usage`)."""

    url: Annotated[str, AfterValidator(expand_url)] | None = Field(
        None, examples=["sqlite:////var/lib/borg-serve/usage.db"]
    )
    """The database, SQLite or PostgreSQL, such as `postgresql://borg:$PASSWORD@host/borg`. `@`, `:` and `/` of a
    password are written `%40`, `%3A` and `%2F`. A relative SQLite file starts at the profile's folder. Without it
    nothing is kept."""
    spool: File | None = Field(None, examples=["/var/lib/borg-serve/usage"])
    """The folder on a local disk where entries wait for the database; each database needs its own. A relative path
    starts at the profile's folder. Without it `borg-serve/usage` in `$XDG_STATE_HOME`, which is `~/.local/state`."""
    spool_bytes: PositiveInt = Field(64 << 20, examples=[67108864])
    """The most bytes that may wait. Entries beyond are lost, and counted in `borg_usage_lost_total`."""


class Config(Section):
    """A whole profile. Its paths are absolute."""

    file: Path
    model: Model
    identity: IdentitySection
    engine: dict[str, Any] = Field(default_factory=dict, examples=["{max_model_len: 8192}"])
    """vLLM's engine arguments by vLLM's names. `block_size: auto` takes the smallest KV block that is fast on the
    device."""
    server: Server = Field(default_factory=Server)
    limits: Limits = Field(default_factory=Limits)
    cluster: Cluster = Field(default_factory=Cluster)
    usage: Usage = Field(default_factory=Usage)


PROFILES = Path(__file__).with_name("configs").resolve()
"""The profiles that come with the package; in a clone they are its folder `configs`."""


def profile_file(name: Path) -> Path:
    """The file of that name, else the package's profile that is meant: `7b-h100` or `configs/7b-h100.yaml`."""
    ours = PROFILES / f"{name.stem}.yaml"
    meant = name in (Path(name.stem), Path("configs", ours.name)) and ours.is_file()
    return ours if meant and not name.is_file() else name


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(path: str) -> bool:
    """Whether `model.path` names a hub repository rather than a directory."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def load(file: Path, sets: Sequence[str] = (), check_engine: EngineCheck | None = None) -> Config:
    """Read a profile, apply `--set key.path=value` in order, validate everything.

    `file`: a path, or the name of a profile of the package. Raises ConfigError with every problem of the file and the
    settings together.
    """
    file = profile_file(file)
    data, problems = _read(file)
    for item in sets:
        problems += _apply(data, item)
    data |= {name: {} for name in Config.model_fields if name in data and data[name] is None}  # its defaults
    engine = data.get("engine", {})
    if check_engine is not None and isinstance(engine, Mapping):
        problems += check_engine(engine, str(file))
    try:
        config = Config.model_validate({**data, "file": file.absolute()})
    except ValidationError as error:
        raise ConfigError(_problems(file, data, error.errors()) + problems) from None
    problems += _cross_checks(config, file)
    if problems:
        raise ConfigError(problems)
    return _absolute(config)


def _read(file: Path) -> tuple[dict[str, Any], list[Problem]]:
    ours = ", ".join(sorted(profile.stem for profile in PROFILES.glob("*.yaml")))
    data = read_yaml(file, f"Name an existing file, or one of the package's: {ours}.")
    if not isinstance(data, dict):
        what = "must hold sections such as `model:` and `identity:`"
        raise ConfigError([Problem(str(file), what, data, f"Start from {PROFILES / 'demo-cpu.yaml'}.")])
    if "file" in data:
        return data, [Problem(f"{file}: file", "unknown key", data.pop("file"), "Remove it.")]
    return data, []


def _apply(data: dict[str, Any], item: str) -> list[Problem]:
    """Set one `a.b=c` in the data; the value is YAML."""
    key, equals, text = item.partition("=")
    *parents, leaf = key.strip().split(".")
    if not equals or not leaf or not all(parents):
        return [Problem("--set", "must look like key.path=value", item, "For example: --set server.port=8080.")]
    try:
        value = parse(text)
    except RepeatedKeys as error:
        return [Problem(f"--set {key}", str(error), text, "Remove one of them.")]
    except yaml.YAMLError:
        return [Problem(f"--set {key}", "the value is not YAML", text, "Put quotes around it.")]
    section = data
    for name in parents:
        child = section.get(name)
        if child is None:
            child = section[name] = {}
        if not isinstance(child, dict):
            return [Problem(f"--set {key}", f"`{name}` has no keys of its own", child, f"Set `{name}` itself.")]
        section = child
    section[leaf] = value
    return []


def _problems(file: Path, data: Mapping[str, Any], details: Sequence[ErrorDetails]) -> list[Problem]:
    """One problem a key: a value that fits none of several types is one mistake."""
    found: dict[str, Problem] = {}
    for detail in details:
        problem = _problem(file, path(detail, data), detail)
        first = found.setdefault(problem.where, problem)
        if first is not problem:
            found[problem.where] = replace(first, what=f"{first.what}, or {problem.what}")
    return list(found.values())


def _problem(file: Path, names: list[str], detail: ErrorDetails) -> Problem:
    where = f"{file}: {'.'.join(names)}"
    section: type[BaseModel] | None = Config
    field = known = None
    for name in names:
        known = section.model_fields if section else {}
        field = known.get(name)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
    if detail["type"] == "extra_forbidden":
        choices = [name for name in known or {} if name != "file"]
        near = difflib.get_close_matches(names[-1], choices, n=1)
        cure = f"Did you mean `{near[0]}`?" if near else f"Remove it; known keys: {', '.join(choices)}."
        return Problem(where, "unknown key", detail["input"], cure)
    example = f"For example: {names[-1]}: {field.examples[0]}." if field is not None and field.examples else ""
    if detail["type"] == "missing":
        return Problem(where, "is missing", None, f"Add it. {example}".strip())
    return Problem(where, sentence(detail), hide_password(detail["input"]), example or "Correct the value.")


def _cross_checks(config: Config, file: Path) -> list[Problem]:
    problems = []
    server, limits = config.server, config.limits
    if server.keys is None and not _is_loopback(server.host):
        cure = "Set server.keys (make one with `borg-serve key new NAME`), or bind 127.0.0.1."
        problems.append(Problem(f"{file}: server.host", "is open to others, and no key is asked", server.host, cure))
    cluster = config.cluster
    if cluster.max_replicas is not None and cluster.max_replicas < cluster.replicas:
        what = f"must not be below cluster.replicas ({cluster.replicas})"
        problems.append(Problem(f"{file}: cluster.max_replicas", what, cluster.max_replicas, "Raise it."))
    if limits.default_max_tokens > limits.max_tokens:
        what = f"must not pass limits.max_tokens ({limits.max_tokens})"
        problems.append(Problem(f"{file}: limits.default_max_tokens", what, limits.default_max_tokens, "Lower it."))
    if limits.cache_scope == "key" and server.keys is None:
        cure = "Set server.keys, or remove it."
        problems.append(Problem(f"{file}: limits.cache_scope", "needs API keys to tell apart", "key", cure))
    if config.model.revision is not None and not is_hub_id(config.model.path):
        what = "belongs to a hub id, and model.path is a directory"
        problems.append(Problem(f"{file}: model.revision", what, config.model.revision, "Remove it."))
    for name, named in (("identity.prompt", config.identity.prompt), ("server.keys", server.keys)):
        if named is not None and not (file.parent / named).is_file():
            what = "names no file (it is relative to the profile)"
            problems.append(Problem(f"{file}: {name}", what, str(named), "Correct the path."))
    return problems


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _absolute(config: Config) -> Config:
    folder = config.file.parent
    identity = config.identity.model_copy(update={"prompt": folder / config.identity.prompt})
    server = config.server
    if server.keys is not None:
        server = server.model_copy(update={"keys": folder / server.keys})
    model = config.model
    if not is_hub_id(model.path):
        model = model.model_copy(update={"path": str(Path(model.path).absolute())})
    usage = config.usage
    if usage.url is not None:
        usage = usage.model_copy(update={"url": absolute_url(usage.url, folder)})
    if usage.spool is not None:
        usage = usage.model_copy(update={"spool": folder / usage.spool})
    return config.model_copy(update={"identity": identity, "server": server, "model": model, "usage": usage})
