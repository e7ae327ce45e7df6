"""Whose KV blocks a request may find behind the identity's (I8): vLLM salts their hashes.

It knows keys and the fields in which clients name their users; nothing of blocks.
"""

import hashlib
import json
from typing import Any, Literal

from borg_serve.api import strict_json
from borg_serve.gate.keys import Key

__all__ = ["CacheScope", "cache_salt", "heeded"]

CacheScope = Literal["key", "user", "all"]
_USER_FIELDS = {"user", "safety_identifier", "metadata"}
"""Where the three protocols have a request's user; `metadata` is Messages', with `user_id`."""


def cache_salt(scope: CacheScope, key: Key | None, raw: bytes) -> str | None:
    """Return the salt of a request with this body, which is valid JSON; None where all share their blocks."""
    if scope == "all":
        return None
    who = [key.name if key is not None else ""]
    if scope == "user":
        who.append(_user(strict_json.decode(raw)))
    return hashlib.sha256(json.dumps(who).encode()).hexdigest()


def heeded(ignored: tuple[str, ...], scope: CacheScope) -> tuple[str, ...]:
    """Return the names of ignored fields without those that the salt depends on."""
    return tuple(name for name in ignored if name not in _USER_FIELDS) if scope == "user" else ignored


def _user(body: Any) -> str:
    """The first of the fields that names somebody, or ""."""
    metadata = body.get("metadata")
    named = [body.get("user"), body.get("safety_identifier")]
    named.append(metadata.get("user_id") if isinstance(metadata, dict) else None)
    return next((name for name in named if isinstance(name, str) and name), "")
