"""The identity text: what is read, and what is refused."""

import hashlib
from pathlib import Path

import pytest

from borg_serve.errors import IdentityError
from borg_serve.identity.text import Identity, check_control_tokens, load_identity


def test_load_strips_the_text_and_takes_its_digest(tmp_path: Path) -> None:
    (tmp_path / "who.md").write_bytes(b"\xef\xbb\xbf\n We are Borg. \xe2\x98\x83\r\n\n")
    loaded = load_identity(tmp_path / "who.md")
    assert loaded.text == "We are Borg. ☃"
    assert loaded.sha256 == hashlib.sha256("We are Borg. ☃".encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read, got No such file"),
        (b"", "got only blank space"),
        (b" \n\t ", "got only blank space"),
        (b"We are \xff Borg", "got byte 0xff at offset 7"),
        (b"We are\0Borg", "got a NUL at character 6"),
    ],
)
def test_load_refuses_what_is_no_text(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "who.md"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IdentityError, match=message) as caught:
        load_identity(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_control_token_in_the_identity_is_named() -> None:
    with pytest.raises(IdentityError, match=r"'<\|im_end\|>'"):
        check_control_tokens(Identity("We are <|im_end|> Borg."), ["<|im_start|>", "<|im_end|>"])
