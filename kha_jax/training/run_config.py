"""A run's config: everything that decides a run, and nothing that compiles."""

import copy
import functools
from typing import Any, Literal, Mapping

import jax.numpy as jnp

from kha_jax import accounting, data
from kha_jax.config import Config, choice
from kha_jax.data import DataConfig
from kha_jax.hardware import tpu
from kha_jax.mesh import MeshConfig
from kha_jax.model import ModelConfig
from kha_jax.ops.attention import why_not
from kha_jax.sharding import axis_size_of, mesh_axes

# What a batch holds, all [B, T].
BATCH = {
    **dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32),
    "weights": jnp.float32,
}
# Fields that had another name once, and that name. A config.json may hold the old one, and hashes
# go on with it: they stand in lineages, manifests and the tables of sweeps.
OLD_NAMES = {"optimizer.mixer": "optimizer.knocking"}


class MixerOptimizerConfig(Config):
    """A decay and a learning rate that mixers have for themselves."""

    decay: Literal["weights", "none", "to_identity"] = "weights"
    """Weight decay towards zero (the paper states no exclusion), none, or towards the start."""
    learning_rate_multiplier: float = 1.0
    """Factor on their learning rate."""

    def validate(self):
        self.at_least(0, "learning_rate_multiplier")


LARGEST_RATE = 1000.0  # beyond any that trains; a larger one is a slip of the exponent


class OptimizerConfig(Config):
    """AdamW (arXiv 1711.05101), the paper's section 4.1 by default.

    The schedule `wsd` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395) does not depend on the
    number of steps until it decays, so that a run can be prolonged from there without a jump.
    """

    learning_rate: float = 7.5e-4
    """At the peak, after warm-up."""
    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean of squared gradients."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; norm scales have none."""
    clip_norm: float = 1.0
    """Bound on the global norm of the gradient."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises linearly."""
    final_fraction: float = 0.1
    """Share of the peak that the schedule ends at."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a cosine over all steps, or the peak (`wsd`) until a last linear decay."""
    decay_fraction: float | None = None
    """Share of the steps in which `wsd` decays, 0.1 by default."""
    mixer: MixerOptimizerConfig = MixerOptimizerConfig()
    """How the matrices of mixers are trained."""
    value_learning_rate_multiplier: float = 1.0
    """Factor on the learning rate of the weights that make the values: the control of a mixer's."""
    trainable: Literal["all", "mixers"] = "all"
    """What is trained: all, or `mixers` of attention alone, without moments of what is frozen."""

    def validate(self):
        for field in ("learning_rate", "eps", "clip_norm"):
            self.require(
                getattr(self, field) > 0, field, f"must be positive, found {getattr(self, field)}"
            )
        for field in ("b1", "b2", "warmup_fraction", "final_fraction"):
            value = getattr(self, field)
            self.require(
                0 <= value < 1 or field == "final_fraction" and value == 1,
                field,
                f"must be in [0, 1), found {value}",
            )
        largest, found = f"must be at most {LARGEST_RATE:g}", self.learning_rate
        self.require(found <= LARGEST_RATE, "learning_rate", f"{largest}, found {found}")
        self.at_least(0, "weight_decay", "value_learning_rate_multiplier")
        factor = self.value_learning_rate_multiplier
        problem = f"does nothing with trainable='mixers', found {factor:g}"
        fits = self.trainable == "all" or factor == 1
        self.require(fits, "value_learning_rate_multiplier", problem)
        given = self.decay_fraction
        problem = f"does nothing with schedule={self.schedule!r}, found {given}"
        self.require(given is None or self.schedule == "wsd", "decay_fraction", problem)
        longest = 1 - self.warmup_fraction
        problem = f"must be above 0 and leave room for warmup_fraction, found {given}"
        self.require(given is None or 0 < given <= longest, "decay_fraction", problem)

    def decay(self) -> float:
        """decay_fraction, or its default."""
        return 0.1 if self.decay_fraction is None else self.decay_fraction


class EvaluationConfig(Config):
    """The loss on the validation split, computed in micro-batches like a step."""

    every: int = 100
    """Steps between evaluations, one after the last step included; 0: none."""
    batches: int = 8
    """Batches of batch_size rows of the validation split, which may hold fewer."""

    def validate(self):
        self.at_least(0, "every")
        self.at_least(1, "batches")


class CheckpointConfig(Config):
    """When the state is saved, and how many saves stay."""

    every: int = 200
    """Steps between checkpoints, the last step's included; 0: none."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, by the clock of process 0, beside those of `every`; 0: none."""
    keep: int = 2
    """Newest ones that stay."""
    keep_every: int = 0
    """Steps between checkpoints that stay for good, which are saved beside the others; 0: none."""
    grace: float = 30.0
    """Seconds from SIGTERM to the end, saved or not; the default is what Kubernetes gives."""

    def validate(self):
        self.at_least(0, "every", "every_minutes", "keep_every")
        self.at_least(1, "keep", "grace")

    def due(self, step: int) -> bool:
        """Whether the number of the step asks for a checkpoint."""
        return any(every and step % every == 0 for every in (self.every, self.keep_every))


class ProfileConfig(Config):
    """A profiler trace, written below the workdir."""

    start: int = 0
    """Steps before the first one that is traced."""
    stop: int = 0
    """Last step that is traced; 0: no trace."""

    def validate(self):
        self.at_least(0, "start", "stop")
        problem = f"must be greater than start={self.start}, or 0 for no trace, found {self.stop}"
        self.require(self.stop == 0 or self.stop > self.start, "stop", problem)


class RunConfig(Config):
    """Everything that decides a run."""

    steps: int = 1000
    """Optimiser steps."""
    seed: int = 0
    """Of the initial values and of the data order."""
    batch_size: int = 16
    """Rows of a step, over all devices."""
    seq_len: int = 256
    """Tokens of a row, T."""
    accumulation: int = 1
    """Micro-batches that a step is computed in, a divisor of batch_size."""
    max_nonfinite_steps: int = 10
    """Steps in a row with a non-finite loss or gradient, none applied, that stop the run."""
    hang_timeout: float = 600.0
    """Seconds that a step may take; compilations, evaluations, checkpoints have an hour more."""
    model: ModelConfig = ModelConfig()
    """The transformer."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """From gradients to weights."""
    data: DataConfig = choice(data.SOURCES, data.PythonSource(), by="source", folder="shards")
    """Where rows of tokens come from; a folder of shards may stand for the source."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When the validation loss is computed, and on how much."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state is saved, and how many stay."""
    mesh: MeshConfig = MeshConfig()
    """Which devices split what."""
    profile: ProfileConfig = ProfileConfig()
    """Which steps are traced."""

    def validate(self):
        self.at_least(1, "steps", "batch_size", "seq_len", "accumulation", "max_nonfinite_steps")
        self.at_least(1, "hang_timeout")
        longest, problem = self.data.deadline(), "must be above the {:.0f} s that data may take"
        self.require(self.hang_timeout > longest, "hang_timeout", problem.format(longest))
        self.require(self.steps < 10**9, "steps", f"must be below 10^9, found {self.steps}")
        self.require(0 <= self.seed < 2**32, "seed", f"must be in [0, 2^32), found {self.seed}")
        problem = f"must divide batch_size={self.batch_size}, found {self.accumulation}"
        self.require(self.batch_size % self.accumulation == 0, "accumulation", problem)
        needed, have = self.data.vocabulary_size(), self.model.vocabulary_size
        problem = f"must be at least the data's {needed}, found {have}"
        self.require(needed is None or have >= needed, "model.vocabulary_size", problem)
        tokens = self.tokens_per_step
        for experts in (part.feed_forward.router_width() for part in self.model.segments()):
            problem = f"times seq_len={self.seq_len} and {experts} experts must be below 2^31"
            self.require(tokens * experts < 2**31, "batch_size", problem)
        some = self.optimizer.trainable == "all" or self._has_mixers(self.model)
        problem = "trains nothing with 'mixers': no layer has one with parameters; use 'all'"
        self.require(some, "optimizer.trainable", problem)
        field = "optimizer.value_learning_rate_multiplier"
        some = self.optimizer.value_learning_rate_multiplier == 1 or self._has_values(self.model)
        self.require(some, field, "does nothing: no projection has weights that make values alone")
        shortest = self.data.minimum_seq_len()
        self.require(
            self.seq_len >= shortest,
            "seq_len",
            f"must be at least {shortest} for this data, found {self.seq_len}",
        )

    @staticmethod
    def _has_mixers(model: ModelConfig) -> bool:
        return any(part.attention.mixer_parameters(model.width) for part in model.segments())

    @staticmethod
    def _has_values(model: ModelConfig) -> bool:
        return any("value" in part.attention.projection.stream_weights for part in model.segments())

    def with_model(self, model: ModelConfig) -> "RunConfig":
        """The run of another model, all of which is trained where it has no mixers."""
        trainable = self.optimizer.trainable if self._has_mixers(model) else "all"
        return self.replace(model=model, optimizer=self.optimizer.replace(trainable=trainable))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimiser step, over all devices and micro-batches."""
        return self.batch_size * self.seq_len

    def cost(self) -> accounting.Accounting:
        """What its model costs in rows of this length."""
        sizes = {"tokens": self.tokens_per_step, "trainable": self.optimizer.trainable}
        return accounting.account(self.model, self.seq_len, **sizes)

    def check_on(self, sizes: Mapping[str, int], platform: str) -> None:
        """Checks that the run can be placed on a mesh whose axes have these sizes.

        Raises:
            ConfigError: names what does not divide over it, or the kernel that does not run there.
        """
        batch_shards, rows = axis_size_of(sizes, "batch"), self.batch_size // self.accumulation
        problem = (
            f"must divide by {batch_shards} devices in each micro-batch, found {self.batch_size} / "
            f"{self.accumulation}"
        )
        self.require(rows % batch_shards == 0, "batch_size", problem)
        (axis,) = mesh_axes("loss_length")
        problem = f"must divide by mesh.{axis}={sizes[axis]}, found {self.seq_len}"
        self.require(self.seq_len % sizes[axis] == 0, "seq_len", problem)
        for name, attention in self.model.attentions().items():
            case = attention.case(platform, self.model.numerics.dtype, self.seq_len)
            problem = why_not(attention.kernel, case)
            self.require(problem is None, f"model.{name}.kernel", str(problem))

    def kernels(self, platform: str) -> dict[str, str]:
        """What computes the scores of each attention there, by its field of the model."""
        case = platform, self.model.numerics.dtype, self.seq_len
        return {name: it.kernel_on(*case) for name, it in self.model.attentions().items()}

    def tuned(self, chip: str | None) -> tuple["RunConfig", tpu.Settings]:
        """The run as it is compiled for a chip of `kha_jax.hardware.tpu`, with the kernels that
        `auto` stands for there, and the settings of its compilation; itself and none for None."""
        chip = None if self.mesh.tuning == "none" else chip
        mixture = any(segment.feed_forward.router_width() for segment in self.model.segments())
        settings = tpu.settings(chip, mixture)

        def tune(attention):
            case = attention.case("tpu", self.model.numerics.dtype, self.seq_len)
            takes = attention.kernel == "auto" and why_not(settings.kernel, case) is None
            return attention.replace(kernel=settings.kernel) if takes else attention

        if settings.kernel is None or self.seq_len < tpu.LONG:
            return self, settings
        return self.replace(model=self.model.with_attention(tune)), settings


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored run config, nested, under the names of today."""
    values = copy.deepcopy(dict(values))
    for new, old in OLD_NAMES.items():
        *groups, name = old.split(".")
        group = functools.reduce(lambda at, key: at.get(key, {}), groups, values)
        if name in group:
            group[new.rsplit(".")[-1]] = group.pop(name)
    return values


def old_name(field: str) -> str:
    """The name by which hashes know a dotted field."""
    for new, old in OLD_NAMES.items():
        if f"{field}.".startswith(f"{new}."):
            return old + field.removeprefix(new)
    return field
