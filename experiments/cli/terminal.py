"""A terminal, pipe or file that a command writes to, which may go away before the command ends."""

import os
from typing import Any


class Terminal:
    """A stream that may go away, as in `train | head -1`, or be full, without stopping the program.
    Afterwards it leads nowhere; the lines that nobody saw are counted in `lost`."""

    def __init__(self, stream: Any):
        self.stream, self.lost, self.gone = stream, 0, False

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError):
            self._leave()
        self.lost += self.gone * text.count("\n")
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._leave()

    def _leave(self) -> None:
        self.gone = True
        with open(os.devnull, "w") as nowhere:  # what is still buffered goes there
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
