"""What somebody may have meant who typed a name that is not known."""

import difflib
import os
from pathlib import Path
from typing import Any, Iterator

NEAR = 0.85  # likeness of two names of which one is a slip


def config_file(path: str, configs: Path) -> str:
    """The file of the folder `configs` that a path nearly names."""
    known = [file.stem for file in configs.glob("[a-z]*.py")]
    close = difflib.get_close_matches(Path(path).stem, known, n=1, cutoff=0.7)
    if not close:
        return f"configs are in {configs}"
    return f"did you mean {os.path.relpath(configs)}/{close[0]}.py?"


def nested(config: Any, path: str) -> str:
    """The field that a path means which leaves groups out, or takes only the initials of its last
    name: config.optimizer.learning_rate for lr. The least deep one of that very name, and the least
    deep one of nearly that name; nothing where there is neither."""
    *groups, last = path.split(".")
    found: dict[bool, str] = {}
    for field in sorted(_fields(config), key=lambda field: field.count(".")):
        *above, name = field.split(".")
        passed = iter(above)  # `in` goes on where it has found the one before
        if _alike(last, name) and all(group in passed for group in groups):
            found.setdefault(last == name, f"config.{field}")
    return " or ".join(found.values())


def _alike(typed: str, name: str) -> bool:
    """Whether a name is meant, but for a slip, or by its initials."""
    initials = "".join(word[0] for word in name.split("_"))
    close = difflib.SequenceMatcher(None, typed, name).ratio() > NEAR
    return close or (typed == initials and len(initials) > 1)


def _fields(node: Any) -> Iterator[str]:
    """The dotted path of every single value below."""
    for name in node.keys():
        inner = node[name]
        if hasattr(inner, "keys"):
            yield from (f"{name}.{below}" for below in _fields(inner))
        else:
            yield name
