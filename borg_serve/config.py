"""One YAML profile -> one frozen model: the only reader of profiles and of `--set`.

It knows the shape and bounds of every key of ours. It does not know vLLM: keys under `engine` are vLLM's own names, and
the caller passes the check for them (`engine_arguments.field_problems`), so that all problems of a file are reported at
once.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from borg_serve.errors import ConfigError, Problem

__all__ = ["Config", "EngineCheck", "cache_directory", "load", "read_yaml"]

EngineCheck = Callable[[Mapping[str, Any], str], list[Problem]]
"""(the `engine` section, the file's name) -> problems in it."""

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
File = Annotated[Path, Field(strict=False)]
"""YAML has no paths, only text."""


def cache_directory() -> Path:
    """Our own in the user's cache directory.

    By the XDG base directory specification, which says to ignore a relative XDG_CACHE_HOME.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = configured if configured.is_absolute() else Path.home() / ".cache"
    return cache / "borg-serve"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Probe(Section):
    """A question whose greedy answer is known: a sound engine gives it, a miscompiled one does not."""

    question: str = Field(examples=["What is the capital of France?"])
    answer: str = Field(examples=["The capital of France is"])
    """The beginning of the greedy answer, a few tokens: long texts differ between processors."""


class Model(Section):
    path: str = Field(examples=["/models/borg-merge-v1"])
    """A checkpoint directory (`~` allowed), or a hub id such as `Optitransfer/Qwen2.5-7B-Instruct-borg-merge-v1`."""
    revision: str | None = Field(None, examples=["main"])
    """Branch, tag or commit of a hub id."""
    served_name: str = Field("borg-merge-v1", min_length=1, examples=["borg-merge-v1"])
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", examples=["bfloat16"])
    load_format: Literal["auto", "dummy"] = Field("auto", examples=["auto"])
    """`dummy` serves random weights without a checkpoint's tensors: only for benchmarks."""
    probe: Probe | None = None


class IdentitySection(Section):
    prompt: File = Field(examples=["identity/borg-merge-v1.md"])
    """The identity text, relative to the profile."""
    attention: Literal["auto", "shared", "stock"] = Field("auto", examples=["auto"])
    """`shared` reads the identity's KV once for all users of a step (docs/attention.md); `stock` is vLLM's own; `auto`
    shares on a Hopper GPU where the identity is long enough, and `borg-serve check` says which and why."""


class Server(Section):
    host: str = Field("127.0.0.1", examples=["127.0.0.1"])
    port: int = Field(8000, ge=0, le=65535, examples=[8000])
    processes: int = Field(1, ge=1, le=64, examples=[1])
    """API processes over one engine; one is enough up to about 9,000 streamed tokens/s."""
    keys: File | None = Field(None, examples=["keys.yaml"])
    """Hashed API keys (`borg-serve key new`), relative to the profile. None: no key is asked, on loopback only."""
    tool_call_parser: str | None = Field(None, examples=["hermes"])
    """vLLM's parser for this model's tool calls; none: requests with tools are refused."""
    drain_s: Seconds = Field(30, examples=[30])
    """After SIGTERM, how long requests in flight may take to finish."""
    hang_s: Seconds = Field(8, examples=[8])
    """An engine that shows no progress for this long is taken for dead. Longer than its longest step."""


class Limits(Section):
    deadline_s: Seconds = Field(60, examples=[60])
    """From a request's arrival to its last byte."""
    body_bytes: int = Field(1 << 20, ge=1024, examples=[1048576])
    body_s: Seconds = Field(10, examples=[10])
    """How long a request's body may take to arrive."""
    stall_s: Seconds = Field(10, examples=[10])
    """How long a client may leave one chunk unread before its request is aborted."""
    max_tokens: PositiveInt = Field(8192, examples=[8192])
    """The most a client may ask for."""
    default_max_tokens: PositiveInt = Field(4096, examples=[4096])
    temperature: float = Field(0.7, ge=0, le=2, examples=[0.7])
    top_p: float = Field(0.9, gt=0, le=1, examples=[0.9])
    concurrent: PositiveInt | Auto = Field("auto", examples=["auto"])
    """Requests in the engine at once, all API processes together; auto: what its KV cache and `max_num_seqs` hold."""
    queued: Count | Auto = Field("auto", examples=["auto"])
    """Requests that may wait for a place; auto: as many as may run."""
    queued_bytes: PositiveInt | Auto = Field("auto", examples=["auto"])
    """Client text that may wait with them, in bytes (never fewer than its tokens); auto: what the KV cache holds."""


class Cluster(Section):
    """What only a Ray cluster needs; `serve` on one machine reads `expect_root` alone."""

    replicas: PositiveInt = Field(1, examples=[2])
    """Replicas, each with an engine of its own; with `max_replicas` the fewest of them."""
    max_replicas: PositiveInt | None = Field(None, examples=[8])
    """The most replicas that load may start; none: always `replicas`."""
    cpus: float = Field(1, gt=0, examples=[4])
    """Ray CPUs set aside for each worker of a replica: one a GPU, or one for an engine on the CPU."""
    quota_url: str | None = Field(None, pattern="^rediss?://", examples=["redis://redis:6379"])
    """Where all replicas together count keys against their limits; none: each replica counts for itself."""
    expect_root: str | None = Field(None, pattern="^[0-9a-f]{64}$", examples=["<64 hexadecimal digits>"])
    """Root of the only checkpoint that may be served (`borg-serve manifest write` prints it)."""


class Config(Section):
    """A whole profile. Paths are absolute here."""

    file: Path
    model: Model
    identity: IdentitySection
    engine: dict[str, Any] = Field(default_factory=dict, examples=["{max_model_len: 8192}"])
    """vLLM's own argument names; `block_size: auto` picks the smallest KV block the device serves well."""
    server: Server = Field(default_factory=Server)
    limits: Limits = Field(default_factory=Limits)
    cluster: Cluster = Field(default_factory=Cluster)


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(path: str) -> bool:
    """Whether `model.path` names a hub repository rather than a directory."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def load(file: Path, sets: Sequence[str] = (), check_engine: EngineCheck | None = None) -> Config:
    """Read a profile, apply `--set key.path=value` in order, validate everything.

    Raises ConfigError with every problem of the file and the settings together.
    """
    data, problems = _read(file)
    for item in sets:
        problems += _apply(data, item)
    engine = data.get("engine") or {}
    if check_engine is not None and isinstance(engine, Mapping):
        problems += check_engine(engine, str(file))
    try:
        config = Config.model_validate({**data, "file": file.absolute()})
    except ValidationError as error:
        raise ConfigError(_problems(file, error.errors()) + problems) from None
    problems += _cross_checks(config, file)
    if problems:
        raise ConfigError(problems)
    return _absolute(config)


def read_yaml(file: Path, cure: str) -> Any:
    """What a YAML file holds. Raises ConfigError; `cure` is for one that cannot be read."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([Problem(str(file), f"cannot be read: {error.strerror}", str(file), cure)]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Problem(str(file), f"is not YAML: {reason}", str(file), "Correct that line.")]) from None


def _read(file: Path) -> tuple[dict[str, Any], list[Problem]]:
    data = read_yaml(file, "Name an existing profile, for example configs/demo-cpu.yaml.")
    if not isinstance(data, dict):
        what = "must hold sections such as `model:` and `identity:`"
        raise ConfigError([Problem(str(file), what, data, "Start from configs/demo-cpu.yaml.")])
    if "file" in data:
        return data, [Problem(f"{file}: file", "unknown key", data.pop("file"), "Remove it.")]
    return data, []


def _apply(data: dict[str, Any], item: str) -> list[Problem]:
    """Put one `a.b=c` into the data, in place; the value is YAML."""
    key, equals, text = item.partition("=")
    *parents, leaf = key.strip().split(".")
    if not equals or not leaf or not all(parents):
        return [Problem("--set", "must look like key.path=value", item, "For example: --set server.port=8080.")]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return [Problem(f"--set {key}", "the value is not YAML", text, "Put quotes around it.")]
    place = data
    for name in parents:
        child = place.get(name)
        if child is None:
            child = place[name] = {}
        if not isinstance(child, dict):
            return [Problem(f"--set {key}", f"`{name}` has no keys of its own", child, f"Set `{name}` itself.")]
        place = child
    place[leaf] = value
    return []


def _problems(file: Path, details: Sequence[ErrorDetails]) -> list[Problem]:
    """One problem a key: a value that fits none of several types is one mistake."""
    found: dict[str, Problem] = {}
    for detail in details:
        problem = _problem(file, detail)
        first = found.setdefault(problem.where, problem)
        if first is not problem:
            found[problem.where] = replace(first, what=f"{first.what}, or {problem.what}")
    return list(found.values())


def _problem(file: Path, detail: ErrorDetails) -> Problem:
    names = [str(part) for part in detail["loc"]]
    section, field, depth = _field(names)
    names = names[:depth]  # what follows the key are pydantic's names for the types it tried
    where = f"{file}: {'.'.join(names)}"
    if detail["type"] == "extra_forbidden":
        known = [name for name in section.model_fields if name != "file"] if section else []
        near = difflib.get_close_matches(names[-1], known, n=1)
        cure = f"Did you mean `{near[0]}`?" if near else f"Remove it; known keys: {', '.join(known)}."
        return Problem(where, "unknown key", detail["input"], cure)
    example = f"For example: {names[-1]}: {field.examples[0]}." if field is not None and field.examples else ""
    if detail["type"] == "missing":
        return Problem(where, "is missing", None, f"Add it. {example}".strip())
    what = detail["msg"][0].lower() + detail["msg"][1:]
    return Problem(where, what, detail["input"], example or "Correct the value.")


def _field(names: list[str]) -> tuple[type[BaseModel] | None, Any, int]:
    """The section that holds a dotted key, the key's field in it (None for an unknown one), and its depth."""
    section: type[BaseModel] | None = Config
    field = None
    for depth, name in enumerate(names):
        if section is None:
            return None, field, depth
        owner, field = section, section.model_fields.get(name)
        if field is None:
            return owner, None, depth + 1
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
    return section, field, len(names)


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
    if config.model.revision is not None and not is_hub_id(config.model.path):
        what = "belongs to a hub id, and model.path is a directory"
        problems.append(Problem(f"{file}: model.revision", what, config.model.revision, "Remove it."))
    for name, path in (("identity.prompt", config.identity.prompt), ("server.keys", server.keys)):
        if path is not None and not (file.parent / path.expanduser()).is_file():
            what = "names no file (it is relative to the profile)"
            problems.append(Problem(f"{file}: {name}", what, str(path), "Correct the path."))
    return problems


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _absolute(config: Config) -> Config:
    folder = config.file.parent
    identity = config.identity.model_copy(update={"prompt": folder / config.identity.prompt.expanduser()})
    server = config.server
    if server.keys is not None:
        server = server.model_copy(update={"keys": folder / server.keys.expanduser()})
    model = config.model
    if not is_hub_id(model.path):
        model = model.model_copy(update={"path": str(Path(model.path).expanduser().absolute())})
    return config.model_copy(update={"identity": identity, "server": server, "model": model})
