"""Draws the curves of runs (extra: plots).

    python -m experiments.report --workdirs=runs/kha_tiny,runs/baseline --out=curves.png

Training loss, smoothed; validation bits per byte (or loss, for data without bytes); for mixtures
the worst layer's MaxVio.
"""

from pathlib import Path

from absl import flags

from experiments import command_line
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


def main() -> None:
    """See the module's docstring."""
    if not WORKDIRS.value:
        raise UsageError("--workdirs: name at least one run folder")
    try:
        runs = {Path(name).name: inspect.read_metrics(name) for name in WORKDIRS.value}
        style.save(lambda: curves.training(runs), Path(OUT.value).with_suffix(""))
    except CheckpointError as error:
        raise UsageError(f"--workdirs: {error}") from None
    except style.PlotsMissing as error:
        raise UsageError(str(error)) from None
    print(f"wrote {OUT.value}")


if __name__ == "__main__":
    command_line.run(main)
