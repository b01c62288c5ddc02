"""What is done with the texts of a unit before they are encoded: which split each belongs to, and
batches of them that are small whatever their lengths."""

import hashlib
import re
from typing import Iterable, Iterator, NamedTuple

from kha_jax.data.tokenizers import CUT

BATCH = 2**18  # bytes of text that are encoded at once, where no document is longer
PIECE = 2**20  # bytes above which a document is encoded in pieces
TEXTS = 2**13  # of a batch
KEY = b"kha_jax: which split a document belongs to"
KEY_BYTES = 16
SEARCHED = 2**12, 2**16, PIECE  # bytes before a piece must end, where a place to cut is looked for
# Words that are found by what stands around them are the same before and after such a cut: before a
# single space or newline between two words, else after a newline between two characters.
PLACES = CUT, re.compile(r"(?<=\S\n)(?=\S)")


def key_of(text: bytes) -> bytes:
    """A keyed hash of a document's text: equal ones have equal keys, wherever they stand."""
    return hashlib.blake2b(text, digest_size=KEY_BYTES, key=KEY).digest()


def within(key: bytes, share: float) -> bool:
    """Whether a key is among this share of all keys: of two shares the smaller one is in the
    larger."""
    return int.from_bytes(key[:8]) < share * 2**64


def pieces(text: bytes, size: int) -> Iterator[bytes]:
    """A text, cut where its ids are those of the pieces, one after another (`in_pieces` of a
    tokenizer says whether there are such places). Where there is none in `size` bytes it is cut
    between two characters."""
    begin = 0
    while len(text) - begin > size:
        end = _place(text, begin, begin + size)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _place(text: bytes, begin: int, end: int) -> int:
    """The last good place of the text within the bytes [begin, end]."""
    for pattern in PLACES:
        for searched in SEARCHED:
            start = _character(text, max(begin, end - searched))
            window = text[start:end].decode(errors="ignore")  # what is cut off is at its end
            places = [match.start() for match in pattern.finditer(window)]
            if places and (place := start + len(window[: places[-1]].encode())) > begin:
                return place
    return _character(text, end)


def _character(text: bytes, at: int) -> int:
    """Where the character begins that holds this byte."""
    while at and text[at] & 0xC0 == 0x80:
        at -= 1
    return at


class Batch(NamedTuple):
    """Texts of a split that are encoded at once: whole documents, or one piece of a long one.
    last: no piece of the same document follows."""

    split: str
    texts: list[bytes]
    piece: bool = False
    last: bool = True


def batches(documents: Iterable[tuple[str, bytes]], in_pieces: bool) -> Iterator[Batch]:
    """(split, text) of documents, in batches of at most BATCH bytes or of one document;
    those of a split stay in their order. One of more than PIECE bytes comes in pieces, or alone
    where it must not be cut."""
    held: dict[str, list[bytes]] = {}
    sizes: dict[str, int] = {}
    for split, text in documents:
        texts = held.setdefault(split, [])
        size = sizes.get(split, 0) + len(text)
        if texts and (size > BATCH or len(texts) == TEXTS):
            yield Batch(split, texts)
            texts, size = [], len(text)
        if len(text) > PIECE and in_pieces:
            yield from _in_pieces(split, text)
            size = 0
        else:
            texts.append(text)
        held[split], sizes[split] = texts, size
    for split, texts in held.items():
        if texts:
            yield Batch(split, texts)


def _in_pieces(split: str, text: bytes) -> Iterator[Batch]:
    left = len(text)
    for piece in pieces(text, PIECE):
        left -= len(piece)
        yield Batch(split, [piece], piece=True, last=not left)
