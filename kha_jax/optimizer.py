"""AdamW with warm-up and cosine decay, per-role weight decay, and the knobs of the knocking
matrices.

A parameter's role follows from its logical axes: the small matrices of mixers carry `mixer_in` and
have the role `knocking`, other parameters with two or more axes (layers not counted) are weights,
and the rest (norm scales) are vectors, which are never decayed.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from kha_jax.config import Config
from kha_jax.ops import matrices

TRACE = "knocking/"  # what the names of the trace's metrics begin with


class KnockingOptimizerConfig(Config):
    """How knocking matrices are trained.

    decay: `weights` shrinks them like any weight (the paper states no exclusion), `none` leaves
    them alone, `to_identity` pulls them back to their initial value. learning_rate_multiplier:
    factor on their learning rate.
    """

    decay: Literal["weights", "none", "to_identity"] = "weights"
    learning_rate_multiplier: float = 1.0

    def validate(self):
        self.at_least(0, "learning_rate_multiplier")


class OptimizerConfig(Config):
    """AdamW (arXiv 1711.05101), the paper's section 4.1 by default.

    learning_rate: at the peak. warmup_fraction: share of the steps with a linear rise.
    final_fraction: share of the peak that the cosine ends at. weight_decay: decoupled. clip_norm:
    bound on the global gradient norm.
    """

    learning_rate: float = 7.5e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    warmup_fraction: float = 0.05
    final_fraction: float = 0.1
    knocking: KnockingOptimizerConfig = KnockingOptimizerConfig()

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
        self.at_least(0, "weight_decay")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update number `count` (from 0): warm-up to the peak, then cosine to
    final_fraction of it."""
    warmup = max(1, round(config.warmup_fraction * steps))
    peak = config.learning_rate
    cosine = optax.cosine_decay_schedule(peak, max(1, steps - warmup), config.final_fraction)
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, cosine], [warmup])


def roles(axes: Any) -> Any:
    """The role of every parameter (`knocking`, `weight` or `vector`) from a tree of logical axis
    names."""

    def one(names: tuple[str, ...]) -> str:
        if "mixer_in" in names:
            return "knocking"
        return "weight" if len([name for name in names if name != "layers"]) >= 2 else "vector"

    return jax.tree.map(one, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def trace(params: Any, role: Any) -> dict[str, jax.Array]:
    """How far every matrix of a mixer has come, one number a layer: `identity_distance` (of T - I;
    a gate starts at 0 and so at 1), `diagonal_mean`, `off_diagonal_share` and `spectral_norm` under
    `knocking/SEGMENT/PLACE/MATRIX/`, such as `knocking/layers/value/kernel/diagonal_mean`.

    A `residual` D is measured as the I + D that it stands for; where each head has a matrix of its
    own, the numbers are their means. See `ops.matrices`.
    """
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), name in zip(leaves, jax.tree.leaves(role), strict=True):
        keys = [str(key.key) for key in path]
        if name != "knocking" or not keys[-2].endswith("_mixer"):
            continue
        parts = [key.removesuffix("_mixer") for key in keys]
        T = leaf.astype(jnp.float32)
        T = T + jnp.eye(*T.shape[-2:]) if parts[-1] == "residual" else T
        where = TRACE + "/".join(part for part in parts if part != "attention")
        for measure in (
            matrices.identity_distance,
            matrices.diagonal_mean,
            matrices.off_diagonal_share,
            matrices.spectral_norm,
        ):
            found[f"{where}/{measure.__name__}"] = measure(T).reshape(len(T), -1).mean(-1)
    return found


def _clip(bound: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm for a caller that has the norm already."""

    def update(grads, state, parameters=None, *, norm=None):
        norm = optax.tree.norm(grads) if norm is None else norm
        return jax.tree.map(lambda g: jnp.where(norm < bound, g, g / norm * bound), grads), state

    return optax.GradientTransformationExtraArgs(lambda parameters: optax.EmptyState(), update)


def make(
    config: OptimizerConfig, steps: int, axes: Any, initial_knocking: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The optimiser for parameters with the given logical axes. Its `update` takes the gradients'
    global `norm` too, and computes it where it is not given.

    Args:
        config: see OptimizerConfig.
        steps: length of the run, for the schedule.
        axes: tree of logical axis names, shaped like the parameters.
        initial_knocking: tree shaped like the parameters that holds the initial value of every
            knocking matrix (anything elsewhere); needed for knocking decay `to_identity`.
    """
    role = roles(axes)
    knocking = config.knocking

    def decayed(update, parameter, name, target):
        if name == "vector" or (name == "knocking" and knocking.decay == "none"):
            return update
        to_target = name == "knocking" and knocking.decay == "to_identity"
        return update + config.weight_decay * (parameter - target if to_target else parameter)

    def scaled(update, name):
        return update * knocking.learning_rate_multiplier if name == "knocking" else update

    def decay_and_scale(updates, parameters):
        targets = role if initial_knocking is None else initial_knocking
        updates = jax.tree.map(decayed, updates, parameters, role, targets)
        return jax.tree.map(scaled, updates, role)

    return optax.chain(
        _clip(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.stateless(decay_and_scale),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def learning_rate(config: OptimizerConfig, steps: int, optimizer_state: Any) -> jax.Array:
    """The learning rate that the next update will use."""
    return jnp.asarray(schedule(config, steps)(optimizer_state[-1].count), jnp.float32)
