"""What modules share: how they declare parameters in one line, and what they return beside their
output."""

from typing import Any, Callable, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.config import Config
from kha_jax.ops.norm import inverse_rms, rms_norm


class Numerics(Config):
    """Precision and initial scale, shared by every module of a model."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations and matrix products."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the stored parameters; moments are float32, and updates of bfloat16 rounded at random."""
    init_std: float = 0.02
    """Standard deviation of the initial projections and embeddings."""
    norm_eps: float = 1e-6
    """Added to the mean square in the RMS norms."""

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


class ModuleConfig(Config):
    """A config that builds a module: `X` builds `XModule`, `AttentionConfig` the `Attention` and
    `ModelConfig` the `Transformer` that hold the others."""

    @property
    def module(self) -> type[Module]:
        """The class of its module."""
        raise NotImplementedError

    def build(self, **arguments: Any) -> Any:
        """The module; arguments: its sizes, `numerics`, and its `name` where it has one."""
        return self.module(config=self, **arguments)


class Aux(NamedTuple):
    """What a layer returns beside its output; layers of a scan stack each entry.

    loss: to be added to the loss of each token. counts: a tree of what is summed over micro-batches
    and devices, named as the variables of the collection `balance` that follow from it. metrics:
    what is averaged over micro-batches, by name.
    """

    loss: jax.Array
    counts: dict[str, Any]
    metrics: dict[str, jax.Array]

    def joined(self, **parts: "Aux") -> "Aux":
        """This and the parts' entries, whose counts go under the parts' names.

        Raises:
            ValueError: two of them have a metric of one name.
        """
        counts = {**self.counts, **{name: p.counts for name, p in parts.items() if p.counts}}
        metrics = dict(self.metrics)
        for name, part in parts.items():
            twice = metrics.keys() & part.metrics.keys()
            if twice:
                raise ValueError(f"{name}: the metric {min(twice)!r} is there already")
            metrics |= part.metrics
        return Aux(self.loss + sum(part.loss for part in parts.values()), counts, metrics)


def no_aux() -> Aux:
    """Nothing beside the output."""
    return Aux(jnp.zeros((), jnp.float32), {}, {})


class RMSNorm(Module):
    """`ops.norm.rms_norm` with a learned scale, one weight per entry of the last axis, that starts
    at one. eps: the model's by default."""

    axis: str
    eps: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, of: jax.Array | None = None) -> Any:
        """The normalised array in the dtype of x; with `of` the two factors, x * scale and
        1 / rms(of), for an x that is composed into `of` after it is cached."""
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.numerics.param_dtype))
        eps = self.numerics.norm_eps if self.eps is None else self.eps
        if of is None:
            return rms_norm(x, scale, eps)
        return x * scale.astype(x.dtype), inverse_rms(of, eps)
