"""What a run folder holds, as whoever reads it needs it: the config, what the run has been, where
its kinds were registered, and the variables of a checkpoint.

`config.json` is the config; `lineage.json` what the run has been since it began; `registered.json`,
where the config has kinds of your own, the modules that register them.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import jax
from jax.sharding import Mesh

from kha_jax.config import Config, choices_in, departures, dotted, from_dict, to_dict
from kha_jax.data import tokenizer_files
from kha_jax.errors import DataError, RunError
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.runs import faults
from kha_jax.storage import is_file, opened, read_json, rename, write_json
from kha_jax.training.run_config import RunConfig, old_name, with_new_names

# Fields that may change on resume: they decide what is recorded, not what is learnt.
FREE = (
    "evaluation.",
    "checkpoint.",
    "profile.",
    "mesh.",
    "max_nonfinite_steps",
    "hang_timeout",
    "data.cache_dir",
    "data.folder",  # identity is the fingerprint of what it holds
    "model.attention.kernel",
)
IDENTITY = ("config", "data", "validation", "tokenizer")
LATER = {"validation"}  # what entries of older folders lack: unknown, and taken for equal
CONFIG, NEXT, LINEAGE = "config.json", "config.next.json", "lineage.json"
REGISTERED = "registered.json"


class StoredRun(NamedTuple):
    """A checkpoint of a run, on one device or on a mesh."""

    config: RunConfig
    step: int
    variables: dict[str, Any]


def load(folder: str | os.PathLike, step: int | None = None) -> tuple[Any, dict[str, Any], Any]:
    """(config, variables, tokenizer) of a trained run, by default of its newest good checkpoint.

    config: of the model, which with the variables is what `Decoder` takes. tokenizer: between text
    and ids; None where the run was not trained on text. Kinds of your own are imported from where
    the run registered them, which runs that file.

    Raises:
        RunError: there is no such run or step, or it cannot be read.
        DataError: config.json is not the one that the run was trained with.
        CheckpointError: the checkpoint is damaged.
    """
    folder = opened(folder)
    run = read_run(folder, step)
    return run.config.model, run.variables, read_tokenizer(folder, run.config)


def read_run(folder: Path, step: int | None = None, mesh: Mesh | None = None) -> StoredRun:
    """A checkpoint of a run, by default the newest good one.

    mesh: the devices that it is split over; by default one has all of it.

    Raises: see `load`.
    """
    # whoever wants the config alone does not wait for what trains
    from kha_jax.runs.checkpoint import Checkpoints
    from kha_jax.runs.manifest import verify
    from kha_jax.training.step import make_trainer, variables

    config = read_config(folder)
    accepts = read_lineage(folder, config)
    config = config.replace(mesh=MeshConfig())
    with Checkpoints(folder / "checkpoints", accepts=accepts) as checkpoints:
        if step is None:
            step = checkpoints.newest_good(set_aside=False)
        elif step not in checkpoints.steps():
            raise RunError(f"{folder}: step {step} is not kept; it has {checkpoints.steps()}")
        else:
            verify(checkpoints.path(step), accepts)
        if step is None:
            raise RunError(f"{folder}: holds no checkpoint yet")
        mesh = make_mesh(config.mesh, jax.devices()[:1]) if mesh is None else mesh
        state = make_trainer(config, mesh).abstract
        return StoredRun(config, step, checkpoints.restore_part(step, variables(state)))


def read_config(folder: Path) -> RunConfig:
    """The config of a run folder, whose own kinds are registered again: the one that the last entry
    of lineage.json has the hash of, where there are entries.

    Raises:
        RunError: there is none, it is damaged, or a kind of it is not to be had.
        DataError: it is another one.
    """
    path = folder / CONFIG
    if not is_file(path):
        raise RunError(f"{folder}: no run there; it holds no {CONFIG}")
    register_again(folder)
    config = _read_config(path)
    if _is_last(folder, config):
        return config
    # A start that changes it writes the next one, then the lineage, then renames the next one. So
    # one of these is the lineage's, whether that start was killed or goes on while this reads.
    for other in (folder / NEXT, path):
        with contextlib.suppress(RunError):
            if _is_last(folder, found := _read_config(other)):
                return found
    raise DataError(
        f"{path}: {_what_differs(folder, config)}; put back the one that the run was trained with"
    )


def write_config(folder: Path, config: RunConfig, record: Callable[[], None]) -> None:
    """Writes config.json. record: writes the lineage that goes with it. Whoever reads the folder
    finds the config from before or this one, also where the process is killed in between."""
    write_json(folder / NEXT, to_dict(config))
    faults.at("config_written", 0)
    record()
    faults.at("lineage_written", 0)
    rename(folder / NEXT, folder / CONFIG)


def _read_config(path: Path) -> RunConfig:
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"holds a {type(values).__name__} and no fields")
        return from_dict(RunConfig, with_new_names(values))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path}: is damaged ({error}); put back the one that the run was started with"
        ) from None


def _is_last(folder: Path, config: RunConfig) -> bool:
    return config_hash(config) == read_lineage(folder, config)[-1]["config"]


def _what_differs(folder: Path, config: RunConfig) -> str:
    """The field where it is one that had its default; otherwise the hashes."""
    last, fields = read_lineage(folder, config)[-1]["config"], _learnt(config)
    for name in fields:
        group = name.rpartition(".")[0] + "."  # which goes where nothing else of it was chosen
        for gone in (name, group):
            odd = [k for k in fields if k.startswith(gone)]
            if last == _hash({k: v for k, v in fields.items() if k not in odd}):
                return f"{odd[-1]}={fields[odd[-1]]!r} is not what {LINEAGE} records"
    found = _hash(fields)
    return f"differs from what {LINEAGE} records (hash {str(last)[:12]}, found {found[:12]})"


class Registration(NamedTuple):
    """A kind that is none of ours. field: where the config has it. module: that defines its class.
    file: of that module."""

    field: str
    kind: str
    module: str
    file: str


def registrations(config: Config) -> list[Registration]:
    """Those that a config needs."""
    return [
        Registration(path, kind, cls.__module__, _file_of(cls))
        for path, kind, cls in choices_in(config)
        if cls.__module__.partition(".")[0] != "kha_jax"
    ]


def write_registrations(folder: Path, *configs: Config) -> None:
    """Writes registered.json where a config has kinds of its own."""
    if found := dict.fromkeys(one for config in configs for one in registrations(config)):
        write_json(folder / REGISTERED, [entry._asdict() for entry in found])


def register_again(folder: Path) -> None:
    """Imports the modules that registered the kinds of a run, by name or else by file.

    Raises:
        RunError: one of them cannot be imported, or no longer registers its kind.
    """
    path = folder / REGISTERED
    try:
        entries = [Registration(**one) for one in read_json(path)]
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: is damaged ({error!r}); put back that of the run") from None
    for entry in entries:
        if not _is_registered(entry):
            _import(entry)


def _is_registered(entry: Registration) -> bool:
    cls: Any = RunConfig
    for name in entry.field.split("."):
        options = cls if isinstance(cls, tuple) else (cls,)
        field = next(f[name] for c in options if name in (f := c.__dataclass_fields__))
        choices = field.metadata.get("choices")
        cls = tuple(choices.values()) if choices else type(field.default)
    return entry.kind in choices


def _import(entry: Registration) -> None:
    said = f"config.{entry.field}: {entry.kind!r} was registered by {entry.module} ({entry.file})"
    try:
        if _importable(entry.module):
            importlib.import_module(entry.module)
        else:
            _run_file(entry.module, Path(entry.file))
    except Exception as error:  # whatever the code of a stranger raises
        problem = f"{type(error).__name__}: {error}"
        remedy = "put it back, or its folder on PYTHONPATH"
        raise RunError(f"{said}, which cannot be imported ({problem}); {remedy}") from None
    if not _is_registered(entry):
        raise RunError(f"{said}, which no longer registers it; put back the one of the run")


def _importable(module: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(module) is not None
    return False


def _run_file(name: str, path: Path) -> None:
    """Runs a file as the module of that name, which finds its neighbours."""
    name = name if name.isidentifier() else f"registered_{path.stem}"  # <run_path>: a config file
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))


def _file_of(cls: type) -> str:
    """The file that defines a class; also of one that was run and not imported."""
    module = sys.modules.get(cls.__module__)
    found = getattr(module, "__file__", None) or next(_code_files(cls), "")
    return str(Path(found).resolve()) if found else ""


def _code_files(cls: type) -> Iterator[str]:
    for value in vars(cls).values():
        function = inspect.unwrap(getattr(value, "fget", None) or value)
        file = getattr(getattr(function, "__code__", None), "co_filename", "<")
        if not file.startswith("<"):
            yield file


def config_hash(config: RunConfig) -> str:
    """Of the fields that decide what is learnt, but for those that have their default. So a default
    is never changed: folders that were trained with it would no longer be what their lineages say.
    """
    return _hash(_learnt(config))


def _learnt(config: RunConfig) -> dict[str, Any]:
    return {k: v for k, v in dotted(departures(config)).items() if not k.startswith(FREE)}


def _hash(fields: dict[str, Any]) -> str:
    named = {old_name(k): v for k, v in fields.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def read_tokenizer(folder: Path, config: RunConfig) -> Any | None:
    """Between text and ids of a run: the one that its folder keeps, so that its data need not be
    there; folders of before have none, and it is that of the data. None where there is no text.

    Raises:
        DataError: the tokenizer is damaged, or is not that of the run.
        ConfigError: it needs a package that is not installed.
    """
    return tokenizer_files.read_kept(folder) or config.data.tokenizer()


def tokenizer_hash(config: RunConfig) -> str:
    """Which ids stand for which text; empty where there is no text."""
    tokenizer = config.data.tokenizer()
    return "" if tokenizer is None else tokenizer.fingerprint


def read_lineage(folder: Path, config: RunConfig) -> list[dict[str, Any]]:
    """What the run has been, oldest first; without a lineage.json, what the config alone tells.

    Raises:
        RunError: the file is damaged.
    """

    def identity(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: entry[name] for name in IDENTITY if name not in LATER - entry.keys()}

    return _entries(folder, identity) or [{"config": config_hash(config)}]


def batch_sizes(folder: Path, config: RunConfig) -> list[tuple[int, int]]:
    """(first step, batch size) as they were decided, for data.Draws; config: that of the folder.

    Entries of older folders name no batch size. Their draws were counted as if the batches had
    always had the size that they last had.

    Raises:
        RunError: lineage.json is damaged.
    """

    def sizes(entry: dict[str, Any]) -> tuple[int, int, int] | None:
        if "batch_size" not in entry:
            return None
        size = entry["batch_size"]
        before, _ = entry["changes"].get("batch_size", (size, size))
        return int(entry["from_step"]), int(before), int(size)

    known = [entry for entry in _entries(folder, sizes) if entry is not None]
    begin = known[0][1] if known else config.batch_size
    return [(0, begin), *((step, size) for step, _, size in known)]


def _entries(folder: Path, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """What is read in each entry of lineage.json; nothing where there is none."""
    path = folder / LINEAGE
    try:
        return [read(entry) for entry in read_json(path)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path}: is damaged ({error!r}); put back that of the run") from None
