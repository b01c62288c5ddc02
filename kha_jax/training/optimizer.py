"""AdamW with warm-up and a decay of the rate, per-role weight decay, and the training of the
matrices of mixers.

A parameter's role follows from its logical axes: the small matrices of mixers carry `mixer_in` and
have the role `mixer`, other parameters with two or more axes are weights, and the rest (norm
scales, biases) are vectors, which are never decayed. The axes of the features of heads count as
one, and layers as none.

Everything between a gradient and its update is float32, whatever the parameters are stored as.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from kha_jax.model import ModelConfig
from kha_jax.training.run_config import OptimizerConfig, RunConfig

FEATURES = ("heads", "kv_heads", "head_dim")  # axes of what a projection makes


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update number `count` (from 0): warm-up to the peak, then down to
    final_fraction of it, by a cosine or, with `wsd`, linearly in the last steps alone."""
    warmup = max(1, round(config.warmup_fraction * steps))
    peak, final = config.learning_rate, config.final_fraction
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    if config.schedule == "cosine":
        cosine = optax.cosine_decay_schedule(peak, max(1, steps - warmup), final)
        return optax.join_schedules([rise, cosine], [warmup])
    decay = max(1, round(config.decay() * steps))
    stable_end = max(warmup, steps - decay)
    fall = optax.linear_schedule(peak, final * peak, decay)
    stable = optax.constant_schedule(peak)
    return optax.join_schedules([rise, stable, fall], [warmup, stable_end])


def roles(axes: Any) -> Any:
    """The role of every parameter (`mixer`, `weight` or `vector`) from a tree of logical axis
    names."""

    def one(names: tuple[str, ...]) -> str:
        if "mixer_in" in names:
            return "mixer"
        axes = {"feature" if name in FEATURES else name for name in names} - {"layers"}
        return "weight" if len(axes) >= 2 else "vector"

    return jax.tree.map(one, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def trained(config: OptimizerConfig, axes: Any) -> frozenset[tuple[str, ...]]:
    """The paths of the parameters that are trained: all, or those of the mixers of attention."""
    paths = flatten_dict(axes)
    if config.trainable == "all":
        return frozenset(paths)
    return frozenset(path for path in paths if any(name.endswith("_mixer") for name in path))


def value_weights(model: ModelConfig) -> frozenset[tuple[str, ...]]:
    """The paths of the weights that make the values of attention; projections of your own may have
    none."""
    return frozenset(
        (part.name, "attention", "projection", part.attention.projection.stream_weights["value"])
        for part in model.segments()
        if "value" in part.attention.projection.stream_weights
    )


def only(paths: frozenset[tuple[str, ...]], tree: Any) -> Any:
    """The tree of the leaves at these paths."""
    return unflatten_dict(
        {path: leaf for path, leaf in flatten_dict(tree).items() if path in paths}
    )


def overlaid(part: Any, whole: Any) -> Any:
    """The whole tree with the leaves of a part in their places."""
    return unflatten_dict({**flatten_dict(whole), **flatten_dict(part)})


def _clip(bound: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm for a caller that has the norm already."""

    def update(grads, state, parameters=None, *, norm=None):
        norm = optax.tree.norm(grads) if norm is None else norm
        return jax.tree.map(lambda g: jnp.where(norm < bound, g, g / norm * bound), grads), state

    return optax.GradientTransformationExtraArgs(lambda parameters: optax.EmptyState(), update)


def make(
    config: OptimizerConfig,
    steps: int,
    axes: Any,
    initial_mixers: Any = None,
    values: frozenset[tuple[str, ...]] = frozenset(),
) -> optax.GradientTransformationExtraArgs:
    """The optimiser for parameters with the given logical axes. Its `update` takes the gradients'
    global `norm` too, and computes it where it is not given.

    Args:
        config: see OptimizerConfig.
        steps: length of the run, for the schedule.
        axes: tree of logical axis names, shaped like the parameters.
        initial_mixers: tree shaped like the parameters that holds the initial value of every
            mixer's matrix (anything elsewhere); needed for the decay `to_identity`.
        values: paths of the weights that make the values (`value_weights`), which have a
            multiplier of their own.
    """
    role = roles(axes)
    mixer = config.mixer

    def decayed(update, parameter, name, target):
        if name == "vector" or (name == "mixer" and mixer.decay == "none"):
            return update
        to_target = name == "mixer" and mixer.decay == "to_identity"
        return update + config.weight_decay * (parameter - target if to_target else parameter)

    def factor(path, name):
        if path in values:
            return config.value_learning_rate_multiplier
        return mixer.learning_rate_multiplier if name == "mixer" else 1.0

    factors = {path: factor(path, name) for path, name in flatten_dict(role).items()}
    factors = unflatten_dict(factors)

    def decay_and_scale(updates, parameters):
        targets = role if initial_mixers is None else initial_mixers
        updates = jax.tree.map(decayed, updates, parameters, role, targets)
        return jax.tree.map(operator.mul, updates, factors)

    chain = optax.chain(
        _clip(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.stateless(decay_and_scale),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )

    def update(grads, state, parameters, *, norm=None):
        return chain.update(float32(grads), state, float32(parameters), norm=norm)

    return optax.GradientTransformationExtraArgs(lambda born: chain.init(float32(born)), update)


def float32(tree: Any) -> Any:
    """The tree with float32 leaves."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def apply_updates(parameters: Any, updates: Any, key: jax.Array) -> Any:
    """parameters + updates. Where they are bfloat16 the sum is rounded up or down at random, so
    that updates below their precision (2^-8) are kept in the mean and not lost (arXiv 2010.06192).
    """
    leaves, tree = jax.tree.flatten(parameters)
    added = []
    for number, (leaf, update) in enumerate(zip(leaves, tree.flatten_up_to(updates), strict=True)):
        total = leaf.astype(jnp.float32) + update
        rounds = leaf.dtype == jnp.bfloat16
        added.append(round_at_random(total, jax.random.fold_in(key, number)) if rounds else total)
    return tree.unflatten(added)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of its two neighbours in bfloat16, which is x in the mean."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half: a carry out of the lower one goes to the neighbour away from zero
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits &= jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def learning_rate(config: OptimizerConfig, steps: int, optimizer_state: Any) -> jax.Array:
    """The learning rate that the next update will use."""
    return jnp.asarray(schedule(config, steps)(optimizer_state[-1].count), jnp.float32)


def jump(old: RunConfig, new: RunConfig, updates: int) -> tuple[float, float] | None:
    """The learning rate of the next update of a run that has applied so many and goes on with
    another config, as it was and as it is now; None where it is the same."""
    before, after = (schedule(run.optimizer, run.steps) for run in (old, new))
    rates = float(before(updates)), float(after(updates))
    return None if rates[0] == rates[1] else rates
