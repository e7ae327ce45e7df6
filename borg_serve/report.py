"""What `borg-serve check`, `render` and `version` show: effective settings and the exact prompt, before a start (I7).

It puts together what other modules know. It does not print.
"""

import json
import platform
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from borg_serve import capacity, checkpoint, engine_arguments, identity, preparation, template
from borg_serve.config import Config, is_hub_id
from borg_serve.device import device, vllm_version
from borg_serve.errors import BorgServeError, ConfigError, Problem

__all__ = ["effective", "rendered", "text", "versions"]

GIB = 1 << 30
CUDA_BYTES = 80 * GIB
"""The device assumed for a GPU profile where no GPU is at hand: one H100 80GB."""
CUDA_OVERHEAD_BYTES = 4 * GIB
"""Activations, CUDA graphs and the context, roughly, beside the weights and the KV cache (an estimate)."""
CONTEXTS = (4096, 8192, 16384, 32768)


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and the libraries it stands on; None for one that is not installed."""
    names = {"borg_serve": "borg-serve", "torch": "torch", "transformers": "transformers", "ray": "ray"}
    installed: dict[str, str | None] = {name: preparation.installed(package) for name, package in names.items()}
    try:
        installed["vllm"] = vllm_version()
    except BorgServeError:
        installed["vllm"] = None
    return installed | {"python": platform.python_version()}


def effective(config: Config) -> dict[str, Any]:
    """A profile's effective settings as one JSON document. Starts no engine; fetches nothing."""
    text = identity.load(config.identity.prompt)
    model = config.model.path
    directory = Path(model)
    document: dict[str, Any] = {
        "profile": str(config.file),
        "versions": versions(),
        "device": device(),
        "identity": {"file": str(config.identity.prompt), "sha256": text.sha256},
        "server": config.server.model_dump(mode="json"),
        "limits": config.limits.model_dump(mode="json"),
        "cluster": config.cluster.model_dump(mode="json"),
        "memory": None,
    }
    tokens = None
    if not is_hub_id(model) and directory.is_dir():
        tokenizer = preparation.load_tokenizer(directory)
        wrapped = template.wrap(template.stock_template(directory), text)
        prefix = identity.token_prefix(partial(template.render, tokenizer, wrapped), tokenizer, text)
        document["identity"]["tokens"] = tokens = len(prefix.token_ids)
        document["identity"]["attention"] = "{0.name}: {0.reason}".format(engine_arguments.attention(config, tokens))
    document["vllm"] = engine_arguments.build(
        config, model, "<the checkpoint's own template behind the identity>", tokens
    )
    document["vllm_command"] = shlex.join(["vllm", "serve", *engine_arguments.command_line(document["vllm"])])
    if tokens is None:
        document["note"] = f"No memory plan: the checkpoint {model} is not on this machine."
        return document
    if config.model.load_format == "dummy":
        document["note"] = "No memory plan: random weights have no files to measure."
        return document
    document["memory"] = _memory(config, directory, document["vllm"]["block_size"], tokens)
    return document


def _memory(config: Config, directory: Path, block_tokens: int, prefix_tokens: int) -> dict[str, Any]:
    found = checkpoint.inspect(directory)
    arguments = config.engine
    shards = int(arguments.get("tensor_parallel_size") or 1)
    weights = found.weight_bytes // shards
    dtype = found.dtype if config.model.dtype == "auto" else config.model.dtype
    if "quantization_config" not in found.config:
        weights = weights * capacity.element_bytes(dtype) // capacity.element_bytes(found.dtype)
    if arguments.get("quantization") == "fp8" and found.dtype != "float8_e4m3fn":
        weights //= 2
    kv_bytes = arguments.get("kv_cache_memory_bytes")
    if kv_bytes is None:
        share = float(arguments.get("gpu_memory_utilization", 0.9))
        kv_bytes = max(0, int(share * CUDA_BYTES) - weights - CUDA_OVERHEAD_BYTES)
    plan = capacity.MemoryPlan(
        weights_bytes=weights,
        kv_bytes_a_token=capacity.kv_bytes_a_token(
            arguments,
            shards,
            dtype=dtype,
            num_layers=found.num_layers,
            num_kv_heads=found.num_kv_heads,
            head_dim=found.head_dim,
        ),
        kv_bytes=int(kv_bytes),
        block_tokens=block_tokens,
        prefix_tokens=prefix_tokens,
    )
    contexts = [tokens for tokens in CONTEXTS if tokens <= int(arguments.get("max_model_len") or found.max_positions)]
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
        "estimate": "kv_cache_memory_bytes" not in arguments,
    }


def text(document: dict[str, Any]) -> str:
    """The effective settings for a person to read."""
    lines = [f"{document['profile']}: valid", "", "versions"]
    lines += [f"  {name:<14}{value or 'not installed'}" for name, value in document["versions"].items()]
    for section in ("identity", "server", "limits", "cluster"):
        lines += ["", section, *(f"  {name:<22}{value}" for name, value in document[section].items())]
    lines += ["", f"vLLM ({document['device']})", f"  {document['vllm_command']}", "", "memory, each device"]
    memory = document["memory"]
    if memory is None:
        return "\n".join([*lines, f"  {document['note']}"])
    about = "about " if memory["estimate"] else ""
    share = memory["identity_shared_bytes"] / max(1, memory["kv_bytes"])
    lines += [
        f"  weights               {memory['weights_bytes'] / GIB:.2f} GiB",
        f"  KV cache              {about}{memory['kv_bytes'] / GIB:.2f} GiB: {memory['kv_tokens']:,} tokens of "
        f"{memory['kv_bytes_a_token']:,} bytes, in blocks of {memory['block_tokens']}",
        f"  identity              {memory['identity_tokens']:,} tokens, {memory['identity_shared_tokens']:,} of them "
        f"stored once for all users ({share:.1%} of the cache)",
        f"  identity's tail       {memory['identity_tail_tokens']} tokens that no full block covers: every request "
        "computes them again",
    ]
    for tokens, users in memory["users_by_context_tokens"].items():
        lines.append(f"  users at {tokens:>6,}       {about}{users:,} at once, identity included in the context")
    return "\n".join(lines)


def rendered(config: Config, source: str) -> dict[str, Any]:
    """The prompt for a JSON list of messages (or a chat request's object), exactly as the engine gets it."""
    from borg_serve.neutralise import Neutraliser, literals
    from borg_serve.schema import Bounds, RequestError, parse_chat

    try:
        document = json.loads(source)
        request = {"messages": document} if isinstance(document, list) else dict(document)
    except (ValueError, TypeError) as error:
        problem = Problem("messages", f"must be a JSON list of messages or a chat request ({error})", source[:40], "")
        raise ConfigError([problem]) from None
    directory = preparation.locate(config)
    tokenizer = preparation.load_tokenizer(directory)
    text = identity.load(config.identity.prompt)
    wrapped = template.wrap(template.stock_template(directory), text)
    render = partial(template.render, tokenizer, wrapped)
    bounds = Bounds(model=config.model.served_name, max_tokens=config.limits.max_tokens)
    try:
        body = parse_chat(json.dumps(request).encode(), bounds, Neutraliser(literals(tokenizer)))
    except RequestError as error:
        raise ConfigError([Problem(f"messages: {error.param or ''}", error.message, None, "")]) from None
    prompt = render(body["messages"], body.get("tools"))
    prefix = identity.token_prefix(render, tokenizer, text)
    ids = identity.encode(prefix, prompt, tokenizer)
    shared = len(prefix.token_ids)
    return {"prompt": prompt, "tokens": {"total": len(ids), "identity": shared, "rest": len(ids) - shared}, "ids": ids}
