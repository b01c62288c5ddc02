"""A model layer by layer: its variables apart, and together again."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kha_jax.model import Block, ModelConfig, block_fields

Variables = dict[str, Any]  # by collection: params, and balance where there is one


class Weights(NamedTuple):
    """Variables as decoding reads them: outside the layers, and layer by layer, so that no step
    slices a stack."""

    outer: Variables
    layers: list[Variables]


def unstack(model: ModelConfig, variables: Variables) -> Weights:
    """The variables of a trained model, one tree a layer."""
    segments = {segment.name: segment.layers for segment in model.segments()}
    pick = jax.jit(
        lambda tree, count: [jax.tree.map(lambda leaf: leaf[i], tree) for i in range(count)],
        static_argnums=1,
    )
    layers = []
    for name, count in segments.items():
        layers += pick(
            {collection: tree[name] for collection, tree in variables.items() if name in tree},
            count,
        )
    outer = {
        c: {key: leaf for key, leaf in tree.items() if key not in segments}
        for c, tree in variables.items()
    }
    return Weights(outer, layers)


def restack(model: ModelConfig, outer: Variables, layers: list[Variables]) -> Variables:
    """The inverse of `unstack`, for a model of as many layers, whose segments may be others."""
    variables, begin = {collection: dict(tree) for collection, tree in outer.items()}, 0
    for segment in model.segments():
        of = layers[begin : begin + segment.layers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of)
        for collection, tree in stacked.items():
            variables.setdefault(collection, {})[segment.name] = tree
        begin += segment.layers
    return variables


def blocks(model: ModelConfig) -> list[Block]:
    """The module of each layer."""
    return [
        Block(**block_fields(model, segment))
        for segment in model.segments()
        for _ in range(segment.layers)
    ]
