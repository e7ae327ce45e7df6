"""pydantic's validation errors in our words: where a value is in its document, and what is wrong with it.

It does not know what is validated: a profile or a client's request.
"""

from typing import Any

from pydantic_core import ErrorDetails

__all__ = ["path", "sentence"]

_SENTENCES = {
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


def sentence(detail: ErrorDetails) -> str:
    """Return what is wrong with the value, such as `must be at most 2`."""
    template = _SENTENCES.get(detail["type"])
    if template is None:
        message = detail["msg"].removeprefix("Value error, ")
        return message[:1].lower() + message[1:]
    context = detail.get("ctx", {}).items()
    return template.format(**{name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in context})


def path(detail: ErrorDetails, document: Any) -> list[str]:
    """Return the value's place in the document: pydantic's location without the union branches that it tried."""
    names: list[str] = []
    location = detail["loc"]
    for index, part in enumerate(location):
        inside = isinstance(document, dict) and part in document
        within = isinstance(document, list) and isinstance(part, int) and part < len(document)
        if inside or within:
            document = document[part]
            names.append(str(part))
        elif detail["type"] == "missing" and index == len(location) - 1:
            names.append(str(part))
    if detail["type"].startswith("union_tag"):
        names.append(detail["ctx"]["discriminator"].strip("'"))
    return names
