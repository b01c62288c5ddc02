"""Folds linear stream mixers into the weights around them.

(x W + b) T = x (W T) + b T: T_q, T_k and T_v go into the weights that make the stream, whatever the
projection (paper, equation 8): W_Q, W_K, W_V for grouped queries, the tied state's weights for GTA,
the query and up-projections for MLA and GLA. The mixer's own module is applied to the weights, so
that every linear mixer folds as it is defined. An MLP or a gate is not linear in its stream and
cannot be folded; score and output mixers stay.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp

from kha_jax.attention.attention import SLOTS, AttentionConfig
from kha_jax.attention.mixers import NoMixer
from kha_jax.config import ConfigError, under
from kha_jax.inference.layers import Variables
from kha_jax.layer import same_tree, shapes
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics

log = logging.getLogger("kha_jax")
EXACT = Numerics(dtype="float32")


def foldable(config: AttentionConfig) -> list[str]:
    """The slots that hold a mixer to fold.

    Raises:
        ConfigError: names a slot whose mixer no weights can stand for, with the reason.
    """
    slots = [slot for slot in SLOTS if type(getattr(config, slot)) is not NoMixer]
    for slot in slots:
        mixer, heads = getattr(config, slot), config.projection.streams(1)[slot][0]
        reason = mixer.why_not_folded(heads)
        if reason:
            raise ConfigError(f"{slot}.kind", f"{type(mixer).__name__} {reason}")
        if slot not in config.projection.stream_weights:
            kind = type(config.projection).__name__
            problem = f"{kind}.stream_weights names no weights of the {slot} stream to fold into"
            raise ConfigError(f"{slot}.kind", problem)
    return slots


def folded_config(config: AttentionConfig) -> AttentionConfig:
    """The config without its stream mixers, whose projection makes the heads that they made."""
    plain = config.projection.with_heads(config.heads_read()["value"])
    return config.replace(projection=plain, **{slot: NoMixer() for slot in SLOTS})


def fold(config: AttentionConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of `folded_config(config)` that compute the same attention.

    Args:
        config: any projection with linear mixers or none.
        parameters: of one attention layer, or of a stack of layers with a leading axis. Products
            are float32, then cast back.

    Raises:
        ConfigError: a mixer does not fold.
        TypeError: another config, such as the layer itself.
        ValueError: the parameters are not this attention's; names the first that is not.
    """
    if not isinstance(config, AttentionConfig):
        found = type(config).__name__
        raise TypeError(f"config: expected an AttentionConfig (layer.attention), found {found}")
    slots = foldable(config)
    stacked = _checked(config, parameters)
    projection = dict(parameters["projection"])
    for slot in slots:
        heads, head_dim, _ = config.projection.streams(1)[slot]
        mixer = getattr(config, slot).build(heads=heads, head_dim=head_dim, numerics=EXACT)
        name, own = config.projection.stream_weights[slot], parameters[f"{slot}_mixer"]

        def product(own, weights, mixer=mixer):
            with jax.default_matmul_precision("highest"):
                folded = mixer.apply({"params": own}, weights.astype(jnp.float32))
            return folded.astype(weights.dtype)

        for part in {name, f"{name}_bias"} & projection.keys():
            folded = jax.vmap(product) if stacked else product
            projection[part] = folded(own, projection[part])
    mixers = {f"{slot}_mixer" for slot in slots}
    rest = {name: leaf for name, leaf in parameters.items() if name not in mixers}
    return {**rest, "projection": projection}


def _checked(config: AttentionConfig, parameters: dict[str, Any]) -> bool:
    """Whether the parameters are those of a stack of layers."""
    if "output" not in parameters:
        found = ", ".join(map(repr, parameters))
        raise ValueError(f"parameters: expected 'output' among those of a layer, found {found}")
    stacked = jnp.ndim(parameters["output"]) == 4
    of_one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[stacked:], leaf.dtype), parameters
    )
    same_tree("parameters", of_one, shapes(config, of_one["output"].shape[-1]))
    return stacked


def foldable_slots(model: ModelConfig) -> list[str]:
    """The slots that hold a mixer to fold in some layer.

    Raises:
        ConfigError: names a slot whose mixer no weights can stand for, with the reason.
    """
    found: set[str] = set()
    for name, attention in model.attentions().items():
        with under(name):
            found |= set(foldable(attention))
    return [slot for slot in SLOTS if slot in found]


def fold_model(model: ModelConfig, variables: Variables) -> tuple[ModelConfig, Variables]:
    """The model without stream mixers and the variables that compute the same logits; see
    `fold`.

    Raises:
        ConfigError: a mixer does not fold.
    """
    params = dict(variables["params"])
    for segment in model.segments():
        layers = params[segment.name]
        folded = fold(segment.attention, layers["attention"])
        params[segment.name] = {**layers, "attention": folded}
    return model.with_attention(folded_config), {**variables, "params": params}


def fold_if_linear(model: ModelConfig, variables: Variables) -> tuple[ModelConfig, Variables]:
    """`fold_model`, or what was given where there is nothing to fold or a mixer that does not."""
    try:
        slots = foldable_slots(model)
    except ConfigError as error:
        log.info("not folded: %s", error)
        return model, variables
    if not slots:
        return model, variables
    log.info("folded linear mixers of %s into the weights", ", ".join(slots))
    return fold_model(model, variables)
