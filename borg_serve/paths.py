"""Paths and addresses as a profile writes them, and our folders by the XDG Base Directory specification.

It does not know what lies there.
"""

import os
import re
from pathlib import Path
from string import Template

__all__ = ["absolute_url", "cache_directory", "expand", "expand_url", "hide_password", "state_directory"]

SQLITE = re.compile(r"^(sqlite[^:/]*:///)([^:].*)", re.DOTALL)
PASSWORD = re.compile(r"(?<=://)([^/:@]*):.*@")


def expand(path: str) -> str:
    """A path with `~`, `$NAME` and `${NAME}` replaced; `$$` is `$`. Raises ValueError where a variable is not set."""
    try:
        return os.path.expanduser(Template(path).substitute(os.environ))
    except KeyError as error:
        raise ValueError(f"needs the environment variable {error.args[0]}, which is not set") from None


def expand_url(url: str) -> str:
    """An address with its variables replaced, and `~` after `sqlite:///`. Raises ValueError as `expand` does."""
    return SQLITE.sub(lambda found: found[1] + os.path.expanduser(found[2]), expand(url))


def absolute_url(url: str, folder: Path) -> str:
    """An address whose relative path after `sqlite:///` starts at `folder`."""
    return SQLITE.sub(lambda found: f"{found[1]}{folder / found[2]}", url)


def hide_password(value: object) -> object:
    """A value for a message; an address without its password."""
    return PASSWORD.sub(r"\1:***@", value) if isinstance(value, str) else value


def cache_directory() -> Path:
    """Our folder in the user's cache."""
    return _directory("XDG_CACHE_HOME", ".cache")


def state_directory() -> Path:
    """Our folder of what outlives a restart and is of no use elsewhere."""
    return _directory("XDG_STATE_HOME", ".local/state")


def _directory(variable: str, default: str) -> Path:
    """The specification ignores a relative path."""
    configured = Path(os.environ.get(variable, ""))
    return (configured if configured.is_absolute() else Path.home() / default) / "borg-serve"
