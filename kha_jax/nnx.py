"""`kha_jax.Attention` as an nnx module: the same one, in nnx's bridge."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from kha_jax import layer
from kha_jax.sharding import on_mesh


class Attention(nnx.bridge.ToNNX):
    """`kha_jax.Attention` with parameters from the start: nnx.Param of plain arrays, under the
    names that they have in linen's tree.

    Takes its fields, and rngs: for the initial parameters. `mutable=["losses"]` in a call sets
    what mixture of heads adds to the loss, as the attribute `attention`.
    """

    def __init__(self, *, rngs: nnx.Rngs, **fields: Any):
        super().__init__(layer.Attention(**fields), rngs=rngs)
        x = jnp.zeros((1, 1, self.to_nnx__module.width), jnp.float32)
        on_mesh(None, self.lazy_init)(x)
        self.to_nnx__rngs = None  # nothing is drawn after this
