"""What the paper's tables share: rows that are runs, at three scales."""

import dataclasses
import importlib
from typing import Mapping, NamedTuple

from ml_collections.config_dict import ConfigDict

from kha_jax.config import Config, near, to_config_dict
from kha_jax.feed_forward import MoE
from kha_jax.model import LossConfig
from kha_jax.modules import Numerics
from kha_jax.training.run_config import CheckpointConfig, EvaluationConfig, RunConfig


class Row(NamedTuple):
    """A run at the size of the paper, and what the paper prints of it.

    baseline: the row it is compared with; its own name for one that is a baseline. loss: training
    loss at the end, nats per token. active, total: parameters that a token passes through, and all
    of them, such as 970M. cache: numbers kept per token and layer. note: what the run cannot have
    as it is printed, and why.
    """

    run: RunConfig
    baseline: str = "baseline"
    loss: float | None = None
    active: str | None = None
    total: str | None = None
    cache: int | None = None
    note: str = ""


class Scale(NamedTuple):
    """How a run is made smaller with its ratios kept: the numbers of heads and groups, head_dim to
    width, experts active of all, the active feed-forward to width.

    width, layers: what widths and numbers of layers are divided by. experts: active ones, of wider
    experts. learning_rate: in place of the 7.5e-4 of the paper's exploration.
    """

    width: int
    layers: int
    experts: int
    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    evaluation: EvaluationConfig
    dtype: str


SCALES = {
    "tiny": Scale(
        width=16,
        layers=9,
        experts=2,
        steps=200,
        batch_size=32,
        seq_len=128,
        learning_rate=3e-3,
        evaluation=EvaluationConfig(every=50, batches=16),
        dtype="float32",
    ),
    "small": Scale(
        width=4,
        layers=3,
        experts=4,
        steps=800,
        batch_size=64,
        seq_len=1024,
        learning_rate=1.5e-3,
        evaluation=EvaluationConfig(every=200, batches=16),
        dtype="bfloat16",
    ),
}
EXPLORED_TOKENS = 75 * 10**9  # of tables 1 and 2
WIDTHS = ("width", "head_dim", "value_dim", "rope_dim", "kv_lora", "q_lora")
PAPER_LEARNING_RATE = 7.5e-4


def narrowed(config: Config, by: int) -> Config:
    """The config with every width in it divided."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config):
            changes[field.name] = narrowed(value, by)
        elif field.name in WIDTHS and value is not None:
            changes[field.name] = value // by
    return config.replace(**changes)


def scaled(run: RunConfig, scale: Scale) -> RunConfig:
    """The run made smaller, over bytes of text instead of the paper's tokens."""
    model = narrowed(run.model, scale.width).replace(
        layers=round(run.model.layers / scale.layers),
        vocabulary_size=264,
        numerics=Numerics(dtype=scale.dtype),
        remat="none",
        loss=LossConfig(),
    )
    experts = model.feed_forward
    if isinstance(experts, MoE):
        merged = experts.top_k // scale.experts
        fewer = MoE(
            experts=experts.experts // merged,
            top_k=scale.experts,
            width=experts.width * merged,
            balancing_rate=3e-3,
        )
        model = model.replace(feed_forward=fewer)
    raised = run.optimizer.learning_rate / PAPER_LEARNING_RATE
    optimizer = run.optimizer.replace(learning_rate=scale.learning_rate * raised)
    return run.replace(
        steps=scale.steps,
        batch_size=scale.batch_size,
        seq_len=scale.seq_len,
        model=model,
        optimizer=optimizer,
        evaluation=scale.evaluation,
        checkpoint=CheckpointConfig(every=0, keep=1),
    )


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows by name, in the order in which the paper prints them. scales: sizes that they also
    have, beside their own."""

    title: str
    rows: Mapping[str, Row]
    scales: Mapping[str, Scale] = dataclasses.field(default_factory=lambda: SCALES)

    def run(self, name: str) -> RunConfig:
        """The run ROW or ROW.SCALE.

        Raises:
            ValueError: there is no such row or scale, with the nearest.
        """
        row, _, scale = name.partition(".")
        if row not in self.rows:
            raise ValueError(f"row {row!r} is not known; {near(row, self.rows)}")
        if not scale:
            return self.rows[row].run
        if scale not in self.scales:
            known = ", ".join(self.scales) or "none"
            raise ValueError(f"scale {scale!r} is not known; this table has {known}")
        return scaled(self.rows[row].run, self.scales[scale])

    def get_config(self, variant: str = "") -> ConfigDict:
        """What a config file must have; the last row by default."""
        return to_config_dict(self.run(variant or list(self.rows)[-1]))


# name on command lines -> module of configs
TABLES = {
    **{str(number): f"table{number}" for number in range(1, 7)},
    "controls": "controls",
    "stress": "stress",
    "tasks": "task_tiny",
}


def load(name: str) -> Table:
    """A table by its name in TABLES."""
    return importlib.import_module(f"configs.{TABLES[name]}").TABLE
