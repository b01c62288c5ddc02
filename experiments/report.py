"""Draws the curves of runs: python -m experiments.report --workdirs=runs/kha_tiny,runs/baseline
--out=curves.png (extra: plots)."""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from experiments.command_line import UsageError
from kha_jax.metrics import plain_row, read_lines

WORKDIRS = flags.DEFINE_list("workdirs", [], "Run folders, drawn in this order.")
OUT = flags.DEFINE_string(
    "out", "curves.png", "The figure to write; the suffix decides the format."
)


def read_metrics(workdir: Path) -> list[dict]:
    """The whole lines of a run's metrics.jsonl, without what was not finite.

    Raises:
        UsageError: the folder holds none with a loss.
    """
    path = workdir / "metrics.jsonl"
    try:
        rows = [
            {name: value for name, value in plain_row(row).items() if finite(value)}
            for row in read_lines(path)
        ]
    except OSError as error:
        raise UsageError(f"--workdirs: {path}: {error.strerror}; train it first") from None
    if not any("loss" in row for row in rows):
        raise UsageError(f"--workdirs: {path} holds no loss; train it first")
    return rows


def finite(value: Any) -> bool:
    """Whether a value, or every one of a list, can be drawn."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, (int, float)) for one in values)


def smoothed(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """(steps, exponential moving averages over about ten steps) of the rows that have the key."""
    steps, values = [], []
    for row in rows:
        if key in row:
            last = values[-1] if values else row[key]
            steps.append(row["step"])
            values.append(last + (row[key] - last) * 0.1)
    return steps, values


def draw_evaluations(axis: Any, name: str, rows: list[dict]) -> None:
    """Validation bits per byte or loss; nothing for a run that was not evaluated yet."""
    key = "val_bits_per_byte" if any("val_bits_per_byte" in row for row in rows) else "val_loss"
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        label = f"{name}: {points[-1][1]:.3f}"
        axis.plot(*zip(*points), marker="o", markersize=3, label=label, linewidth=1.2)
        words = {"val_bits_per_byte": "validation bits per byte", "val_loss": "validation loss"}
        axis.set_ylabel(words[key])


def main() -> None:
    """Training loss, smoothed; validation bits per byte (or loss, for data without bytes); for
    mixtures the worst layer's MaxVio."""
    if not WORKDIRS.value:
        raise UsageError("--workdirs: name at least one run folder")
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("this command needs the extra: pip install -e '.[plots]'") from None
    runs = {Path(name): read_metrics(Path(name)) for name in WORKDIRS.value}
    balanced = any("max_violation" in row for rows in runs.values() for row in rows)
    figure, axes = pyplot.subplots(
        1, 3 if balanced else 2, figsize=(13 if balanced else 9, 3.4), layout="constrained"
    )
    left, right = axes[:2]
    for workdir, rows in runs.items():
        left.plot(*smoothed(rows, "loss"), label=workdir.name, linewidth=1.2)
        if any("max_violation" in row for row in rows):
            worst = [
                {"step": row["step"], "worst": max(row["max_violation"])}
                for row in rows
                if "max_violation" in row
            ]
            axes[2].plot(*smoothed(worst, "worst"), label=workdir.name, linewidth=1.2)
        draw_evaluations(right, workdir.name, rows)
    left.set_ylabel("training loss (nats per token)")
    if balanced:
        axes[2].axhline(0.2, color="grey", linewidth=0.8, linestyle="--")
        axes[2].set(yscale="log", ylabel="MaxVio of the worst layer")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    try:
        figure.savefig(OUT.value, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out={OUT.value}: {error}") from None
    print(f"wrote {OUT.value}")


if __name__ == "__main__":
    command_line.run(main)
