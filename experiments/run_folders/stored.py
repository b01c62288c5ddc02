"""Runs that are stored: their folders, configs and checkpoints, as commands read them."""

import json
import os
from pathlib import Path
from typing import Any

from experiments.cli.command_line import UsageError
from experiments.run_folders.identity import read_lineage
from kha_jax.config import from_dict
from kha_jax.training.run_config import with_new_names


def local_folder(flag: str, name: str | None) -> Path:
    """The folder that a flag names.

    Raises:
        UsageError: there is none, or it cannot be one of this machine.
    """
    if not name:
        raise UsageError(f"--{flag}: is required; name the folder of a run, such as runs/kha_tiny")
    if "://" in name:
        raise UsageError(
            f"--{flag}={name}: object stores are not supported yet; name a folder, which may be a "
            "mounted one"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"--{flag}={name!a}: the name is not UTF-8; rename the folder") from None
    return Path(name)


def run_folder(flag: str, name: str | None) -> Path:
    """The folder of a run that is there.

    Raises:
        UsageError: it is not.
    """
    folder = local_folder(flag, name)
    if not os.path.isfile(folder / "config.json"):  # False also where the name is no name
        raise UsageError(f"--{flag}={name}: no run there; it holds no config.json")
    return folder


def read_config(path: Path, cls: type) -> Any:
    """A config from the config.json of a run folder.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"holds a {type(values).__name__} and no fields")
        return from_dict(cls, with_new_names(values))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path}: is damaged ({error}); put back the one that the run was started with"
        ) from None


def read_run(workdir: str | None, step: int | None = None) -> tuple[Any, int, dict[str, Any]]:
    """(RunConfig, step, variables) of a checkpoint in a run folder, on one device; by default of
    the newest good one.

    Raises:
        UsageError: there is no such run or step.
        CheckpointError: the checkpoint is damaged.
    """
    import jax

    from kha_jax import sharding
    from kha_jax.runs.checkpoint import Checkpoints
    from kha_jax.runs.manifest import verify
    from kha_jax.training.run_config import RunConfig
    from kha_jax.training.step import make_trainer, variables

    folder = run_folder("workdir", workdir)
    config = read_config(folder / "config.json", RunConfig)
    accepts = read_lineage(folder, config)
    config = config.replace(mesh=sharding.MeshConfig())
    with Checkpoints(folder / "checkpoints", accepts=accepts) as checkpoints:
        if step is None:
            step = checkpoints.newest_good(set_aside=False)
        elif step not in checkpoints.steps():
            raise UsageError(f"--step={step}: not kept; {workdir} has {checkpoints.steps()}")
        else:
            verify(checkpoints.path(step), accepts)
        if step is None:
            raise UsageError(f"--workdir={workdir}: holds no checkpoint yet")
        state = make_trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1])).abstract
        return config, step, checkpoints.restore_part(step, variables(state))
