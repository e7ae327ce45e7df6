"""What `/v1/models` says of the one model, in OpenAI's shape and in Anthropic's.

It says the same at every call, in every process and replica. It does not know routes.
"""

from typing import Any

from borg_serve.api.errors import ApiError, shown
from borg_serve.api.protocol import Bounds

__all__ = ["model", "models"]

CREATED, CREATED_AT = 1_793_491_200, "2026-11-01T00:00:00Z"
"""The model's time of creation. Clients want one; a checkpoint tells none, and replicas must say the same."""


def models(bounds: Bounds, context: int | None, anthropic: bool) -> dict[str, Any]:
    """Return the list of models, which is this one; `context` is the most tokens of a prompt and its answer."""
    found = model(bounds.model, bounds, context, anthropic)
    if anthropic:
        return {"data": [found], "has_more": False, "first_id": found["id"], "last_id": found["id"]}
    return {"object": "list", "data": [found]}


def model(name: str, bounds: Bounds, context: int | None, anthropic: bool) -> dict[str, Any]:
    """Return one model by its name. Raises ApiError 404 if it is not the one here."""
    if not bounds.serves(name):
        what = f"The model {shown(name)} does not exist. This server has {shown(bounds.model)}."
        raise ApiError(404, what, param="model", code="model_not_found")
    if not anthropic:
        owner = {"owned_by": "borg-serve", "max_model_len": context}
        return {"id": name, "object": "model", "created": CREATED, **owner}
    named = {"type": "model", "id": name, "display_name": name, "created_at": CREATED_AT}
    return {**named, "lifecycle": "active", "max_input_tokens": context, "max_tokens": bounds.max_tokens}
