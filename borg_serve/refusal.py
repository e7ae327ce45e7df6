"""Why a request is refused: the error a client gets, the fields known and refused, pydantic's errors in our words.

Knows OpenAI's error shape. It does not know what a request may hold: that is `chat`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

__all__ = ["REFUSED", "RefusedField", "RequestError", "shown", "translate"]

SHOWN_CHARACTERS = 40


class RequestError(Exception):
    """A client's request that is not served: an HTTP status and OpenAI's error fields."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        super().__init__(message)

    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer's body in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


# ---------------------------------------------------------------------------------------------- refused fields


@dataclass(frozen=True)
class RefusedField:
    """A known field that is refused unless it says what its absence says."""

    reason: str
    same_as_absent: tuple[Any, ...] = ()


def _refused() -> dict[str, RefusedField]:
    prompt = "it replaces, cuts or prints the prompt, and every prompt begins with the identity"
    template = "the chat template takes nothing from a request"
    forced = "it puts words into the model's mouth; response_format takes a JSON Schema"
    media = "this model reads text only"
    internal = "it belongs to the servers, not to clients"
    cost = "it costs more than one request should"
    tools = "it is the old form of tools and tool_choice"
    openai = "it belongs to a service that this server does not have"
    reasoning = "this is not a reasoning model"
    return {
        "kv_transfer_params": RefusedField(prompt),
        "ec_transfer_params": RefusedField(internal),
        "truncate_prompt_tokens": RefusedField(prompt),
        "truncation_side": RefusedField(prompt),
        "echo": RefusedField(prompt, (False,)),
        "prompt_logprobs": RefusedField(prompt),
        "return_token_ids": RefusedField(prompt, (False,)),
        "return_prompt_text": RefusedField(prompt, (False,)),
        "return_token_offsets": RefusedField(prompt, (False,)),
        "return_assistant_tokens_mask": RefusedField(prompt, (False,)),
        "routed_experts_prompt_start": RefusedField(prompt, (0,)),
        "add_special_tokens": RefusedField(prompt, (False,)),
        "chat_template": RefusedField(template),
        "chat_template_kwargs": RefusedField(template, ({},)),
        "documents": RefusedField(template, ([],)),
        "add_generation_prompt": RefusedField("it would let the client speak as the assistant", (True,)),
        "continue_final_message": RefusedField("it would let the client speak as the assistant", (False,)),
        "structured_outputs": RefusedField(forced),
        "guided_json": RefusedField(forced),
        "guided_regex": RefusedField(forced),
        "guided_choice": RefusedField(forced),
        "guided_grammar": RefusedField(forced),
        "guided_decoding_backend": RefusedField(forced),
        "guided_whitespace_pattern": RefusedField(forced),
        "logit_bias": RefusedField(forced, ({},)),
        "allowed_token_ids": RefusedField(forced),
        "bad_words": RefusedField(forced, ([],)),
        "logits_processors": RefusedField("it runs code of the client's choice", ([],)),
        "vllm_xargs": RefusedField(internal, ({},)),
        "cache_salt": RefusedField("it unshares the identity's cache"),
        "priority": RefusedField("requests are served in order", (0,)),
        "request_id": RefusedField("send the header x-request-id instead"),
        "stream_interval": RefusedField("the server sets how many tokens an event has", (1,)),
        "best_of": RefusedField(cost, (1,)),
        "use_beam_search": RefusedField(cost, (False,)),
        "length_penalty": RefusedField("it belongs to beam search", (1,)),
        "early_stopping": RefusedField("it belongs to beam search", (False,)),
        "repetition_detection": RefusedField("use repetition_penalty"),
        "logprob_token_ids": RefusedField("use top_logprobs", ([],)),
        "return_tokens_as_token_ids": RefusedField("tokens are shown as text", (False,)),
        "skip_special_tokens": RefusedField("control tokens are not shown", (True,)),
        "spaces_between_special_tokens": RefusedField("control tokens are not shown", (True,)),
        "reasoning_effort": RefusedField(reasoning),
        "thinking_token_budget": RefusedField(reasoning),
        "include_reasoning": RefusedField(reasoning, (True,)),
        "verbosity": RefusedField(reasoning),
        "media_io_kwargs": RefusedField(media, ({},)),
        "mm_processor_kwargs": RefusedField(media, ({},)),
        "modalities": RefusedField(media, (["text"],)),
        "audio": RefusedField(media),
        "functions": RefusedField(tools),
        "function_call": RefusedField(tools),
        "store": RefusedField("nothing is stored here", (False,)),
        "prediction": RefusedField(openai),
        "web_search_options": RefusedField(openai),
        "moderation": RefusedField(openai),
        "prompt_cache_options": RefusedField(openai),
        "prompt_cache_retention": RefusedField(openai),
    }


REFUSED = _refused()
"""Fields of OpenAI's and vLLM's chat requests that are not in the model. A test compares them with vLLM's own list."""


# ------------------------------------------------------------------------------------------- pydantic's errors

_WHAT = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "must be one of {expected_tags}",
    "union_tag_not_found": "is required",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "may have {max_length} characters",
    "too_short": "must have at least {min_length} items",
    "too_long": "may have {max_length} items",
    "string_pattern_mismatch": "must match {pattern}",
}
_NAMING = {"extra_forbidden", "missing", "union_tag_not_found", "union_tag_invalid"}
_TYPE = {"literal_error", *(kind for kind in _WHAT if kind.endswith("_type"))}


def translate(error: ValidationError, body: dict[str, Any]) -> RequestError:
    """Turn one of pydantic's errors into OpenAI's shape, `param` as in `messages.0.content`."""
    details = error.errors(include_url=False)
    paths = [_path(detail, body) for detail in details]

    def telling(index: int) -> tuple[int, bool, bool, bool, int]:
        # Of a union's branches, the one that got furthest is the one that was meant; then a wrong choice (`type`) says
        # more than a wrong name, that more than a wrong value, and that more than a wrong type.
        kind = details[index]["type"]
        return len(paths[index]), kind == "literal_error", kind in _NAMING, kind not in _TYPE, -index

    best = max((index for index, path in enumerate(paths) if path[0] == paths[0][0]), key=telling)
    detail, path, kind = details[best], paths[best], details[best]["type"]
    where = ".".join(part[:SHOWN_CHARACTERS] for part in path)
    if kind == "extra_forbidden":
        what = f"Unrecognized request argument supplied: {where}"
        return RequestError(400, what, param=where, code="unknown_parameter")
    if kind in ("missing", "union_tag_not_found"):
        return RequestError(400, f"{where}: is required.", param=where, code="missing_required_parameter")
    what, code = _what(detail), "invalid_value"
    if kind in _TYPE:
        same_place = [other for other, there in zip(details, paths, strict=True) if there == path]
        choices = dict.fromkeys(_what(other) for other in same_place if other["type"] in _TYPE)
        what = " or ".join(choices).replace(" or must be", " or")
        code = "invalid_value" if kind == "literal_error" else "invalid_type"
    value = detail["ctx"]["tag"] if kind == "union_tag_invalid" else detail["input"]
    return RequestError(400, f"{where}: {what}, got {shown(value)}.", param=where, code=code)


def _what(detail: ErrorDetails) -> str:
    template = _WHAT.get(detail["type"])
    if template is None:
        return detail["msg"]
    context = detail.get("ctx", {}).items()
    return template.format(**{name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in context})


def _path(detail: ErrorDetails, body: dict[str, Any]) -> list[str]:
    """The place in the body: pydantic's location without the names of the union branches that it tried."""
    path: list[str] = []
    value: Any = body
    location: Sequence[int | str] = detail["loc"]
    for index, part in enumerate(location):
        inside = isinstance(value, dict) and part in value
        within = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside or within:
            value = value[part]
            path.append(str(part))
        elif detail["type"] == "missing" and index == len(location) - 1:
            path.append(str(part))
    if detail["type"].startswith("union_tag"):
        path.append(detail["ctx"]["discriminator"].strip("'"))
    return path


def shown(value: Any) -> str:
    """The value for a message: never more than 40 characters of it."""
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, list):
        return f"an array of {len(value)} items"
    if isinstance(value, str):
        # Half of a surrogate pair could not be sent back.
        text = value[:SHOWN_CHARACTERS].encode(errors="replace").decode()
        return json.dumps(text, ensure_ascii=False) + "…" * (len(value) > SHOWN_CHARACTERS)
    return json.dumps(value)[:SHOWN_CHARACTERS]
