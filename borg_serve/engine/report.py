"""What `borg-serve check`, `render` and `version` show: effective settings and the exact prompt, before a start (I7).

Combines what other modules know. Does not print and starts nothing.
"""

import json
import platform
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from borg_serve.checkpoint import hub, structure
from borg_serve.checkpoint.check import Checkpoint, inspect
from borg_serve.checkpoint.locate import load_tokenizer, locate
from borg_serve.config import Config, is_hub_id
from borg_serve.engine import arguments, memory, quantised
from borg_serve.engine.environment import device, device_bytes, vllm_version
from borg_serve.engine.memory import GIB
from borg_serve.engine.prepare import checked_literals, installed
from borg_serve.engine.rehearsal import rehearse
from borg_serve.errors import BorgServeError, ConfigError, Problem, shown
from borg_serve.identity import template
from borg_serve.identity.prefix import Render, TokenPrefix, encode, token_prefix
from borg_serve.identity.text import Identity, load_identity

__all__ = ["effective", "plan", "rendered", "text", "versions"]

CUDA_BYTES = 80 * GIB
"""Memory of the GPU that a GPU profile is planned for where there is no GPU: one H100 80GB."""
CPU_BLOCK = 128
"""Tokens of a KV block where vLLM chooses it on a CPU."""
CONTEXTS = (4096, 8192, 16384, 32768)


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and the main libraries; None for one that is not installed."""
    names = {"borg_serve": "borg-serve", "torch": "torch", "transformers": "transformers", "ray": "ray"}
    found: dict[str, str | None] = {name: installed(package) for name, package in names.items()}
    try:
        found["vllm"] = vllm_version()
    except BorgServeError:
        found["vllm"] = None
    return found | {"python": platform.python_version()}


def effective(config: Config, *, promise: bool = False) -> dict[str, Any]:
    """A profile's effective settings as one JSON document. Starts no engine, and fetches no weights from a hub.

    `promise`: raise ConfigError for what would stop a start on this machine, as far as the checkpoint is here to tell.
    """
    identity = load_identity(config.identity.prompt)
    model = config.model.path
    directory, missing = _outline(config)
    document: dict[str, Any] = {
        "profile": str(config.file),
        "versions": versions(),
        "device": device(),
        "identity": {"file": str(config.identity.prompt), "sha256": identity.sha256},
        **{name: getattr(config, name).model_dump(mode="json") for name in ("server", "limits", "cluster")},
        "checkpoint": {"path": model, "revision": directory.name if directory and is_hub_id(model) else None},
        "memory": None,
    }
    tokens = made = None
    if directory is not None:
        tokenizer = load_tokenizer(directory)
        arguments.check_parser_knows(config, tokenizer)
        tokens = len(_prompts(directory, tokenizer, identity)[1].token_ids)
        document["identity"]["tokens"] = tokens
        document["identity"]["attention"] = "{0.name}: {0.reason}".format(arguments.attention(config, tokens))
    document["vllm"] = arguments.build(config, model, "<the checkpoint's own template behind the identity>", tokens)
    document["vllm_command"] = shlex.join(["vllm", "serve", *arguments.command_line(document["vllm"])])
    if directory is None or tokens is None:
        document["note"] = f"No memory plan: {missing}"
    elif config.model.load_format == "dummy":
        document["note"] = "No memory plan: random weights have no files to measure."
    else:
        found = inspect(directory, weights=not is_hub_id(model))
        if found.quantisation is not None:
            structure.expected(found, partial(quantised.served_layers, dtype=config.model.dtype))
        weights = hub.weight_bytes(config, directory) if is_hub_id(model) else found.weight_bytes
        if weights is None:
            document["note"] = "No memory plan: the size of the weights is not known without the hub."
        else:
            made = plan(config, found, weights, document["vllm"], tokens)
            document["memory"] = _memory(config, found, made)
    if promise and directory is not None and tokens is not None:
        checked_literals(identity, tokenizer)
        rehearse(config, {**document["vllm"], "model": str(directory)}, tokens, made)
    return document


def _outline(config: Config) -> tuple[Path | None, str]:
    """A directory with at least the checkpoint's configuration and tokenizer, or why there is none."""
    model = config.model.path
    if not is_hub_id(model):
        return (Path(model), "") if Path(model).is_dir() else (None, f"the checkpoint {model} is not on this machine.")
    try:
        return hub.fetch(config, weights=False), ""
    except hub.Unreachable as error:
        return None, str(error)


def _prompts(directory: Path, tokenizer: Any, identity: Identity) -> tuple[Render, TokenPrefix]:
    """How the checkpoint's prompts are rendered, and the tokens that all of them begin with."""
    render = partial(template.render, tokenizer, template.wrap(template.stock_template(directory), identity))
    return render, token_prefix(render, tokenizer, identity)


def plan(
    config: Config, found: Checkpoint, weights: int, args: dict[str, Any], prefix_tokens: int
) -> memory.MemoryPlan:
    """The memory plan of one device of this machine, or of one H100 80GB where there is no GPU.

    `weights`: bytes of the checkpoint's; `args`: vLLM's arguments.
    """
    engine, on_cpu = arguments.typed(args), device() == "cpu"
    dtype = found.dtype if config.model.dtype == "auto" else config.model.dtype
    if found.quantisation is None:
        stored = found.num_parameters * memory.element_bytes(found.dtype) or weights
        weights = stored * memory.element_bytes(dtype) // memory.element_bytes(found.dtype)
    sizes = memory.ModelSizes(weights, dtype, found.num_layers, found.num_kv_heads, found.head_dim)
    known = device_bytes()
    if known is not None and on_cpu:
        known //= int(engine.get("tensor_parallel_size") or 1)  # its workers share the machine's memory
    block_tokens = int(engine["block_size"] or CPU_BLOCK)
    made = memory.plan(engine, sizes, known or CUDA_BYTES, block_tokens, prefix_tokens, on_cpu=on_cpu)
    return made if known else replace(made, device_bytes=None)


def _memory(config: Config, found: Checkpoint, plan: memory.MemoryPlan) -> dict[str, Any]:
    asked = arguments.typed({"max_model_len": config.engine.get("max_model_len")})["max_model_len"] or -1
    contexts = [tokens for tokens in CONTEXTS if tokens <= (asked if asked > 0 else found.max_positions)]
    return {
        "weights_bytes": plan.weights_bytes,
        "kv_bytes": plan.kv_bytes,
        "kv_bytes_a_token": plan.kv_bytes_a_token,
        "kv_tokens": plan.kv_tokens,
        "block_tokens": plan.block_tokens,
        "identity_tokens": plan.prefix_tokens,
        "identity_shared_tokens": plan.shared_tokens,
        "identity_shared_bytes": plan.shared_tokens * plan.kv_bytes_a_token,
        "identity_tail_tokens": plan.tail_tokens,
        "users_by_context_tokens": {tokens: plan.users(tokens) for tokens in contexts},
        "estimate": "kv_cache_memory_bytes" not in config.engine,
    }


def text(document: dict[str, Any]) -> str:
    """The effective settings for a person to read."""
    lines = [f"{document['profile']}: valid", "", "versions"]
    lines += [f"  {name:<14}{value or 'not installed'}" for name, value in document["versions"].items()]
    for section in ("checkpoint", "identity", "server", "limits", "cluster"):
        lines += ["", section, *(f"  {name:<22}{_plain(value)}" for name, value in document[section].items())]
    lines += ["", f"vLLM ({document['device']})", f"  {document['vllm_command']}", "", "memory, each device"]
    plan = document["memory"]
    if plan is None:
        return "\n".join([*lines, f"  {document['note']}"])
    about = "about " if plan["estimate"] else ""
    share = plan["identity_shared_bytes"] / max(1, plan["kv_bytes"])
    lines += [
        f"  weights               {plan['weights_bytes'] / GIB:.2f} GiB",
        f"  KV cache              {about}{plan['kv_bytes'] / GIB:.2f} GiB: {plan['kv_tokens']:,} tokens of "
        f"{plan['kv_bytes_a_token']:,} bytes, in blocks of {plan['block_tokens']}",
        f"  identity              {plan['identity_tokens']:,} tokens, {plan['identity_shared_tokens']:,} of them "
        f"stored once for all users ({share:.1%} of the cache)",
        f"  identity's tail       {plan['identity_tail_tokens']} tokens that no full block covers: every request "
        "computes them again",
    ]
    for tokens, users in plan["users_by_context_tokens"].items():
        lines.append(f"  users at {tokens:>6,}       {about}{users:,} at once, identity included in the context")
    return "\n".join(lines)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else "none" if value is None else shown(value)


def rendered(config: Config, source: str) -> dict[str, Any]:
    """The prompt for a JSON list of messages (or a chat request's object), exactly as the engine gets it."""
    from borg_serve.api import chat
    from borg_serve.api.errors import ApiError
    from borg_serve.api.protocol import Bounds
    from borg_serve.identity.control_tokens import Neutraliser, literals

    try:
        document = json.loads(source)
        request = {"messages": document} if isinstance(document, list) else dict(document)
    except (ValueError, TypeError) as error:
        problem = Problem("messages", f"must be a JSON list of messages or a chat request ({error})", source[:40], "")
        raise ConfigError([problem]) from None
    directory = locate(config)
    tokenizer = load_tokenizer(directory)
    render, prefix = _prompts(directory, tokenizer, load_identity(config.identity.prompt))
    bounds = Bounds(model=config.model.served_name, max_tokens=config.limits.max_tokens)
    try:
        body, _ = chat.parse(json.dumps(request).encode(), bounds, Neutraliser(literals(tokenizer)))
    except ApiError as error:
        raise ConfigError([Problem(f"messages: {error.param or ''}", error.message, None, "")]) from None
    prompt = render(body["messages"], body.get("tools"))
    ids = encode(prefix, prompt, tokenizer)
    shared = len(prefix.token_ids)
    return {"prompt": prompt, "tokens": {"total": len(ids), "identity": shared, "rest": len(ids) - shared}, "ids": ids}
