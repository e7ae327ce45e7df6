"""A plan for a person or a program to read, with what the numbers do not say."""

from dataclasses import asdict
from typing import Any

from borg_serve.sizing.plan import GIB, REPLICA_SHARE, Plan, Workload

__all__ = ["document", "notes", "text"]


def document(found: Plan) -> dict[str, Any]:
    """The plan as JSON, with what a reader of numbers alone must know."""
    numbers = _rounded(asdict(found)) | {"speed": _rounded(asdict(found.speed))}
    return {"estimate": True, "model": "the merged 7B checkpoint", **numbers, "notes": notes(found)}


def notes(found: Plan) -> list[str]:
    """What the numbers do not say."""
    load, carried = Workload(), _two_digits(found.api_tokens_s)
    said = [
        "An estimate, not a measurement: figures of an H100 and an H200 scaled by bandwidth and arithmetic, for "
        f"requests of {load.new_tokens} new tokens and about {load.output_tokens} of answer. Measure before you buy."
    ]
    if found.engine_tokens_s > carried:
        said.append(
            f"A replica's engine could make {found.engine_tokens_s:,.0f} tokens/s, but its API processes "
            f"({found.api_processes}) carry about {carried:,}. More tokens an event (engine.stream_interval) or more "
            "replicas with fewer users each would be faster."
        )
    if found.replicas > 1:
        said.append(
            f"The API process of a replica on Ray Serve is counted on to carry {REPLICA_SHARE:.0%} of what a single "
            "server's does."
        )
        said.append(
            "Each replica keeps the KV of its own users. Requests of one conversation go to one replica (by the header "
            "x-session-id, else by the conversation's first message), so that a later turn is computed only from where "
            "the last one ended. When that replica is gone or full they go to another, which computes them once again. "
            "The identity is cached on all of them."
        )
        said.append("One more replica lets the service hold these users while one is replaced.")
    if found.tensor_parallel_size > 1:
        said.append("Tensor parallelism was measured on two GPUs of one host that NVLink joins, and on no more.")
    if found.tokens_s_apart is not None:
        said.append(
            f"With a replica on each, these GPUs would make about {_two_digits(found.tokens_s_apart):,} tokens/s, "
            f"{found.tokens_s_apart / found.users:.0f} for each user. Tensor parallelism is for few users who wait for "
            "each token, or a context that one GPU does not hold; replicas are for many users."
        )
    return said


def text(found: Plan) -> str:
    """The plan for a person to read."""
    step, gpus = found.speed, found.replicas * found.tensor_parallel_size
    limit = "memory" if found.users_by_memory == found.users_a_replica else "engine.max_num_seqs"
    weights, cache = found.weights_bytes / GIB, found.kv_bytes / GIB
    total, unshared = _two_digits(found.tokens_s), _two_digits(found.tokens_s_unshared)
    lines = [
        f"estimate for {found.users:,} users at once with {found.context_tokens:,} tokens each, identity included",
        f"  replicas          {found.replicas}, each on {found.tensor_parallel_size} {found.gpu}: {gpus} in all",
        f"  users a replica   up to {found.users_a_replica:,}, by {limit} (memory holds {found.users_by_memory:,})",
        f"  memory a GPU      {weights:.1f} GiB of weights, {cache:.1f} GiB of KV cache: {found.kv_tokens:,} tokens",
        f"  output tokens/s   about {total:,} in all, {found.tokens_s_a_user:.0f} for each user",
        f"  without sharing   about {unshared:,} tokens/s, if each request brought the identity anew",
        f"  a step, ms        weights {step.weights_ms:.1f}, identity {step.identity_ms:.1f}, own tokens "
        f"{step.own_ms:.1f}, prefill {step.prefill_ms:.1f}, "
        f"outside graphs {step.mixed_ms:.1f}, rest {step.rest_ms:.1f}",
    ]
    return "\n".join([*lines, *(f"  note: {note}" for note in notes(found))])


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 1) if isinstance(value, float) else value for name, value in values.items()}


def _two_digits(value: float) -> int:
    """Two significant digits: more would claim to be a measurement."""
    return int(round(value, min(0, 2 - len(str(int(value))))))
