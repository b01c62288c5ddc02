"""Lists the commands, or runs one.

python -m experiments
python -m experiments train --config=configs/kha_tiny.py
"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

from experiments.cli.terminal import Terminal
from kha_jax.errors import StorageError


def commands() -> dict[str, str]:
    """Each command with the first line of its docstring, read without importing it."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    return {
        file.stem: ast.get_docstring(ast.parse(file.read_text())).split("\n")[0] for file in files
    }


def main() -> int | None:
    """See the module's docstring."""
    known, typed = commands(), sys.argv[1:2]
    if not typed or typed[0].startswith("-"):
        sys.stdout = Terminal(sys.stdout, needed=True)
        try:
            for name, line in known.items():
                print(f"python -m experiments.{name:12} {line}")
            sys.stdout.flush()
        except StorageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 74
        return 0
    if typed[0] not in known:
        near = difflib.get_close_matches(typed[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"
        print(f"error: {typed[0]}: is no command; {hint}", file=sys.stderr)
        return 2
    sys.argv[:2] = [f"experiments.{typed[0]}"]
    runpy.run_module(f"experiments.{typed[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
