"""Runs the Python blocks of a page, each as a program of its own: python examples.py PAGE.

Needs nothing of the repository but the page. Those that a text calls FILE.py are written to the
folder it runs in; one that reads a run is left out where that is not there.
"""

import re
import sys
from pathlib import Path

NAMED = re.compile(r"`(\w+\.py)`[^`]*:\n\n$")


def blocks(page: str) -> list[tuple[str, str]]:
    """(text before it since the last block, code) of every Python block."""
    parts = re.split(r"^```python\n(.*?)^```\n", page, flags=re.DOTALL | re.MULTILINE)
    return list(zip(parts[0::2], parts[1::2]))


def main(page: str) -> None:
    """Runs them."""
    for before, code in blocks(page):
        heading = (re.findall(r"^## (.*)$", before, re.MULTILINE) or ["and then"])[-1]
        missing = [run for run in re.findall(r'load\("(.*?)"\)', code) if not Path(run).exists()]
        left_out = f": left out, no {missing[0]}" if missing else ""
        print(f"--- {heading}{left_out}", flush=True)
        if named := NAMED.search(before):
            Path(named[1]).write_text(code)
        if not missing:
            exec(compile(code, heading, "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    sys.path.insert(0, "")
    main(Path(sys.argv[1]).read_text())
