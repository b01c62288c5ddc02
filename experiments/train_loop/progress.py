"""What a person watches: a live line with rates and ETA on a terminal, plain lines elsewhere."""

import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from kha_jax.accounting import Accounting
from kha_jax.training.run_config import RunConfig

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Shows steps first_step + 1 ... steps of a run; silent unless enabled."""

    def __init__(self, first_step: int, steps: int, enabled: bool):
        self.enabled, self.first_step, self.steps = enabled, first_step, steps
        self.console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self.started, self.spoke, self.latest = time.time(), 0.0, {}
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(30),
            TextColumn("{task.description}"),
        )
        self.bar = Bar(
            *columns,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = None

    def header(
        self,
        workdir: Path,
        config: RunConfig,
        cost: Accounting,
        mesh: jax.sharding.Mesh,
        first_step: int,
    ) -> None:
        """Two lines that say what runs, where, at what cost."""
        if not self.enabled:
            return
        device = jax.devices()[0].device_kind
        sizes = f"{cost.parameters / 1e6:.2f}M parameters ({cost.mixing:,} in mixers), "
        flops = f"{cost.training_flops / 1e6:.1f} MFLOP per token, "
        axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        self.console.print(f"{workdir}: {sizes}{flops}{mesh.devices.size} {device} ({axes})")
        tokens = config.steps * config.tokens_per_step
        origin = f"resuming after step {first_step}" if first_step else "from scratch"
        self.console.print(
            f"{config.steps} steps of {config.batch_size} x {config.seq_len} tokens, "
            f"{tokens / 1e6:.1f}M, {origin}"
        )
        if self.console.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task("compiling", total=self.steps, completed=first_step)

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Shows the metrics of a step; evaluations always get a line of their own."""
        if not self.enabled:
            return
        self.latest.update(values)
        evaluated = "val_loss" in values
        if self.task is not None:
            self.bar.update(self.task, completed=step, description=self._line(self.latest))
        quiet = self.task is not None or time.time() - self.spoke < SECONDS_BETWEEN_LINES
        if evaluated or not quiet:
            left = (
                (time.time() - self.started) / max(step - self.first_step, 1) * (self.steps - step)
            )
            self.console.print(
                f"step {step:>6}/{self.steps}  {self._line(self.latest)}  {left:.0f} s left"
            )
            self.spoke = time.time()
            self.latest = {
                name: value for name, value in self.latest.items() if not name.startswith("val_")
            }

    def _line(self, values: dict[str, Any]) -> str:
        worst = (
            {"worst_violation": max(values["max_violation"])} if "max_violation" in values else {}
        )
        values = {**values, **worst}
        shown = (
            ("loss", "loss {:.3f}"),
            ("grad_norm", "grad {:.2f}"),
            ("worst_violation", "MaxVio {:.2f}"),
            ("tokens_per_second", "{:,.0f} tok/s"),
            ("model_flops_utilization", "MFU {:.1%}"),
            ("val_loss", "| val loss {:.3f}"),
            ("val_bits_per_byte", "{:.3f} bits/byte"),
            ("val_accuracy", "accuracy {:.1%}"),
        )
        return "  ".join(form.format(values[name]) for name, form in shown if name in values)

    def close(self) -> None:
        """Stops the live line."""
        if self.task is not None:
            self.bar.stop()


def farewell(workdir: Path) -> str:
    """What to try next."""
    return (
        f"done: {workdir} holds metrics.jsonl, config.json and checkpoints. Next, try\n"
        "  the baseline    python -m experiments.train --config=configs/kha_tiny.py:baseline "
        "--workdir=runs/baseline\n"
        "  another place   python -m experiments.train "
        "--config.model.attention.key.kind=linear --workdir=runs/key_linear\n"
        "  another task    python -m experiments.train --config=configs/mqar_tiny.py "
        "--workdir=runs/mqar"
    )
