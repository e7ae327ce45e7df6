"""Puts vLLM behind an identity that no request can remove, on one machine or on a Ray cluster."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("borg-serve")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
