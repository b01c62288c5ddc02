"""Draws the curves of runs (extra: plots).

    python -m experiments.report --workdirs=runs/kha_tiny,runs/baseline --out=curves.png

Training loss, smoothed; validation bits per byte (or loss, for data without bytes); for mixtures
the worst layer's MaxVio.
"""

from pathlib import Path

from absl import flags

from experiments import command_line, stored
from experiments.command_line import UsageError
from kha_jax import inspect
from kha_jax.checkpoint import CheckpointError
from kha_jax.inspect import curves, style

WORKDIRS = flags.DEFINE_list("workdirs", [], "Run folders, drawn in this order.")
OUT = flags.DEFINE_string(
    "out",
    "curves.png",
    "The figure to write, as NAME.png, NAME_dark.png (for dark pages) and NAME.svg (for both).",
)


def _name(folder: Path, folders: list[Path]) -> str:
    """Of a run in the figure: that of its folder, or the whole path where two have the same."""
    alike = [other.name for other in folders].count(folder.name) > 1
    return str(folder) if alike else folder.name


def main() -> None:
    """See the module's docstring."""
    if not WORKDIRS.value:
        raise UsageError("--workdirs: name at least one run folder")
    folders = [stored.local_folder("workdirs", name) for name in WORKDIRS.value]
    out = stored.local_folder("out", OUT.value)
    if out.suffix not in (".png", ".svg"):
        raise UsageError(f"--out={out}: must end in .png or .svg; both are written")
    try:
        runs = {_name(folder, folders): inspect.read_metrics(folder) for folder in folders}
        style.save(lambda: curves.training(runs), out.with_suffix(""))
    except CheckpointError as error:
        raise UsageError(f"--workdirs: {error}") from None
    except style.PlotsMissing as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error.strerror or error}") from None
    print(f"wrote {OUT.value}")


if __name__ == "__main__":
    command_line.run(main)
