"""Cuts the input of prepare_data into units, by names and sizes alone.

A unit is what one process works on, what becomes one shard a split, and what is done again when a
run was killed in it; so the shards do not depend on how many processes there are.
"""

import glob
import importlib.util
import os
import stat
from typing import Iterable, Iterator, NamedTuple

from experiments.cli.codes import UsageError

SMALL = 2**26  # bytes of small files that share a unit
LARGE = 2**28  # bytes of a unit of a large file that can be cut
GROWTH = 4  # times that text is larger than what it is packed into
PACKINGS = {".gz": "gz", ".zst": "zst"}
FORMS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# What is read of a folder; a file that is named is read as text whatever its name.
TEXT = {
    *".adoc .asm .bash .bib .c .cc .cfg .clj .cmake .cpp .cs .css .cu .cuh .cxx .dart .el".split(),
    *".erl .ex .exs .f90 .go .h .hh .hpp .hs .htm .html .ini .java .jl .js .json .jsx".split(),
    *".kt .lean .lisp .lua .m .markdown .md .mjs .mk .ml .mli .nix .org .php .pl .pm .pod".split(),
    *".proto .ps1 .py .pyi .pyx .r .rb .rs .rst .s .scala .scm .scss .sh .sql .svelte".split(),
    *".swift .tcl .tex .text .toml .ts .tsx .txt .v .vim .vue .xml .yaml .yml .zig".split(),
}
BARE = {"copying", "dockerfile", "license", "makefile", "readme"}  # names without a suffix
NEEDS = {"parquet": "pyarrow", "zst": "zstandard"}


class File(NamedTuple):
    """A file of the input. form: text (one document), jsonl or parquet; packing: "", gz or zst."""

    path: str
    form: str
    packing: str
    size: int
    changed: int  # nanoseconds

    @property
    def cuttable(self) -> bool:
        """Whether several units may be made of it."""
        return not self.packing and self.form != "text"


class Part(NamedTuple):
    """A file in a unit: all of it, or of jsonl the lines that start at bytes [begin, end), of
    parquet the row groups [begin, end). size: bytes of input, for the progress."""

    file: File
    size: int
    begin: int = 0
    end: int | None = None


Unit = tuple[Part, ...]


def kind_of(path: str) -> tuple[str, str]:
    """(form, packing) that a name says."""
    stem, suffix = os.path.splitext(path.lower())
    packing = PACKINGS.get(suffix, "")
    suffix = os.path.splitext(stem)[1] if packing else suffix
    return FORMS.get(suffix, "text"), packing


def find(patterns: Iterable[str]) -> tuple[list[File], int]:
    """The files that these names, folders and globs mean, in their order, each once; and how many
    were left out of the folders since their names are not those of text.

    Raises:
        UsageError: one of them means no file, or a package is missing to read it.
    """
    found: dict[str, File] = {}
    left_out = 0
    for pattern in patterns:
        exact = os.path.exists(pattern) or not glob.has_magic(pattern)
        paths = [pattern] if exact else sorted(glob.glob(pattern, recursive=True))
        below = [item for path in paths for item in _below(path)]
        wanted = [path for path, is_read in below if is_read]
        left_out += len(below) - len(wanted)
        for path in wanted:
            found[path] = found.get(path) or _file(path)
        if not wanted:
            raise UsageError(f"--input={pattern}: means no file that is read")
    _check_packages(found.values())
    return list(found.values()), left_out


def _below(path: str) -> Iterator[tuple[str, bool]]:
    """Files with whether they are read: the file that is named, or those in the folder. What begins
    with a dot is not looked at."""
    if not os.path.isdir(path):
        yield path, True
        return
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            inner = os.path.join(folder, name)
            yield inner, _is_read(name) and os.path.isfile(inner)  # and not a link to nowhere


def _is_read(name: str) -> bool:
    form, packing = kind_of(name)
    stem = os.path.splitext(name)[0] if packing else name
    suffix = os.path.splitext(stem)[1].lower()
    return form != "text" or suffix in TEXT or stem.lower() in BARE


def _file(path: str) -> File:
    try:
        about = os.stat(path)
    except OSError as error:
        raise UsageError(f"--input: {path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(about.st_mode):
        raise UsageError(f"--input: {path} is no regular file")
    return File(path, *kind_of(path), about.st_size, about.st_mtime_ns)


def _check_packages(files: Iterable[File]) -> None:
    for kind in {kind for file in files for kind in (file.form, file.packing)} & set(NEEDS):
        if importlib.util.find_spec(NEEDS[kind]) is None:
            raise UsageError(f"--input: .{kind} needs the extra: pip install -e '.[data]'")


def cut(files: Iterable[File]) -> list[Unit]:
    """Small files share units in their order; of a large one each unit has a part, where it can be
    cut."""
    units: list[Unit] = []
    held: list[Part] = []
    room = SMALL
    for file in files:
        weight = file.size * (GROWTH if file.packing else 1)
        if held and weight > room:
            units.append(tuple(held))
            held, room = [], SMALL
        if weight > SMALL:
            units += [(part,) for part in _parts(file)]
        else:
            held.append(Part(file, file.size))
            room -= weight
    return units + [tuple(held)] * bool(held)


def _parts(file: File) -> list[Part]:
    """The parts that a large file is cut into."""
    if not file.cuttable:
        return [Part(file, file.size)]
    if file.form == "parquet":
        return _row_groups(file)
    begins = range(0, file.size, LARGE)
    ends = [*begins[1:], file.size]
    return [Part(file, end - begin, begin, end) for begin, end in zip(begins, ends)]


def _row_groups(file: File) -> list[Part]:
    """Row groups of up to LARGE bytes of values; of a file that is no parquet all, whose reader
    says why."""
    import pyarrow
    from pyarrow import parquet

    try:
        about = parquet.read_metadata(file.path)
    except (pyarrow.ArrowException, OSError):
        return [Part(file, file.size)]
    sizes = [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]
    parts, begin = [], 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or sum(sizes[begin : end + 1]) > LARGE:
            share = sum(sizes[begin:end]) / max(1, sum(sizes))
            parts.append(Part(file, int(file.size * share), begin, end))
            begin = end
    return parts or [Part(file, file.size)]
