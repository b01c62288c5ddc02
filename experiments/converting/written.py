"""Run folders that hold weights alone, made of another run or of a stock checkpoint."""

import contextlib
import shutil
from pathlib import Path
from typing import Any, Iterable, Iterator

import jax

from experiments.cli.codes import STORAGE, UsageError, code_of
from experiments.run_folders import stored
from kha_jax.config import to_dict
from kha_jax.convert import nested
from kha_jax.data import tokenizer_files, tokenizers
from kha_jax.errors import StorageError
from kha_jax.inference.dialect import STOCK
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.manifest import WEIGHTS
from kha_jax.storage import being_built, writable, write_json
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import config_hash, write_registrations


def new_folder(name: str | None) -> Path:
    """The folder of --out, tried before there is work to lose and left as it was.

    Raises:
        UsageError: it holds something, or cannot be written.
    """
    out = stored.own_folder("out", name)
    try:
        if any((out / "checkpoints").glob("*")):
            raise UsageError(f"--out={out}: already holds checkpoints; name another folder")
        if there := out.exists():
            for one in out.iterdir():
                raise UsageError(f"--out={out}: already holds {one.name}; name another folder")
        try:
            writable(out)
        finally:
            if not there and out.is_dir():
                out.rmdir()
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error.strerror}") from None
    return out


@contextlib.contextmanager
def being_written(out: Path) -> Iterator[Path]:
    """A folder to fill, which is that of --out at the end of the block: what is there is whole.

    Raises:
        UsageError: it cannot be written.
        StorageError: it is the machine that does not let it: a full disk.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with being_built(out.parent, out.name) as made:
            yield made
            made.rename(out)
    except OSError as error:
        problem = f"--out={out} cannot be written: {error.strerror}"
        kind = StorageError if code_of(error) == STORAGE else UsageError
        raise kind(problem) from None


def carry(source: Path, made: Path) -> None:
    """Copies what a run keeps beside its checkpoints and another one made of it needs: its
    tokenizer, and what came with stock weights."""
    for name in (tokenizers.FILE, tokenizer_files.IDS):
        if (source / name).is_file():
            shutil.copyfile(source / name, made / name)
    if (source / STOCK).is_dir():
        shutil.copytree(source / STOCK, made / STOCK)


def write_run(
    folder: Path,
    config: RunConfig,
    step: int,
    leaves: Iterable[tuple[str, jax.Array]],
    about: dict[str, Any],
) -> None:
    """Fills the folder of a run with a checkpoint of weights alone, for which `train` makes an
    optimiser.

    leaves: with their paths, such as params/embedding; taken one after another. about: what the
    manifest says besides.
    """
    told = {**about, "config": config_hash(config), "holds": WEIGHTS}
    write_registrations(folder, config)
    write_json(folder / "config.json", to_dict(config))
    with Checkpoints(folder / "checkpoints", about=lambda step: told) as checkpoints:
        checkpoints.save(step, nested(leaves), copy=False)
