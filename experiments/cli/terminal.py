"""What commands print on: a terminal, pipe or file, which may go away before the command ends."""

import logging
import os
import sys
import textwrap
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from kha_jax.errors import StorageError

LINE = 80  # columns of a terminal that nobody has made wider
PIPE = 1000  # columns of what is no terminal: nothing is wrapped there
# The one console. It prints to what sys.stdout is at that moment, above a bar while there is one.
CONSOLE = Console(
    highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else PIPE
)


def spare() -> None:
    """What the program prints is not its product from here on: it goes on where it cannot."""
    if isinstance(sys.stdout, Terminal):
        sys.stdout.needed = False


def say(text: str) -> None:
    """Prints lines that may be copied: only the terminal wraps them."""
    CONSOLE.print(text, soft_wrap=True)


def show(table: Table) -> None:
    """Prints a table; where it is wider than the terminal, in parts that are not."""
    for part in parts(table, CONSOLE.width):
        CONSOLE.print(part)


def parts(table: Table, width: int) -> list[Table]:
    """The table, or where it is wider than that its columns in several, each with the first column
    to say whose row it is. Headers and words are wrapped before that, numbers are never."""
    if Measurement.get(CONSOLE, CONSOLE.options.update(max_width=PIPE), table).maximum <= width:
        return [table]
    first, *others = table.columns
    columns = [first]
    for index, column in enumerate(others):
        if sum(_least(one) + 3 for one in [*columns, column]) < width or columns == [first]:
            columns.append(column)
        else:
            return [_of(table, columns), *parts(_of(table, [first, *others[index:]]), width)]
    return [_of(table, columns)]


def _of(table: Table, columns: list[Column]) -> Table:
    """A table of these columns alone."""
    part = Table(title=table.title, caption=table.caption, box=table.box)
    for column in columns:
        wide = _least(column)
        header = textwrap.fill(str(column.header), wide, break_long_words=False)
        part.add_column(header, justify=column.justify, no_wrap=column.justify != "left")
    for cells in zip(*(column.cells for column in columns)):
        part.add_row(*cells)
    return part


def _least(column: Column) -> int:
    """The width that keeps words and numbers whole."""
    cells = list(map(str, column.cells))
    whole = " ".join(cells).split() if column.justify == "left" else cells
    return max(map(cell_len, [*whole, *str(column.header).split(), ""]))


class Log(logging.Handler):
    """The log, on what sys.stderr is at that moment: above a bar while there is one.

    prefix: of every line, also of the last one, which says why a command fails.
    """

    prefix = ""

    def emit(self, record: logging.LogRecord) -> None:
        kind = "error: " if record.levelno >= logging.ERROR else ""
        print(f"{Log.prefix}{kind}{self.format(record)}", file=sys.stderr, flush=True)


class Terminal:
    """A stream that may go away, as in `train | head -1`, or be full. Afterwards it leads nowhere;
    the lines that nobody saw are counted in `lost`.

    needed: the program is over then, without a word where its reader has left.

    Raises:
        StorageError: what is needed cannot be written.
    """

    def __init__(self, stream: Any, needed: bool = False):
        self.stream, self.needed, self.lost, self.gone = stream, needed, 0, False

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError) as error:
            self._leave(error)
        self.lost += self.gone * text.count("\n")
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._leave(error)

    def _leave(self, error: Exception) -> None:
        self.gone = True
        with open(os.devnull, "w") as nowhere:  # what is still buffered goes there
            os.dup2(nowhere.fileno(), self.stream.fileno())
        if not self.needed:
            return
        if isinstance(error, BrokenPipeError):
            sys.exit()
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"the output cannot be written: {reason}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
