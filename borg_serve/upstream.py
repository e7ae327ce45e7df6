"""The pinned vLLM and Ray, and one clear error where they have moved what this package stands on.

It knows their versions, not what they do. docs/upstream.md lists every name that may move.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from borg_serve.errors import EngineError

__all__ = ["PINS", "moved", "pinned", "require"]

PINS = {"vllm": ("vLLM", "0.32.0"), "ray": ("Ray", "2.60.0")}
"""Top-level module: the library's name and its version, as in pyproject.toml."""


@contextmanager
def pinned(where: str) -> Iterator[None]:
    """Import private names of vLLM or Ray in this block. Raises EngineError if one of them has moved."""
    try:
        yield
    except ImportError as error:
        module = error.name or ""
        library = module.partition(".")[0]
        if library not in PINS or (isinstance(error, ModuleNotFoundError) and module == library):
            raise  # another library, or one that is not installed
        missing = re.match(r"cannot import name '(\w+)'", str(error))
        raise moved(where, library, f"{module}.{missing[1]}" if missing else module) from error


def require(where: str, owner: type, *names: str) -> None:
    """Check that a class of vLLM's or Ray's still has these names. Raises EngineError if one has moved."""
    library = owner.__module__.partition(".")[0]
    for name in names:
        if not hasattr(owner, name):
            raise moved(where, library, f"{owner.__name__}.{name}")


def moved(where: str, library: str, name: str, got: str = "none") -> EngineError:
    """The error for a name that is not where the pinned `library` (a key of PINS) has it."""
    title, version = PINS[library]
    return EngineError(f"{where}: {title} moved {name}, got {got}. Use the pinned {title} {version}.")
