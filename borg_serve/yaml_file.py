"""Reads YAML as every file of this project is read: plain data, and each key of a mapping once.

It does not know what a document means.
"""

from pathlib import Path
from typing import IO, Any

import yaml

from borg_serve.errors import ConfigError, Problem

__all__ = ["RepeatedKeys", "parse", "read_yaml"]

MERGE = "tag:yaml.org,2002:merge"


class RepeatedKeys(yaml.YAMLError):
    """Keys that a mapping has twice; YAML would take the last one silently."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        self.found = found
        """(dotted key, `line 3 and line 9`) of each."""
        super().__init__("a key is given twice, in " + ", and in ".join(lines for _, lines in found))


def parse(source: str | IO[bytes]) -> Any:
    """What a YAML document holds. Raises yaml.YAMLError; from a file its text does not quote a line."""
    loader = yaml.SafeLoader(source)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        repeated: list[tuple[str, str]] = []
        _look(node, "", repeated, set())
        if repeated:
            raise RepeatedKeys(repeated)
        return loader.construct_document(node)
    except (ValueError, RecursionError) as error:  # a date that is none, bytes that are no text, a bottomless nesting
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def read_yaml(file: Path, cure: str) -> Any:
    """What a YAML file holds. Raises ConfigError; `cure` is for one that cannot be read."""
    try:
        with file.open("rb") as stream:
            return parse(stream)
    except OSError as error:
        raise ConfigError([Problem(str(file), f"cannot be read: {error.strerror}", str(file), cure)]) from None
    except RepeatedKeys as error:
        what, cure = "must be given once", "Remove one of them."
        raise ConfigError([Problem(f"{file}: {key}", what, lines, cure) for key, lines in error.found]) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Problem(str(file), f"is not YAML: {reason}", str(file), "Correct that line.")]) from None


def _look(node: yaml.Node, path: str, found: list[tuple[str, str]], seen: set[int]) -> None:
    """Find repeated keys in a node and below it, each node once: an alias may point to what it is part of."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _look(item, f"{path}[{index}]", found, seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name = f"{path}.{key.value}".lstrip(".") if isinstance(key, yaml.ScalarNode) else path
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if (key.tag, key.value) in lines:
                    found.append((name, f"line {lines[key.tag, key.value]} and line {line}"))
                lines.setdefault((key.tag, key.value), line)
            _look(value, name, found, seen)
