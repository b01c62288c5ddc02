"""Documents of a unit, one after another, each as UTF-8 bytes; a record that is none is named by
file and line. No more is in memory than the record that is read."""

import codecs
import functools
import json
import os
import zlib
from typing import IO, Any, Callable, Iterable, Iterator

from experiments.preparing.units import Part, Unit
from kha_jax.errors import DataError
from kha_jax.storage import open_regular

CHUNK = 2**20  # bytes that are read at once
PACKED_CHUNK = 2**12  # of what may be thousands of times as much
LONGEST = 2**30  # bytes of a document, or of the line that it stands in
LARGEST_FILE = 2**50
WINDOW = 2**31  # bytes that `zstd --long=31` looks back
BATCH = 2**21  # bytes of parquet's rows that are decoded at once
SAMPLES = 5  # bad records that are shown
JSON_TYPES = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}


class BadRecord(Exception):
    """Why a record is no document."""


class Damaged(Exception):
    """What is packed is cut or changed from here on."""


class Reader:
    """An iterator over the documents of a unit, and what it has met so far: `done` bytes of input,
    `bad` and `empty` records, which are left out, `samples` of the bad ones as `file:line: reason`,
    `nul` where a document holds NUL bytes.

    Raises:
        DataError: names the bad record that is one too many, or a file that cannot be read, has no
            such key, or was written to meanwhile.
    """

    def __init__(self, unit: Unit, text_key: str, skip_bad: int = 0):
        self.unit, self.text_key, self.skip_bad = unit, text_key, skip_bad
        self.done = self.bad = self.empty = 0
        self.samples: list[str] = []
        self.nul = ""

    def __iter__(self) -> Iterator[bytes]:
        forms = {"text": self._whole, "jsonl": self._lines, "parquet": self._rows}
        before = 0
        for part in self.unit:
            try:
                with open_regular(part.file.path, "rb", largest=LARGEST_FILE) as file:
                    _check_unchanged(part, file)
                    for text in forms[part.file.form](part, file):
                        self.done = before + min(part.size, max(0, file.tell() - part.begin))
                        self.empty += not text
                        if text:
                            yield text
                    _check_unchanged(part, file)
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"{part.file.path} cannot be read: {reason}") from None
            before += part.size
            self.done = before

    def _whole(self, part: Part, file: IO[bytes]) -> Iterator[bytes]:
        """A file that is one document."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        chunks, size, line = [], 0, 1
        try:
            for chunk in _chunks(part, file):
                size += len(chunk)
                _check_length(size)
                decoder.decode(chunk)
                chunks.append(chunk)
                line += chunk.count(b"\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            self._leave_out(part, line, _no_utf8(error))
        except (BadRecord, Damaged) as error:
            self._leave_out(part, line, error)
        else:
            yield self._noted(b"".join(chunks).removeprefix(codecs.BOM_UTF8), part, lambda: 1)

    def _lines(self, part: Part, file: IO[bytes]) -> Iterator[bytes]:
        """The lines of JSON that start in the part."""
        at = first = max(0, part.begin - 1)  # what the part before ends in is skipped
        file.seek(at)
        number, found, inside = 0, False, part.begin == 0
        try:
            for size, line in lines(_chunks(part, file)):
                start, at = at, at + size
                if not inside:
                    first, inside = at, True
                    continue
                if part.end is not None and start >= part.end:
                    return
                number += 1
                if not start and line:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line is not None and not line.strip():
                    continue
                found, unended = True, size == len(line or b"")
                given = [line]
                del line
                try:
                    text = self._parsed(given)
                except BadRecord as error:
                    ends = "; the file ends in this line" if unended else ""
                    self._leave_out(part, _line(part, file, first, number), f"{error}{ends}")
                else:
                    yield self._noted(
                        text, part, functools.partial(_line, part, file, first, number)
                    )
        except Damaged as error:
            self._leave_out(part, _line(part, file, first, number + 1), error)
        else:
            if not found and part.size == part.file.size:
                self._leave_out(part, 1, "the file holds no document")

    def _parsed(self, given: list[bytes | None]) -> bytes:
        """The text of an object of JSON. Its line, which alone is given, is taken away: a long one
        would be in memory three times beside the text, whose characters may have four bytes."""
        line = given.pop()
        if line is None:
            _check_length(LONGEST + 1)
        try:
            characters = line.decode()
            del line
            record = json.loads(characters)
            del characters
            text = record[self.text_key]
            return text.encode()
        except UnicodeDecodeError as error:
            raise BadRecord(_no_utf8(error)) from None
        except UnicodeEncodeError as error:
            found = ascii(error.object[error.start])
            raise BadRecord(f"{self.text_key!r} holds half a character, {found}") from None
        except json.JSONDecodeError as error:
            raise BadRecord(f"is no JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise BadRecord("is nested too deeply") from None
        except ValueError as error:  # a number of thousands of digits
            raise BadRecord(f"is no JSON that is read: {error}") from None
        except (AttributeError, IndexError, KeyError, TypeError):
            raise BadRecord(self._instead_of_text(record)) from None

    def _instead_of_text(self, record: Any) -> str:
        if not isinstance(record, dict):
            return f"is {_json_type(record)}, expected an object"
        if self.text_key not in record:
            keys = ", ".join(map(ascii, list(record)[:8])) or "none"
            return f"has no {self.text_key!r}; its keys: {keys}"
        return f"{self.text_key!r} is {_json_type(record[self.text_key])}, expected text"

    def _rows(self, part: Part, file: IO[bytes]) -> Iterator[bytes]:
        """The rows of parquet's row groups, a few at once."""
        import pyarrow
        from pyarrow import parquet

        number = 0
        try:
            table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**16)
            about = table.metadata
            groups = range(about.num_row_groups)[part.begin : part.end]
            number = sum(about.row_group(i).num_rows for i in range(part.begin))
            self._check_column(part, table.schema_arrow)
            for group in groups:
                rows = about.row_group(group)
                size = max(1, BATCH * rows.num_rows // max(1, rows.total_byte_size))
                for batch in table.iter_batches(
                    min(size, 2**16), [group], [self.text_key], use_threads=False
                ):
                    for value in _as_bytes(batch.column(0)):
                        number += 1
                        try:
                            text = _checked(value.as_py(), self.text_key)
                        except BadRecord as error:
                            self._leave_out(part, number, error)
                        else:
                            yield self._noted(text, part, functools.partial(int, number))
        except pyarrow.ArrowException as error:
            self._leave_out(part, number + 1, f"is no parquet that can be read: {error}")
        else:
            if not about.num_rows:
                self._leave_out(part, 1, "the file holds no document")

    def _check_column(self, part: Part, schema: Any) -> None:
        path, key = part.file.path, self.text_key
        if key not in schema.names:
            raise DataError(
                f"{path}: has no column {key!r}; its columns: {', '.join(schema.names)}"
            )
        kind = schema.field(key).type
        inner = getattr(kind, "value_type", kind)
        if str(inner) not in ("string", "large_string", "binary", "large_binary"):
            raise DataError(f"{path}: column {key!r} is {kind}, expected text")

    def _leave_out(self, part: Part, number: int, why: Any) -> None:
        """Counts a bad record.

        Raises:
            DataError: names it, where it is one too many.
        """
        self.bad += 1
        said = f"{part.file.path}:{number}: {why}"
        if len(self.samples) < SAMPLES:
            self.samples.append(said)
        if self.bad > self.skip_bad:
            raise DataError(too_many(said, self.skip_bad))

    def _noted(self, text: bytes, part: Part, number: Callable[[], int]) -> bytes:
        if not self.nul and b"\0" in text:
            self.nul = f"{part.file.path}:{number()}"
        return text


def too_many(said: str, skip_bad: int) -> str:
    """What is said of the bad record that ends the work."""
    if skip_bad:
        return f"{said}; it is one more than --skip_bad={skip_bad}"
    return f"{said}; --skip_bad=N leaves out up to N such records"


def lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(bytes with its end, the line without it) of each line; None in place of one that is longer
    than a document may be."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        size += len(first)
        held.append(first)
        for piece in others:
            yield size + 1, _joined(held, size)
            size = len(piece)
            held.append(piece)
        if size > LONGEST:
            held.clear()
    if size:
        yield size, _joined(held, size)


def _joined(pieces: list[bytes], size: int) -> bytes | None:
    """All of them, which nobody holds from then on."""
    whole = b"".join(pieces) if size <= LONGEST else None
    pieces.clear()
    return whole


def _chunks(part: Part, file: IO[bytes]) -> Iterator[bytes]:
    """The file from where it stands, unpacked.

    Raises:
        Damaged: what is packed cannot be unpacked, or is cut: also where the library would end
            there without a word.
    """
    if not part.file.packing:
        yield from iter(functools.partial(file.read, CHUNK), b"")
        return
    new_frame, errors = _unpacker(part.file.packing)
    frame = None
    while data := file.read(PACKED_CHUNK):
        while data := data if frame else data.lstrip(b"\0"):  # some pad what they write
            frame = frame or new_frame()
            try:
                yield frame.decompress(data)
            except errors as error:
                raise Damaged(f"is damaged here: {error}") from None
            data = frame.unused_data
            frame = None if frame.eof else frame
    if frame:
        raise Damaged("is cut here: what is packed has no end")


def _unpacker(packing: str) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes an object that unpacks one frame, and the error that it raises."""
    if packing == "gz":
        return functools.partial(zlib.decompressobj, 31), zlib.error
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW)
    return unpacker.decompressobj, zstandard.ZstdError


def _line(part: Part, file: IO[bytes], first: int, number: int) -> int:
    """The number in the file of a line of the part, whose first line starts at byte `first`. Lines
    before it are counted here, since nobody asks unless one is bad."""
    for at in range(0, first, CHUNK):
        number += os.pread(file.fileno(), min(CHUNK, first - at), at).count(b"\n")
    return number


def _as_bytes(column: Any) -> Any:
    """A column of text of any of Arrow's types, as bytes that nobody has checked."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    large = column.type in (pyarrow.large_string(), pyarrow.large_binary())
    return column.cast(pyarrow.large_binary() if large else pyarrow.binary())


def _checked(text: bytes | None, key: str) -> bytes:
    if text is None:
        raise BadRecord(f"{key!r} is null, expected text")
    _check_length(len(text))
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(_no_utf8(error)) from None
    return text


def _check_length(size: int) -> None:
    if size > LONGEST:
        raise BadRecord(f"is longer than {LONGEST / 2**30:g} GiB")


def _check_unchanged(part: Part, file: IO[bytes]) -> None:
    about = os.fstat(file.fileno())
    if (about.st_size, about.st_mtime_ns) != (part.file.size, part.file.changed):
        raise DataError(f"{part.file.path} was written to meanwhile; begin again")


def _no_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte {error.object[error.start]:#04x}"


def _json_type(value: Any) -> str:
    return JSON_TYPES.get(type(value), "a number" if isinstance(value, (int, float)) else "text")
