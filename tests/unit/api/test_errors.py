"""The error that a client gets."""

import pytest

from borg_serve.api.errors import ApiError, shown


def test_api_error_has_openais_fields() -> None:
    error = ApiError(404, "The model does not exist.", param="model", code="model_not_found")
    assert error.fields() == {
        "message": "The model does not exist.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ("a" * 40, '"' + "a" * 40 + '"'),
        ("a" * 41, '"' + "a" * 40 + '"…'),
        ('"\n', '"\\"\\n"'),
        ("\ud800", '"?"'),
        ([1] * 1000, "an array of 1000 items"),
        ({"a": 1}, "an object with 1 keys"),
        (10**60, "1" + "0" * 39),
    ],
)
def test_shown_shortens(value: object, text: str) -> None:
    assert shown(value) == text
