"""What a person watches: a live line with rates and what is left on a terminal, plain lines
elsewhere."""

import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from experiments.cli.terminal import CONSOLE, LINE, say
from experiments.train_loop.data_check import epochs
from kha_jax.accounting import Accounting
from kha_jax.data import Source
from kha_jax.training.run_config import RunConfig

SECONDS_BETWEEN_LINES = 10
SHORTEST_BAR = 8
LONG_ROW = 2048  # tokens, from which on scores outside of a fused kernel decide a step's time
TRAINING = (
    ("loss", "loss {:.3f}"),
    ("grad_norm", "grad {:.2f}"),
    ("worst_violation", "MaxVio {:.2f}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
    ("model_flops_utilization", "MFU {:.1%}"),
)
EVALUATION = (
    ("val_loss", "val loss {:.3f}"),
    ("val_bits_per_byte", "{:.3f} bits/byte"),
    ("val_accuracy", "accuracy {:.1%}"),
)


def clock(seconds: float) -> str:
    """h:mm, begun minutes counted."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d}"


def spelt(values: dict[str, Any], forms: tuple[tuple[str, str], ...]) -> list[str]:
    """Those of the values that have a form."""
    return [form.format(values[name]) for name, form in forms if name in values]


def line(parts: list[str], room: int) -> str:
    """As many of the parts as there is room for."""
    while len(said := "  ".join(parts)) > room:
        parts = parts[:-1]
    return said


class Clock(ProgressColumn):
    """How long it has compiled, then what is left."""

    def render(self, task: Task) -> Text:
        since = f"{int(task.elapsed or 0)} s"
        return Text(task.fields["left"] or since)


class Progress:
    """Shows steps first_step + 1 ... steps of a run; silent unless enabled."""

    def __init__(self, first_step: int, steps: int, enabled: bool):
        self.enabled, self.first_step, self.steps = enabled, first_step, steps
        self.spoke, self.latest = 0.0, {}
        self.began: tuple[int, float] | None = None  # the step that was compiled, and when it ended
        self.bar = Bar(
            TextColumn("{task.fields[at]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            Clock(),
            console=CONSOLE,
            expand=True,
            redirect_stderr=sys.stderr.isatty(),  # a file is no place on this terminal
        )
        self.task = None

    def header(
        self,
        workdir: Path,
        config: RunConfig,
        cost: Accounting,
        mesh: jax.sharding.Mesh,
        source: Source,
        origin: str,
    ) -> None:
        """A few lines that say what runs, where, on what, at what cost. source: of the training
        data. origin: what the run begins from."""
        if not self.enabled:
            return
        device = jax.devices()[0].device_kind
        axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        say(f"{workdir} on {mesh.devices.size} {device} ({axes})")
        sizes = f"{cost.parameters / 1e6:.2f}M parameters ({cost.mixing:,} in mixers)"
        say(f"{sizes}, {cost.training_flops / 1e6:.1f} MFLOP per token")
        batch = f"{config.batch_size} x {config.seq_len} tokens"
        say(f"{config.steps} steps of {batch}, {origin}")
        planned = in_millions(config.steps * config.tokens_per_step)
        times = epochs(config, len(source))
        read = f"{times:,.1f}" if times > 1 else f"{times:.2g}"
        say(f"train on {planned} tokens: {read} epochs of {source}")
        there = in_millions(len(source) * config.seq_len)
        documents = getattr(source, "documents", None)  # what is no text has none
        parts = [] if documents is None else [f"{documents:,} documents"]
        if told := of_scores(config):
            say(told)
        say(f"there are {', '.join([f'{there} tokens', *parts, f'{len(source):,} windows'])}")
        if CONSOLE.is_interactive:
            self.bar.start()
            self.task = self.bar.add_task(
                "compiling",
                total=self.steps,
                completed=self.first_step,
                at=self._at(self.first_step),
                left="",
            )

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Shows the metrics of a step; evaluations always get a line of their own."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self.began is None and step > self.first_step:
            self.began = step, now
        at, left = self._at(step), self._left(step, now)
        if "max_violation" in values:
            values = {**values, "worst_violation": max(values["max_violation"])}
        self.latest.update(values)
        training, evaluation = spelt(self.latest, TRAINING), spelt(values, EVALUATION)
        if self.task is not None:
            room = CONSOLE.width - len(at) - SHORTEST_BAR - len(left) - 3
            self.bar.update(
                self.task, completed=step, description=line(training, room), at=at, left=left
            )
        elif training and not evaluation and now - self.spoke >= SECONDS_BETWEEN_LINES:
            say("  ".join([at, *training, *filter(None, [left])]))
            self.spoke = now
        if evaluation:
            room = LINE - len(at) - len(left) - 4
            say("  ".join([at, line(evaluation, room), *filter(None, [left])]))

    def _at(self, step: int) -> str:
        return f"step {step:>{len(str(self.steps))}}/{self.steps}"

    def _left(self, step: int, now: float) -> str:
        """What is left of the run at its pace so far, compilation not counted; nothing where that
        is not known."""
        done = step - self.began[0] if self.began else 0
        return f"{clock((now - self.began[1]) / done * (self.steps - step))} left" if done else ""

    def close(self) -> None:
        """Stops the live line."""
        if self.task is not None:
            self.bar.stop()


def of_scores(config: RunConfig) -> str:
    """What to say of long rows whose scores have to exist for all heads at once; nothing of
    others."""
    mixed = any(attention.mixes_scores for attention in config.model.attentions().values())
    if config.seq_len < LONG_ROW or not mixed:
        return ""
    slow = f"steps of rows of {config.seq_len} tokens take several times as long"
    return f"heads mix in the scores, which no fused kernel computes: {slow} (docs/performance.md)"


def in_millions(tokens: int) -> str:
    return f"{tokens / 1e6:,.2f}M"


def farewell(workdir: Path, text: bool) -> str:
    """What to try with this run; text: whether that is what it has learnt."""
    folder = shlex.quote(str(workdir))
    lines = [
        f"done: {workdir} holds its metrics and checkpoints. Next, try",
        f"  its curve  python -m experiments.report --workdir={folder}",
        f"  its heads  python -m experiments.analyze --workdir={folder}",
    ]
    if text:
        prompt = "--prompt='def main('"
        lines.append(f"  its text   python -m experiments.generate --workdir={folder} {prompt}")
    return "\n".join(lines)
