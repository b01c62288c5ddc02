"""Folders of stored runs, as flags name them."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli.codes import UsageError
from kha_jax.errors import StorageError
from kha_jax.storage import READ, WRITTEN, as_written, fetch, is_url, mirror

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from kha_jax.inference.dialect import Dialect
    from kha_jax.training.run_config import RunConfig
    from kha_jax.training.run_folder import StoredRun


def local_folder(flag: str, name: str | None) -> Path:
    """The folder that a flag names.

    Raises:
        UsageError: there is none, or it cannot be one of this machine.
    """
    if name is None:
        raise UsageError(f"--{flag}: is required; name the folder of a run, such as runs/kha_tiny")
    if not name.strip():
        raise UsageError(f"--{flag}={name}: names no folder; is a variable of the shell not set?")
    if is_url(name):
        raise UsageError(
            f"--{flag}={name}: object stores are not supported here; name a folder, which may be a "
            "mounted one"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"--{flag}={name!a}: the name is not UTF-8; rename the folder") from None
    return as_written(name)


def own_folder(flag: str, name: str | None) -> Path:
    """The folder that a flag names for what is to be written.

    Raises:
        UsageError: it cannot be one of this machine, or lies in the checkpoints of a run.
    """
    folder = local_folder(flag, name)
    whole = folder.absolute()
    for inner in (whole, *whole.parents):
        if inner.name == "checkpoints" and os.path.isfile(inner.parent / "config.json"):
            problem = f"lies in the checkpoints of the run {inner.parent}"
            raise UsageError(f"--{flag}={name}: {problem}; name that run, or another folder")
    return folder


def trained_folder(flag: str, name: str) -> Path:
    """The folder of a run that is to be trained: one of this machine, or the mirror of one in a
    bucket, which holds nothing yet.

    Raises:
        UsageError: it can be neither.
    """
    return _mirror(flag, name, WRITTEN) if is_url(name) else own_folder(flag, name)


def readable_folder(flag: str, name: str | None) -> Path:
    """The folder that a flag names to be read: one of this machine, or the mirror of one in a
    bucket, with what the bucket holds now.

    Raises:
        UsageError: it can be neither.
        StorageError: the bucket cannot be read.
    """
    if name is None or not is_url(name):
        return local_folder(flag, name)
    folder = _mirror(flag, name, READ)
    fetch(folder)
    return folder


def _mirror(flag: str, name: str, use: str) -> Path:
    try:
        folder = mirror(name, use)
    except StorageError as error:
        raise UsageError(f"--{flag}={error}") from None
    if importlib.util.find_spec("gcsfs") is None:
        raise UsageError(f"--{flag}={name}: needs the extra: pip install -e '.[gcs]'")
    return folder


def run_folder(flag: str, name: str | None) -> Path:
    """The folder of a run that is there.

    Raises:
        UsageError: it is not.
    """
    folder = readable_folder(flag, name)
    if not os.path.isfile(folder / "config.json"):  # False also where the name is no name
        raise UsageError(f"--{flag}={name}: no run there; it holds no config.json")
    return folder


def read_run(
    workdir: str | None, step: int | None = None, mesh: "Mesh | None" = None
) -> "StoredRun":
    """A checkpoint of the run that --workdir names; see `kha_jax.training.run_folder.read_run`.

    Raises:
        UsageError: none is named, or it is not there.
    """
    from kha_jax.training.run_folder import read_run

    return read_run(run_folder("workdir", workdir), step, mesh)


def dialect_of(workdir: str, folder: Path, config: "RunConfig") -> "Dialect":
    """How the text of a run that --workdir names is spelt.

    Raises:
        UsageError: it was not trained on text, or its tokenizer is not its model's.
    """
    from kha_jax.inference import dialect
    from kha_jax.training.run_folder import read_tokenizer

    tokenizer = read_tokenizer(folder, config)
    if tokenizer is None:
        raise UsageError(
            f"--workdir={workdir}: was trained on {type(config.data).__name__}, which is not text"
        )
    if tokenizer.vocabulary_size > config.model.vocabulary_size:
        raise UsageError(
            f"--workdir={workdir}: its tokenizer has {tokenizer.vocabulary_size:,} ids, its model "
            f"{config.model.vocabulary_size:,}"
        )
    return dialect.read(folder, tokenizer)
