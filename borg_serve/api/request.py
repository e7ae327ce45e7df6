"""Read a request's bytes into a protocol's model: what the model honours, and the names of the rest.

It does not know any protocol.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError

from borg_serve.api import fields, strict_json
from borg_serve.api.errors import ApiError, invalid, shown, translate
from borg_serve.api.protocol import Bounds

__all__ = ["Dropped", "Request", "Strict", "by_type", "read", "renamed", "validated"]

Paths = list[tuple[str, ...]]


class Strict(BaseModel):
    """A JSON object in which no value changes its type. `validated` takes out the fields that it does not have."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)


class Dropped(Strict):
    """An item that is ignored, and named by its type."""

    type: str


class Request(Strict):
    """The body of a protocol's request."""

    LIMITS: ClassVar[Mapping[str, tuple[str, str]]]
    """Field -> JSON Schema keyword and the name of the limit in Bounds."""
    REFUSED: ClassVar[Mapping[str, str]]
    """Field -> why it is refused."""
    NULLS_KEPT: ClassVar[tuple[str, ...]]
    """Keys whose values keep their nulls, such as JSON Schemas. Elsewhere a null means that the field is absent."""


R = TypeVar("R", bound=Request)


def read(raw: bytes, model: type[R], bounds: Bounds) -> tuple[R, tuple[str, ...]]:
    """Return the request as `model`, and the names of what was ignored. Raises ApiError."""
    body = strict_json.decode(raw)
    if not isinstance(body, dict):
        raise ApiError(400, f"body: must be a JSON object, got {shown(body)}.", code="invalid_type")
    return validated(body, model, bounds)


def validated(body: Mapping[str, Any], model: type[R], bounds: Bounds) -> tuple[R, tuple[str, ...]]:
    """Return a body, which may hold nulls, as `model`, and the names of what was ignored. Raises ApiError.

    Nothing is left in the model but the fields that it has.
    """
    known = _without_nulls(body, model.NULLS_KEPT)
    for name in [name for name in known if name in model.REFUSED]:
        if not fields.is_neutral(name, known.pop(name)):
            raise invalid(name, f"is refused: {model.REFUSED[name]}. Leave it out", "unsupported_parameter")
    for name, (keyword, bound) in model.LIMITS.items():
        value, limit = known.get(name), getattr(bounds, bound)
        if keyword == "maximum" and isinstance(value, int | float) and value > limit:
            raise invalid(name, f"must be at most {limit}, got {shown(value)}")
        if keyword == "maxItems" and isinstance(value, list) and len(value) > limit:
            raise invalid(name, f"may have {limit} items, got {shown(value)}")
    try:
        request = model.model_validate(known)
    except ValidationError as error:
        raise translate(error, known) from None
    ignored: Paths = []
    _take_out(request, (), ignored)
    if bounds.unknown_fields == "refuse":
        for path in ignored:
            if path[-1] not in fields.HINTS:
                where = ".".join(part[:40] for part in path)
                what = f"Unrecognized request argument supplied: {where}"
                raise ApiError(400, what, param=where, code="unknown_parameter")
    return request, fields.shown_names(ignored)


def by_type(**tags: tuple[str, ...]) -> Discriminator:
    """Return what tells a list's items apart: tag -> types. Objects of another type get the tag `dropped`."""
    tag_of = {kind: tag for tag, kinds in tags.items() for kind in kinds}
    first = next(iter(tags))

    def tag(item: Any) -> str:
        kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
        return tag_of.get(kind, "dropped") if isinstance(kind, str) else first

    return Discriminator(tag)


def renamed(name: str, names: Iterable[tuple[str, str]]) -> str:
    """Return a field's name with each regular expression in it replaced."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _without_nulls(value: Any, kept: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        present = {name: item for name, item in value.items() if item is not None}
        return {name: item if name in kept else _without_nulls(item, kept) for name, item in present.items()}
    if isinstance(value, list):
        return [_without_nulls(item, kept) for item in value]
    return value


def _take_out(value: Any, path: tuple[str, ...], ignored: Paths) -> None:
    """Remove the fields that the models do not have, and note those that said something."""
    if isinstance(value, Dropped):
        ignored.append((*path, re.sub(r"_\d{4}_?\d\d_?\d\d$", "", value.type)))  # web_search_20250305
    elif isinstance(value, BaseModel):
        extra = value.__pydantic_extra__ or {}
        ignored.extend((*path, name) for name, said in extra.items() if said)
        extra.clear()
        for name, item in value.__dict__.items():
            _take_out(item, (*path, name), ignored)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _take_out(item, (*path, str(index)), ignored)
