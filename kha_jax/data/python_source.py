"""Real text that every machine has: the source code of the interpreter's standard library, and of
what is installed beside it."""

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Iterator

from kha_jax.data.loader import DataConfig
from kha_jax.data.tokens import ByteTokenizer, TokenWindows, write_stream
from kha_jax.errors import DataError
from kha_jax.storage import cache_folder

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
INSTALLED = {"stdlib": "stdlib", "packages": "purelib"}  # root -> sysconfig's name of its folder


def _modules(root: Path) -> Iterator[Path]:
    """Python files below the folder; those left out are not even listed, since they may be many."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


class PythonSource(DataConfig):
    """One document a module, as bytes.

    The root `stdlib` is the interpreter's standard library; `packages` is what is installed beside
    it, 200 MB with all extras of this project, and not the same on two machines. A hash of a
    module's path holds it out or not, so the split is the same on every machine.
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
            usable = root in INSTALLED or Path(root).is_dir()
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
            DataError: when the interpreter ships no source, or the tokens were changed.
            StorageError: when the tokens cannot be written.
        """
        del seed
        modules = list(self._modules())
        if not modules:
            raise DataError(
                f"data.source=python_source found no module below {', '.join(self.roots)}; use an "
                "interpreter that ships its source"
            )
        listing = "\n".join(f"{name} {path.stat().st_size}" for name, path in modules)
        key = hashlib.sha256(
            f"{listing}\n{self.held_out}\n{ByteTokenizer.fingerprint}".encode()
        ).hexdigest()[:16]
        base = Path(self.cache_dir) if self.cache_dir else cache_folder("data")
        folder = base / f"python_source-{key}" / split
        if not (folder / "meta.json").exists():
            held_out = split == "validation"
            chosen = [p for name, p in modules if self._is_held_out(name) == held_out]
            write_stream(folder, (p.read_bytes() for p in chosen), self.tokenizer())
        return TokenWindows(folder, seq_len, self.tokenizer().fingerprint)

    def _modules(self) -> Iterator[tuple[str, Path]]:
        """(name, path) of every module; names below the first root are relative to it."""
        for number, root in enumerate(self.roots):
            folder = Path(sysconfig.get_path(INSTALLED[root]) if root in INSTALLED else root)
            prefix = f"{root}/" if number else ""
            for path in sorted(_modules(folder)):
                yield prefix + path.relative_to(folder).as_posix(), path

    def _is_held_out(self, name: str) -> bool:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < self.held_out * 2**32
