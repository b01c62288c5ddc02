"""Mixture of experts with a float32 router, loss-free balancing and dropless computation.

Legend: B batch, T position, N tokens, D model width, E experts, K experts a token, F width of one
expert, L layers.
"""

from typing import Callable, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.feed_forward.swiglu import FeedForward, SwiGLU
from kha_jax.modules import Aux, Module
from kha_jax.ops import experts
from kha_jax.ops.checkpoint_names import ROUTER, checkpoint_name
from kha_jax.sharding import (
    constrain,
    gather,
    index_along,
    per_device,
    platform,
    scatter_sum,
    sum_over,
)

BIAS_RULES = ("rms", "sign", "sign_centred")


class MoE(FeedForward):
    """sum over the chosen experts of weight * SwiGLU_e(x), with scores s = sigmoid(x W_R) in
    float32 (DeepSeek-V3, arXiv 2412.19437).

    The top_k experts of s + bias are chosen; weights are their s alone, divided by their sum, times
    routed_scaling. With groups they are chosen among the experts of groups_used groups, those with
    the largest sums of their two best s + bias (DeepSeek-V3).

    `rms` (Su 2025), `sign` and `sign_centred` (Wang et al., arXiv 2408.15664) move the bias after
    each step (`update_bias`); `auxiliary` adds balancing_rate * E sum_e f_e P_e to the loss, f the
    fraction of assignments and P the mean of the normalised scores (Switch, arXiv 2101.03961).

    What a chunk of tokens keeps for its gradient is recomputed, but for what the model's `remat`
    keeps by name, `none` nothing. Kernels: `kha_jax.ops.experts.KERNELS`.
    """

    experts: int = 16
    """Routed experts, E."""
    top_k: int = 4
    """Experts that a token goes through, K."""
    width: int = 192
    """Inner width of one expert, F."""
    shared_experts: int = 0
    """Experts that are always on, as one SwiGLU of that many times F."""
    dense_layers: int = 0
    """First layers that have a SwiGLU instead."""
    dense_width: int | None = None
    """Inner width of the SwiGLU in dense_layers."""
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    """From the router's logits to s; `softmax` as in Qwen3-MoE."""
    normalise: bool = True
    """Whether the weights of the chosen experts are divided by their sum."""
    groups: int = 1
    """Groups of neighbouring experts, a divisor of E."""
    groups_used: int = 1
    """Groups that a token chooses its experts from."""
    routed_scaling: float = 1.0
    """Factor on the weights of the chosen experts."""
    balancing: Literal["rms", "sign", "sign_centred", "auxiliary", "none"] = "rms"
    """How the load is evened out: a bias (`rms`, `sign`, `sign_centred`), a loss, or nothing."""
    balancing_rate: float | None = None
    """Step of the bias, 1e-3 by default, or weight of the auxiliary loss, 0.01 by default."""
    router_z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits."""
    kernel: Literal["auto", "blocked", "ragged", "loop"] = "auto"
    """What multiplies tokens with experts; `auto`: the platform's best."""
    chunk_tokens: int | None = None
    """Tokens of a device that go through the experts at once; None: all."""

    def validate(self):
        self.at_least(1, "experts", "top_k", "width", "dense_width", "chunk_tokens")
        self.at_least(1, "groups", "groups_used")
        self.at_least(0, "shared_experts", "dense_layers", "router_z_loss", "balancing_rate")
        problem = f"must be at most experts={self.experts}, found {self.top_k}"
        self.require(self.top_k <= self.experts, "top_k", problem)
        G, used, E = self.groups, self.groups_used, self.experts
        problem = f"must divide experts={E} into groups of two or more, found {G}"
        self.require(G == 1 or E % G == 0 and E >= 2 * G, "groups", problem)
        self.require(used <= G, "groups_used", f"must be at most groups={G}, found {used}")
        problem = f"must hold top_k={self.top_k} experts, found {used} of {E // G}"
        self.require(used * E // G >= self.top_k, "groups_used", problem)
        self.require(
            self.routed_scaling > 0,
            "routed_scaling",
            f"must be positive, found {self.routed_scaling}",
        )
        problem = f"does nothing with balancing='none', found {self.balancing_rate}; set it to 0"
        self.require(not self.balancing_rate or self.balancing != "none", "balancing_rate", problem)
        problem = (
            f"is needed for dense_layers={self.dense_layers}, and only then; found "
            f"{self.dense_width}"
        )
        self.require(
            (self.dense_width is not None) == (self.dense_layers > 0), "dense_width", problem
        )

    def rate(self) -> float:
        """balancing_rate, or the default of the balancing."""
        default = 0.01 if self.balancing == "auxiliary" else 1e-3
        return default if self.balancing_rate is None else self.balancing_rate

    def segments(self, layers):
        self.require(
            self.dense_layers < layers,
            "dense_layers",
            f"must be below layers={layers}, found {self.dense_layers}",
        )
        first = (
            [("dense_layers", self.dense_layers, SwiGLU(width=self.dense_width))]
            if self.dense_layers
            else []
        )
        return [*first, ("layers", layers - self.dense_layers, self)]

    def parameters(self, model_width):
        return self._parameters(model_width, self.experts)  # the bias is none

    def active_parameters(self, model_width):
        return self._parameters(model_width, self.top_k)

    def _parameters(self, model_width: int, experts: int) -> int:
        return model_width * self.experts + 3 * model_width * self.width * (
            experts + self.shared_experts
        )

    def stream_floats(self, model_width):
        return (
            self.top_k * (2 * model_width + 3 * self.width) + 3 * self.width * self.shared_experts
        )

    def inner_floats(self, model_width):
        return 2 * self.width * (self.top_k + self.shared_experts)

    def router_width(self):
        return self.experts

    def tokens_at_once(self, tokens):
        return min(tokens, self.chunk_tokens or tokens)

    @property
    def module(self):
        return MoEModule


class MoEModule(Module):
    """See MoE. The bias is the variable `bias` [E] of the collection `balance`; this module only
    reads it."""

    config: MoE
    model_width: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Aux]:
        """The layer's output [B, T, D]; beside it the router's loss, and the assignments of each
        expert [E] as the counts of `bias`."""
        c, D, F = self.config, self.model_width, self.config.width
        with jax.named_scope("router"):
            router_DE = self.weight("router", dtype="float32", embed=D, router=c.experts)
            logits_BTE = jnp.einsum(
                "BTD,DE->BTE",
                x_BTD.astype(jnp.float32),
                router_DE,
                precision=jax.lax.Precision.HIGHEST,
            )
            logits_BTE = checkpoint_name(logits_BTE, ROUTER)
            bias_E = 0.0
            if c.balancing in BIAS_RULES:
                bias_E = self.variable(
                    "balance", "bias", jnp.zeros, (c.experts,), jnp.float32
                ).value
            scores_BTE, chosen_BTK, weights_BTK = route(c, logits_BTE, bias_E)
            counts_E = jnp.sum(
                jax.nn.one_hot(chosen_BTK, c.experts, dtype=jnp.int32), axis=(0, 1, 2)
            )
        weights = (
            self.weight("gate", experts=c.experts, expert_embed=D, feed_forward=F),
            self.weight("up", experts=c.experts, expert_embed=D, feed_forward=F),
            self.weight("down", experts=c.experts, feed_forward=F, expert_embed=D),
        )
        y_BTD = exchange(x_BTD, chosen_BTK, weights_BTK, weights, c)
        if c.shared_experts:
            shared = SwiGLU(width=c.shared_experts * F).build(
                model_width=D, numerics=self.numerics, name="shared"
            )
            y_BTD += shared(x_BTD)[0]
        loss = router_loss(c, logits_BTE, scores_BTE, counts_E)
        aux = Aux(loss, {"bias": jax.lax.stop_gradient(counts_E)}, {})
        return constrain(y_BTD, "batch", "length", "features"), aux


def route(
    config: MoE, logits_BTE: jax.Array, bias_E: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scores [B, T, E], the chosen experts [B, T, K] and their weights."""
    scores = nn.sigmoid if config.scores == "sigmoid" else nn.softmax
    scores_BTE = scores(logits_BTE)
    biased_BTE = jax.lax.stop_gradient(scores_BTE + bias_E)
    if config.groups > 1:
        biased_BTE = within_groups(config, biased_BTE)
    chosen_BTK = checkpoint_name(jax.lax.top_k(biased_BTE, config.top_k)[1], ROUTER)
    weights_BTK = jnp.take_along_axis(scores_BTE, chosen_BTK, axis=-1)
    scale = config.routed_scaling
    if config.normalise:
        scale /= jnp.maximum(jnp.sum(weights_BTK, axis=-1, keepdims=True), 1e-20)
    return scores_BTE, chosen_BTK, weights_BTK * scale


def within_groups(config: MoE, biased_BTE: jax.Array) -> jax.Array:
    """The scores of the experts in the groups_used best groups, and -inf for all others."""
    biased_BTGe = biased_BTE.reshape(*biased_BTE.shape[:2], config.groups, -1)
    two_best_BTG = jnp.sum(jax.lax.top_k(biased_BTGe, 2)[0], axis=-1)
    used_BTu = jax.lax.top_k(two_best_BTG, config.groups_used)[1]
    used_BTG = jnp.any(jax.nn.one_hot(used_BTu, config.groups, dtype=bool), axis=-2)
    return jnp.where(used_BTG[..., None], biased_BTGe, -jnp.inf).reshape(biased_BTE.shape)


def router_loss(
    config: MoE, logits_BTE: jax.Array, scores_BTE: jax.Array, counts_E: jax.Array
) -> jax.Array:
    """What the router adds to the loss of each token: the auxiliary balancing loss and the z-loss,
    as the config has them."""
    total = jnp.zeros((), jnp.float32)
    if config.router_z_loss:
        total += config.router_z_loss * jnp.mean(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)))
    if config.balancing == "auxiliary":
        share_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
        fraction_E = counts_E / jnp.sum(counts_E)
        total += (
            config.rate() * config.experts * jnp.vdot(fraction_E, jnp.mean(share_BTE, axis=(0, 1)))
        )
    return total


def exchange(
    x_BTD: jax.Array, chosen_BTK: jax.Array, weights_BTK: jax.Array, weights: tuple, config: MoE
) -> jax.Array:
    """`ops.experts.experts` over the mesh: each device computes the tokens of all devices that
    split the experts for those that it holds.

    Tokens are gathered over them and their results summed back by reduce-scatter: with no row
    dropped and shapes that do not depend on the load, an all-to-all has to make room for every
    token at every part of the experts, top_k times over, so this moves the fewest bytes. The expert
    width is split as any feed-forward's; where FSDP splits the weights they are gathered before.
    """

    def local(x, chosen, gates, gate, up, down):
        _, T, D = x.shape
        x, chosen, gates = (gather(z, "experts") for z in (x, chosen, gates))
        chosen = chosen - index_along("experts") * gate.shape[0]

        def compute(x, chosen, gates):
            return experts.experts(x, chosen, gates, gate, up, down, config.kernel, platform())

        y = in_chunks(
            compute, config.chunk_tokens, *(z.reshape(-1, z.shape[-1]) for z in (x, chosen, gates))
        ).reshape(-1, T, D)
        return scatter_sum(sum_over(y, "feed_forward"), "experts")

    tokens, wide = ("batch", "length", None), ("experts", None, "feed_forward")
    in_axes = (tokens, tokens, tokens, wide, wide, ("experts", "feed_forward", None))
    return per_device(local, in_axes, tokens)(x_BTD, chosen_BTK, weights_BTK, *weights)


def in_chunks(function: Callable, chunk_tokens: int | None, *arguments: jax.Array) -> jax.Array:
    """function(*arguments) over rows, at most about chunk_tokens of them at once, keeping nothing
    but its arguments for the gradient."""
    rows = arguments[0].shape[0]
    if chunk_tokens is None or rows <= chunk_tokens:
        return function(*arguments)
    chunk = next(size for size in range(chunk_tokens, 0, -1) if rows % size == 0)
    pieces = [z.reshape(-1, chunk, *z.shape[1:]) for z in arguments]
    _, y = jax.lax.scan(
        lambda _, piece: (None, jax.checkpoint(function)(*piece)), None, tuple(pieces)
    )
    return y.reshape(rows, *y.shape[2:])


def update_bias(config: MoE, bias_LE: jax.Array, counts_LE: jax.Array) -> jax.Array:
    """The bias after a step, from all assignments of that step; a row of counts that is even leaves
    its bias.

    With F = c / sum(c) and Q = 1/E: rms b - a (F - Q) / RMS(F - Q); sign b + a s with s =
    sign(mean(c) - c); sign_centred b + a (s - mean(s)).

    F - Q is computed as c E - sum(c), E sum(c) times as much, in int32: float32 has no mean that
    every even row of counts is equal to. A run's config bounds it (`RunConfig.validate`).
    """
    total_L1 = jnp.sum(counts_LE, axis=-1, keepdims=True)
    excess_LE = (counts_LE * counts_LE.shape[-1] - total_L1).astype(jnp.float32)
    if config.balancing == "rms":
        size_L1 = jnp.sqrt(jnp.mean(jnp.square(excess_LE), axis=-1, keepdims=True))
        move_LE = -excess_LE / jnp.where(size_L1 > 0, size_L1, 1)
    else:
        move_LE = -jnp.sign(excess_LE)
        if config.balancing == "sign_centred":
            move_LE -= jnp.mean(move_LE, axis=-1, keepdims=True)
    return bias_LE + config.rate() * move_LE


def load_metrics(counts_LE: jax.Array, bias_LE: jax.Array | None) -> dict[str, jax.Array]:
    """Per layer [L]: max_violation (max - mean) / mean, load_entropy over its maximum log E, the
    smallest and the largest load over the mean load, and the range of the bias."""
    load_LE = counts_LE / jnp.mean(counts_LE, axis=-1, keepdims=True)
    share_LE = load_LE / counts_LE.shape[-1]
    entropy_L = -jnp.sum(
        jnp.where(share_LE > 0, share_LE * jnp.log(jnp.where(share_LE > 0, share_LE, 1)), 0),
        axis=-1,
    )
    largest_L = jnp.max(load_LE, axis=-1)
    metrics = {
        "max_violation": largest_L - 1,
        "load_entropy": entropy_L / jnp.log(jnp.maximum(counts_LE.shape[-1], 2)),
        "smallest_load": jnp.min(load_LE, axis=-1),
        "largest_load": largest_L,
    }
    if bias_LE is not None:
        metrics["bias_range"] = jnp.max(bias_LE, axis=-1) - jnp.min(bias_LE, axis=-1)
    return metrics
