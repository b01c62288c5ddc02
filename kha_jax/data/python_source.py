"""Real text that every machine has: the source code of the interpreter's standard library, and of
what is installed beside it."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sysconfig
import time
from pathlib import Path
from typing import Iterable, Iterator, Sequence

from kha_jax.data import tokenizer_files
from kha_jax.data.loader import DataConfig
from kha_jax.data.shard_files import META, VERSION, read_meta
from kha_jax.data.shard_writer import ShardWriter, write_meta
from kha_jax.data.shards import TokenWindows
from kha_jax.data.tokenizers import ByteTokenizer
from kha_jax.errors import DataError, StorageError
from kha_jax.storage import as_written, being_built, cache_folder, open_regular, write_json

LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "config",
}
Module = tuple[str, Path, os.stat_result]
TICK = 2 * 10**9  # nanoseconds between two times that every file system tells apart
LARGEST_MODULE = 2**28  # bytes
NAMED = 16  # characters of the hash that a folder's name has
SHOWN = 8  # folders that are left out, in the log
log = logging.getLogger("kha_jax")
INSTALLED = {"stdlib": "stdlib", "packages": "purelib"}  # root -> sysconfig's name of its folder


def _walk(root: Path) -> tuple[list[Path], list[Path]]:
    """(Python files below the folder, folders that are left out: they are not even listed, since
    they may be many). Links to folders are among those."""

    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error.strerror)

    modules, left_out = [], []
    for folder, below, names in os.walk(root, onerror=refuse):
        out = [n for n in below if n in LEFT_OUT or os.path.islink(os.path.join(folder, n))]
        left_out += [Path(folder, name).relative_to(root) for name in out]
        below[:] = [name for name in below if name not in out]
        modules += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(modules), left_out


def _unreadable(path: str | Path, why: str) -> DataError:
    return DataError(f"{str(path)!a} cannot be read: {why}; mend or remove it")


def _about(path: Path) -> os.stat_result:
    """What the system says of a module.

    Raises:
        DataError: it is no file, or one that nobody reads as text.
    """
    try:
        str(path).encode()
        about = path.stat()
    except UnicodeEncodeError:
        raise _unreadable(path, "its name is not UTF-8") from None
    except OSError as error:
        raise _unreadable(path, error.strerror) from None
    if not stat.S_ISREG(about.st_mode):
        raise _unreadable(path, "it is no regular file")
    return about


def _read(path: Path) -> bytes:
    try:
        with open_regular(path, "rb", largest=LARGEST_MODULE) as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error.strerror) from None


def _indexed(entry: Path, split: str) -> str:
    """The folder's name in an entry of the index; empty where there is none."""
    try:
        name = json.loads(entry.read_text())["folder"]
        return name if re.fullmatch(f"{split}-[0-9a-f]{{{NAMED}}}", name) else ""
    except (OSError, ValueError, TypeError, KeyError):
        return ""  # what is not indexed is read


def _add_to_index(entry: Path, folder: Path) -> None:
    with contextlib.suppress(OSError):  # the next run reads the modules again
        entry.parent.mkdir(exist_ok=True)
        write_json(entry, {"folder": folder.name})


def _settled(modules: Sequence[Module]) -> bool:
    """Whether a write from now on changes a time: one in the same tick as the last does not."""
    return max(of.st_ctime_ns for _, _, of in modules) < time.time_ns() - TICK


def write_shard(base: Path, split: str, documents: Iterable[bytes]) -> Path:
    """Tokenises documents into a folder of one shard below `base`, which appears complete or not at
    all, and is called after its tokens: SPLIT-HASH. One that is complete is left as it is.

    Raises:
        StorageError: the folder cannot be written.
    """
    tokenizer = ByteTokenizer()
    try:
        base.mkdir(parents=True, exist_ok=True)
        with being_built(base, split) as temporary:
            with ShardWriter(temporary, split, 0, tokenizer) as writer:
                for text in documents:
                    writer.add(tokenizer.encode(text), len(text))
                shard = writer.finish()
            write_meta(temporary, tokenizer, {split: [shard]})
            folder = base / f"{split}-{shard.sha256[:NAMED]}"
            _put_in_place(temporary, folder)
    except (OSError, StorageError) as error:
        why = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{base} cannot be written: {why}; name another place with KHA_JAX_CACHE or "
            "config.data.cache_dir"
        ) from None
    return folder


def _put_in_place(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:  # what another process has made in the meantime stays: it may be reading it
        if not (folder / META).exists():
            shutil.rmtree(folder)
            temporary.rename(folder)


def open_shard(folder: Path, split: str, seq_len: int) -> TokenWindows:
    """Windows of what `write_shard` has written.

    Its identity is the hash of its tokens, and the tokens after the last whole window are left out:
    both are as before there were shards, and runs that were published go by them.

    Raises:
        DataError: the folder holds something else than its name says.
    """
    meta, remedy = read_meta(folder), "remove the folder to make it again"
    shards = meta.shards[split]
    sha256 = shards[0].sha256 if len(shards) == 1 else ""
    if folder.name != f"{split}-{sha256[:NAMED]}":
        raise DataError(f"{folder} holds other tokens than its name says; {remedy}")
    if meta.about != tokenizer_files.about(ByteTokenizer()):
        raise DataError(f"{folder} was written with another tokenizer than bytes; {remedy}")
    source = TokenWindows(folder, meta, split, seq_len, tail=False, remedy=remedy)
    source.fingerprint = sha256
    return source


class PythonSource(DataConfig):
    """One document a module, as bytes.

    The root `stdlib` is the interpreter's standard library; `packages` is what is installed beside
    it, 200 MB with all extras of this project, and not the same on two machines. A hash of a
    module's path holds it out or not, so the split is the same on every machine. Tokens lie in the
    cache under the hash of what they are; an index finds them for modules that nobody has touched.
    """

    held_out: float = 0.03
    """Share of modules for validation, chosen by a hash of their paths."""
    cache_dir: str | None = None
    """Folder of the tokens; None: the user's cache folder ($KHA_JAX_CACHE moves it)."""
    roots: tuple[str, ...] = ("stdlib",)
    """Where modules are: `stdlib`, `packages` (what is installed beside it), or folders."""

    def validate(self):
        self.require(
            0 < self.held_out < 1, "held_out", f"must be between 0 and 1, found {self.held_out}"
        )

        remote = self.cache_dir is not None and "://" in self.cache_dir
        problem = f"object stores are not supported; name a folder, found {self.cache_dir}"
        self.require(not remote, "cache_dir", problem)
        for root in self.roots:
            usable = root in INSTALLED or os.path.isdir(as_written(root))
            names = ", ".join(INSTALLED)
            self.require(usable, "roots", f"must be {names} or folders, found {root!r}")
        once = len({*self.roots}) == len(self.roots) > 0
        self.require(once, "roots", f"must name each root once, found {self.roots}")

    def vocabulary_size(self) -> int:
        return ByteTokenizer.vocabulary_size

    def tokenizer(self) -> ByteTokenizer:
        return ByteTokenizer()

    def open(self, split: str, seq_len: int, seed: int) -> TokenWindows:
        """Windows of the `train` or `validation` modules; tokenised on first use. The seed has no
        part in real text.

        Raises:
            DataError: when the interpreter ships no source, a module cannot be read, or the tokens
                were changed.
            StorageError: when the tokens cannot be written.
        """
        del seed
        modules = list(self._modules(say=split == "train"))
        if not modules:
            raise DataError(
                f"data.source=python_source found no module below {', '.join(self.roots)}; use an "
                "interpreter that ships its source"
            )
        base = as_written(self.cache_dir) if self.cache_dir else cache_folder("data")
        base = base / f"python_shards-{VERSION}"
        entry = base / "index" / f"{self._listing(split, modules)}.json"
        folder = base / _indexed(entry, split)
        if not os.path.exists(folder / META):  # Path.exists raises in another user's folder
            held_out = split == "validation"
            chosen = [p for name, p, _ in modules if self._is_held_out(name) == held_out]
            if not chosen:
                raise DataError(
                    f"config.data.held_out={self.held_out}: leaves none of the {len(modules)} "
                    f"modules for {split}; choose another share, or more roots"
                )
            settled = _settled(modules)
            texts = map(_read, chosen)
            folder = write_shard(base, split, texts)
            if settled:
                _add_to_index(entry, folder)
        return open_shard(folder, split, seq_len)

    def _listing(self, split: str, modules: Sequence[Module]) -> str:
        """A hash of what says, short of reading all of them, that the modules are the same. A file
        that was written to has another time of change, which no program can set."""
        digest = hashlib.sha256(f"{split} {self.held_out} {ByteTokenizer.fingerprint}".encode())
        for name, path, of in modules:
            entry = name, str(path), of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino
            digest.update(f"{entry}\n".encode())
        return digest.hexdigest()

    def _modules(self, say: bool) -> Iterator[Module]:
        """Every module; names below the first root are relative to it. say: what is left out of
        folders of one's own."""
        for number, root in enumerate(self.roots):
            place = sysconfig.get_path(INSTALLED[root]) if root in INSTALLED else as_written(root)
            folder = Path(os.path.realpath(place))
            prefix = f"{root}/" if number else ""
            paths, left_out = _walk(folder)
            if say and left_out and root not in INSTALLED:
                shown = ", ".join(map(ascii, map(str, left_out[:SHOWN])))
                log.info("%s: left out %d folders: %s", root, len(left_out), shown)
            for path in paths:
                yield prefix + path.relative_to(folder).as_posix(), path, _about(path)

    def _is_held_out(self, name: str) -> bool:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < self.held_out * 2**32
