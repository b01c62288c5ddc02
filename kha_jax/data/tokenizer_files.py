"""What stands beside ids, so that nobody reads them with another tokenizer: a tokenizer.json and
what it said of itself, in a folder of shards, a run folder, or below a URL."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, Mapping

from kha_jax.config import ConfigError
from kha_jax.data import tokenizers
from kha_jax.data.tokenizers import FILE, ByteTokenizer, JsonTokenizer, Tokenizer
from kha_jax.errors import DataError
from kha_jax.storage import Objects, is_url, read_json, replacing, write_json

IDS = "tokenizer_ids.json"  # what `about` says of it, where a run folder keeps a tokenizer
# Its ids tell whether a library tokenises as the one did that wrote the data: words, runs of
# digits and of spaces, code, accents, scripts without spaces, and special tokens spelt out.
PROBE = (
    "The 3 quick-brown foxes\n\tdidn't  jump: x += f(1234567890)  # naïve\r\n\n"
    "Größe 你好，мир 🙂 e\u0301 <|endoftext|></s><s>"
).encode()
ABOUT = {
    "tokenizer": str,
    "vocabulary_size": int,
    "end_of_document": int,
    "begin_of_document": int | None,
    "probe_ids": list,
}


@functools.lru_cache(maxsize=4)
def _kept(content: bytes, end: int, begin: int | None) -> JsonTokenizer:
    return JsonTokenizer(content, end, begin)


def about(tokenizer: Tokenizer) -> dict[str, Any]:
    """What is written beside ids, so that nobody reads them with another tokenizer: the keys of
    `ABOUT`."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "vocabulary_size": tokenizer.vocabulary_size,
        "end_of_document": tokenizer.end_of_document,
        "begin_of_document": tokenizer.begin_of_document,
        "probe_ids": tokenizer.encode(PROBE).tolist(),
    }


def kept(content: bytes | None, said: Mapping[str, Any], place: Any) -> Tokenizer:
    """The tokenizer that ids were written with.

    Args:
        content: of the tokenizer.json beside them, None where there is none.
        said: what `about` said then.
        place: where both stand, for errors.

    Raises:
        DataError: it is another one, or `tokenizers` of today gives other ids.
        ConfigError: `tokenizers` is not installed.
    """
    if said["tokenizer"] == ByteTokenizer.fingerprint:
        tokenizer: Tokenizer = ByteTokenizer()
    elif content is None:
        raise DataError(f"{place} lacks the {FILE} that its ids were written with")
    else:
        found = hashlib.sha256(content).hexdigest()
        if found != said["tokenizer"]:
            problem = f"is not the one of its ids: {found[:12]}, not {said['tokenizer'][:12]}"
            raise DataError(f"{place}/{FILE} {problem}; put that one back")
        try:
            tokenizer = _kept(content, said["end_of_document"], said["begin_of_document"])
        except ConfigError as error:
            if "extra" in error.problem:
                raise
            raise DataError(f"{place}: {error}") from None
    now = about(tokenizer)
    wrong = next((name for name in ABOUT if now[name] != said[name]), None)
    if wrong == "probe_ids":
        raise DataError(
            f"{place}: the tokenizer gives other ids for the probe text than when the data was "
            "written; install the version of `tokenizers` of then, or prepare the data again"
        )
    if wrong:
        raise DataError(f"{place}: {wrong} is {said[wrong]}, the tokenizer says {now[wrong]}")
    return tokenizer


def write_file(folder: Path, tokenizer: Tokenizer) -> None:
    """Its tokenizer.json, where it has one, as it was read.

    Raises:
        OSError: as the system says.
    """
    if isinstance(tokenizer, JsonTokenizer):
        with replacing(folder / FILE) as path, open(path, "xb") as file:
            file.write(tokenizer.content)
            file.flush()
            os.fsync(file.fileno())


def read_file(folder: Path | str) -> bytes | None:
    """The content of the tokenizer.json of a folder, or below a URL; None where there is none.

    Raises:
        DataError: it cannot be read.
        StorageError: a store does not answer.
    """
    try:
        if is_url(str(folder)):
            return Objects(str(folder)).read(FILE)
        return tokenizers.read(Path(folder) / FILE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{folder}/{FILE} cannot be read: {error.strerror}") from None


def keep(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer into a run folder, so that the run can be read where its data are not:
    its tokenizer.json, then what `about` says. One of another class than those here is not kept.

    Raises:
        OSError: as the system says.
    """
    if isinstance(tokenizer, JsonTokenizer) or type(tokenizer) is ByteTokenizer:
        write_file(folder, tokenizer)
        write_json(folder / IDS, about(tokenizer))


def read_kept(folder: Path) -> Tokenizer | None:
    """The tokenizer that a run folder keeps; None where it keeps none.

    Raises:
        DataError, ConfigError: see `kept`; a file is damaged.
    """
    try:
        said = read_json(folder / IDS)
        usable = isinstance(said, dict) and set(said) == set(ABOUT)
        if not usable or not all(isinstance(said[name], kind) for name, kind in ABOUT.items()):
            raise ValueError("holds other fields")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder / IDS} is damaged ({error}); put back that of the run") from None
    return kept(read_file(folder), said, folder)
