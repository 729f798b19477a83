"""Reads a YAML file into plain values, and remembers on which line each of them stands.

Plain scalars mean what they mean in JSON (and YAML 1.2): ``64:8``, ``yes`` and ``none`` are strings, while
YAML 1.1, which PyYAML resolves by, makes 3848 and True of the first two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcab_plugin.errors import LcabError

_WORDS: dict[str, Any] = {"null": None, "~": None, "": None, "true": True, "false": False}

Place = tuple[str | int, ...]  # of a value: the keys and indices that lead to it


@dataclass
class Document:
    """``value`` of a file, and the ``lines`` (from 1) of what is in it: of a mapping's entry, its key's."""

    path: Path
    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)

    def at(self, place: Place) -> str:
        """Where that is, or the nearest thing around it, for an error message."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}, line {self.lines.get(place, 1)}"


def read(path: Path) -> Document:
    """The values of a YAML or JSON file.

    Raises:
        LcabError: it cannot be read, is not YAML, or names a key twice.
    """
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise LcabError("a study file is YAML, and PyYAML is not here: pip install PyYAML.") from None
    try:
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise LcabError(f"cannot read {path}: {error.strerror}; give the path of a study file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise LcabError(f"{path}{line} is not YAML: {getattr(error, 'problem', None) or error}.") from None
    document = Document(path)
    document.value = _value(node, (), document)
    return document


def _value(node: Any, place: Place, document: Document) -> Any:
    """What a node of PyYAML's tree stands for."""
    import yaml

    if node is None:
        return None
    document.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*place, i), document) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, item in node.value:
            name = str(key.value)
            if name in found:
                raise LcabError(f"{document.path}, line {key.start_mark.line + 1}: {name!r} is given twice.")
            document.lines[(*place, name)] = key.start_mark.line + 1
            found[name] = _value(item, (*place, name), document)
        return found
    return node.value if node.style else _plain(node.value)


def _plain(text: str) -> Any:
    """The value of a scalar without quotes."""
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
