"""A Ray Serve application: replicas of the whole server behind one address. Deploy files name `build`."""

from typing import Any

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    """Import `build` on first use: the router's process needs neither it nor vLLM."""
    if name != "build":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from borg_serve.cluster.app import build

    return build
