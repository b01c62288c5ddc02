"""How a module declares its parameters: name, initial value, logical axes and sizes in one line."""

from typing import Callable, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.config import Config
from kha_jax.ops.norm import rms_norm


class Numerics(Config):
    """Precision and initial scale, shared by every module of a model.

    dtype: of activations and matrix products. param_dtype: of the stored parameters. init_std:
    standard deviation of the initial projections and embeddings. norm_eps: of the RMS norms.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    init_std: float = 0.02
    norm_eps: float = 1e-6

    def validate(self):
        self.require(self.init_std > 0, "init_std", f"must be positive, found {self.init_std}")
        self.require(self.norm_eps > 0, "norm_eps", f"must be positive, found {self.norm_eps}")


class Module(nn.Module):
    """Base of all modules: parameters are declared by logical axis names (`sharding.RULES`) and
    cast where they are used."""

    numerics: Numerics

    def weight(
        self, name: str, init: Callable | None = None, dtype: str | None = None, **axes: int
    ) -> jax.Array:
        """A parameter with one `logical axis=size` per dimension, normal(init_std) by default, cast
        to `dtype` or the compute dtype."""
        init = nn.initializers.normal(self.numerics.init_std) if init is None else init
        boxed_init = nn.with_logical_partitioning(init, tuple(axes))
        parameter = self.param(
            name, boxed_init, tuple(axes.values()), jnp.dtype(self.numerics.param_dtype)
        )
        return parameter.astype(dtype or self.numerics.dtype)


class RMSNorm(Module):
    """`ops.norm.rms_norm` with a learned scale, one weight per entry of the last axis, that starts
    at one."""

    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The normalised array in the dtype of x."""
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.numerics.param_dtype))
        return rms_norm(x, scale, self.numerics.norm_eps)
