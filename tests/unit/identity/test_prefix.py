"""The identity's tokens where no real tokenizer is needed."""

from typing import Any

import pytest

from borg_serve.errors import IdentityError
from borg_serve.identity.prefix import token_prefix
from borg_serve.identity.text import Identity


def test_token_prefix_refuses_a_tokenizer_whose_tokens_depend_on_the_rest() -> None:
    class ByLength:
        def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
            return [len(text), *map(ord, text)]

    who = Identity("We are Borg.")

    def render(messages: Any, tools: Any) -> str:
        return who.text + "".join(message["content"] for message in messages)

    with pytest.raises(IdentityError, match=r"tokenizer: .* ends within 'Borg\.'"):
        token_prefix(render, ByLength(), who)
