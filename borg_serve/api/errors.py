"""The error that a client gets instead of an answer, in OpenAI's fields, and pydantic's errors as such errors.

It does not know what a request may hold, nor how each protocol writes an error.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from borg_serve import validation

__all__ = ["ApiError", "invalid", "shown", "translate"]

SHOWN_CHARACTERS = 40


class ApiError(Exception):
    """An answer other than success: HTTP status, OpenAI's error fields, and headers.

    `reason` is the error's label in metrics and in the access log.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        reason: str = "invalid",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.reason = reason
        self.headers = headers or {}
        super().__init__(message)

    def fields(self) -> dict[str, str | None]:
        """Return OpenAI's error fields."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


def invalid(param: str, what: str, code: str = "invalid_value") -> ApiError:
    """Return the error for a field whose value is not accepted."""
    return ApiError(400, f"{param}: {what}.", param=param, code=code)


_NAMING = {"extra_forbidden", "missing", "union_tag_not_found", "union_tag_invalid"}


def translate(error: ValidationError, body: dict[str, Any]) -> ApiError:
    """Turn one of pydantic's errors into OpenAI's shape, `param` as in `messages.0.content`."""
    details = error.errors(include_url=False)
    paths = [validation.path(detail, body) for detail in details]

    def telling(index: int) -> tuple[int, bool, bool, bool, int]:
        # Of a union's branches, the one that got furthest is the one that was meant; then a wrong choice (`type`) says
        # more than a wrong name, that more than a wrong value, and that more than a wrong type.
        kind = details[index]["type"]
        return len(paths[index]), kind == "literal_error", kind in _NAMING, not _about_type(kind), -index

    best = max((index for index, path in enumerate(paths) if path[0] == paths[0][0]), key=telling)
    detail, path, kind = details[best], paths[best], details[best]["type"]
    where = ".".join(part[:SHOWN_CHARACTERS] for part in path)
    if kind == "extra_forbidden":
        what = f"Unrecognized request argument supplied: {where}"
        return ApiError(400, what, param=where, code="unknown_parameter")
    if kind in ("missing", "union_tag_not_found"):
        return ApiError(400, f"{where}: is required.", param=where, code="missing_required_parameter")
    what, code = validation.sentence(detail), "invalid_value"
    if _about_type(kind):
        same_place = [other for other, there in zip(details, paths, strict=True) if there == path]
        choices = dict.fromkeys(validation.sentence(other) for other in same_place if _about_type(other["type"]))
        what = " or ".join(choices).replace(" or must be", " or")
        code = "invalid_value" if kind == "literal_error" else "invalid_type"
    value = detail["ctx"]["tag"] if kind == "union_tag_invalid" else detail["input"]
    return ApiError(400, f"{where}: {what}, got {shown(value)}.", param=where, code=code)


def _about_type(kind: str) -> bool:
    return kind == "literal_error" or kind.endswith("_type")


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
