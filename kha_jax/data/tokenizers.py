"""Between text and token ids: bytes as they are, or what a `tokenizer.json` says."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Iterable, Mapping, Protocol, Sequence

import numpy as np

from kha_jax.config import ConfigError
from kha_jax.errors import DataError
from kha_jax.storage import open_regular

BYTES = "bytes"  # the name of the tokenizer that needs no file
FILE = "tokenizer.json"
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what open tokenizers end texts with
LARGEST = 2**28  # bytes of a tokenizer.json
CUT = re.compile(r"(?<=\w)(?=[ \n]\w)")  # before a single space or newline between two words
WORDS = "one of the first in the world, and it is to be for a\nreturn of that in x = 1"


class Tokenizer(Protocol):
    """Between text and ids.

    vocabulary_size: ids are below it. end_of_document: the id that ends each document and that no
    text encodes to. begin_of_document: the id that begins each, or None. fingerprint: which
    tokenizer it is. in_pieces: whether the ids of a text are those of its pieces, one after
    another, when it is cut where CUT says.
    """

    vocabulary_size: int
    end_of_document: int
    begin_of_document: int | None
    fingerprint: str
    in_pieces: bool

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of a text, [length] unsigned, without begin and end. Text that spells a special
        token is text.

        Raises:
            DataError: the text is not UTF-8, and the tokenizer knows no bytes.
        """
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Those of several texts at once."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids, and those that nothing stands for, are left out."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as they are, then <end of document>, then seven reserved ids so that the
    vocabulary divides by 8."""

    vocabulary_size = 264
    end_of_document = 256
    begin_of_document = None
    fingerprint = "bytes-v1"
    in_pieces = True

    def encode(self, text: bytes) -> np.ndarray:
        """[length] uint16 ids of a document, without its end."""
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Those of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the byte ids; special ids are dropped."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """What a `tokenizer.json` says, by the package `tokenizers` (extra: hf); a `Tokenizer`.

    Truncation, padding, dropout of merges and the special tokens that a post-processor adds are
    left out: documents are encoded as they are, and who writes them puts begin and end.

    Args:
        content: of the file.
        end, begin: tokens as they are spelt in the file, or their ids. end: by default the one of
            `ENDS` that the file has. begin: by default none.
        named: the file, for errors.

    Raises:
        ConfigError: an end or begin that the file does not have; it has none of `ENDS`, or several.
        DataError: the content is no tokenizer.
    """

    def __init__(
        self,
        content: bytes,
        end: str | int | None = None,
        begin: str | int | None = None,
        named: str = FILE,
    ):
        self.content, self.named = content, named
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.library, ids, self.in_pieces = _built(content, named)
        self.vocabulary_size = max(ids.values()) + 1
        self.end_of_document = self._id("end", _the_end(ids, named) if end is None else end, ids)
        self.begin_of_document = None if begin is None else self._id("begin", begin, ids)
        if self.begin_of_document == self.end_of_document:
            raise _unusable(named, f"begin={begin} is also what ends a document; leave it out")
        self._keep_apart(ids)

    def _id(self, role: str, token: str | int, ids: Mapping[str, int]) -> int:
        """The id of a token that a person has named."""
        if token in ids:
            return ids[token]
        if isinstance(token, int) and token in ids.values():
            return token
        known = ", ".join(name for name in _special(self.library)[:12]) or "none"
        raise _unusable(self.named, f"{role}={token} is no token of it; its special ones: {known}")

    def _keep_apart(self, ids: Mapping[str, int]) -> None:
        """Makes special tokens of begin and end, which text cannot spell then."""
        from tokenizers import AddedToken

        kept = (self.end_of_document, self.begin_of_document)
        spelt = [name for name, number in ids.items() if number in kept]
        self.library.add_special_tokens([AddedToken(name, normalized=False) for name in spelt])
        self.library.encode_special_tokens = True

    def encode(self, text: bytes) -> np.ndarray:
        """See `Tokenizer.encode`; uint32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """See `Tokenizer.encode_batch`; uint32. `tokenizers` decides on threads
        (TOKENIZERS_PARALLELISM)."""
        try:
            decoded = [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise DataError(f"a text for {self.named} is not UTF-8: {error}") from None
        encodings = self.library.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        known = [int(i) for i in ids if 0 <= i < self.vocabulary_size]
        return self.library.decode(known, skip_special_tokens=True)


def _built(content: bytes, named: str) -> tuple[Any, dict[str, int], bool]:
    """(the library's tokenizer, ids by token, whether it takes documents in pieces)."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            "tokenizer", "a tokenizer.json needs the extra: pip install -e '.[hf]'"
        ) from None
    try:
        library, values = tokenizers.Tokenizer.from_buffer(content), json.loads(content)
        library.no_truncation()
        library.no_padding()
        if values["model"].get("dropout"):  # by which a text has other ids each time
            library.model.dropout = None
        in_pieces = _takes_pieces(values) and _same_in_pieces(library)
    except Exception as error:  # the library raises nothing more exact
        raise DataError(f"{named} is no tokenizer.json: {error}") from None
    ids = library.get_vocab(with_added_tokens=True)
    if not ids:
        raise DataError(f"{named} is no tokenizer.json: it has no tokens")
    return library, ids, in_pieces


def _takes_pieces(values: Mapping[str, Any]) -> bool:
    """Whether words are found by what stands around them: nothing changes the text before, and a
    piece is not given a space of its own."""

    def parts(node: Any) -> Iterable[Mapping[str, Any]]:
        if isinstance(node, Mapping):
            yield node
        for below in node.values() if isinstance(node, Mapping) else node:
            if isinstance(below, (Mapping, list)):
                yield from parts(below)

    if values.get("normalizer") is not None or values.get("pre_tokenizer") is None:
        return False
    return not any(
        part.get("type") == "Metaspace" or part.get("add_prefix_space")
        for part in parts(values["pre_tokenizer"])
    )


def _same_in_pieces(library: Any) -> bool:
    """Whether common words, cut before each of the spaces between them, have the ids of the whole:
    some tokens reach over spaces."""

    def ids(text: str) -> list[int]:
        return library.encode(text, add_special_tokens=False).ids

    whole, places = ids(WORDS), [match.start() for match in CUT.finditer(WORDS)]
    return all(ids(WORDS[:at]) + ids(WORDS[at:]) == whole for at in places)


def _special(library: Any) -> list[str]:
    """Its special tokens, as they are spelt."""
    added = library.get_added_tokens_decoder()
    return [added[number].content for number in sorted(added) if added[number].special]


def _the_end(ids: Mapping[str, int], named: str) -> str:
    """The one token of `ENDS` that a file has."""
    found = [token for token in ENDS if token in ids]
    if len(found) == 1:
        return found[0]
    what = f"has {', '.join(found)}" if found else f"has none of {', '.join(ENDS)}"
    raise _unusable(named, f"{what}; say what ends a document")


def _unusable(named: str, problem: str) -> ConfigError:
    form = f"{named},end=<|endoftext|>,begin=<bos>"
    return ConfigError("tokenizer", f"{named}: {problem}, in the form {form} (begin is optional)")


def load(
    name: str | os.PathLike, end: str | int | None = None, begin: str | int | None = None
) -> Tokenizer:
    """The tokenizer that a person names: `bytes`, a tokenizer.json, or a folder that has one.

    end, begin: see JsonTokenizer; `bytes` takes none.

    Raises:
        ConfigError: there is no such file, it is another kind of file, `tokenizers` is not
            installed, or the end is not to be told.
        DataError: the file is no tokenizer.
    """
    if name == BYTES:
        if (end, begin) != (None, None):
            raise ConfigError("tokenizer", "bytes has an end of its own; leave out end and begin")
        return ByteTokenizer()
    path = Path(name, FILE) if os.path.isdir(name) else Path(name)
    if path.suffix == ".model":
        raise ConfigError(
            "tokenizer",
            f"{path}: sentencepiece models are not read; write its tokenizer.json with "
            "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT)",
        )
    try:
        content = read(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            "tokenizer", f"{str(path)!r}: {why}; use bytes, or name a tokenizer.json"
        ) from None
    return JsonTokenizer(content, end, begin, str(path))


def read(path: Path) -> bytes:
    """The content of a tokenizer.json.

    Raises:
        OSError, ValueError: it is none that is read.
    """
    with open_regular(path, "rb", largest=LARGEST) as file:
        return file.read()
