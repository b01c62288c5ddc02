"""Cross-entropy over a large vocabulary that never holds [tokens, vocabulary] at once.

Legend: B batch, T position, C positions of one chunk, D model width, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenSums(NamedTuple):
    """Sums over weighted tokens, so that micro-batches and hosts add up exactly.

    loss: nats of cross-entropy. z_loss: sum of squared log-partition values. correct: tokens whose
    label has the largest logit. tokens: sum of the weights.
    """

    loss: jax.Array
    z_loss: jax.Array
    correct: jax.Array
    tokens: jax.Array


def _chunk_length(batch: int, length: int, chunk_tokens: int) -> int:
    """The longest divisor of `length` that keeps batch * divisor within chunk_tokens (at least
    1)."""
    return next(
        size
        for size in range(length, 0, -1)
        if length % size == 0 and (size * batch <= chunk_tokens or size == 1)
    )


def _split(z: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T / C, B, C, ...]: chunks run along positions, so a sharded batch stays where
    it is."""
    return jnp.moveaxis(z.reshape(z.shape[0], -1, chunk, *z.shape[2:]), 1, 0)


def _chunk_sums(x_BCD, table_VD, targets_BC, weights_BC):
    """Sums of one chunk, and what its gradient needs: the logits and their log-partition."""
    logits = jnp.einsum(
        "BCD,VD->BCV", x_BCD, table_VD.astype(x_BCD.dtype), preferred_element_type=jnp.float32
    )
    top = jnp.max(logits, axis=-1)
    log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    label = jnp.take_along_axis(logits, targets_BC[..., None], axis=-1)[..., 0]
    sums = TokenSums(
        loss=jnp.sum((log_z - label) * weights_BC),
        z_loss=jnp.sum(jnp.square(log_z) * weights_BC),
        correct=jnp.sum((label >= top) * weights_BC),
        tokens=jnp.sum(weights_BC),
    )
    return sums, (logits, log_z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _objective(x_BTD, table_VD, targets_BT, weights_BT, z_loss, chunk):
    def body(total, piece):
        x, targets, weights = piece
        return jax.tree.map(jnp.add, total, _chunk_sums(x, table_VD, targets, weights)[0]), None

    zero = TokenSums(*(jnp.zeros((), jnp.float32) for _ in TokenSums._fields))
    sums, _ = jax.lax.scan(
        body, zero, tuple(_split(z, chunk) for z in (x_BTD, targets_BT, weights_BT))
    )
    return sums.loss + z_loss * sums.z_loss, sums


def _objective_forward(x_BTD, table_VD, targets_BT, weights_BT, z_loss, chunk):
    """The gradient of a sum is known up to one scalar, so it is built while the chunk's logits are
    at hand."""

    def body(carry, piece):
        total, d_table = carry
        x, targets, weights = piece
        sums, (logits, log_z) = _chunk_sums(x, table_VD, targets, weights)
        probability_weight = weights * (1.0 + 2.0 * z_loss * log_z)
        d_logits = jnp.exp(logits - log_z[..., None]) * probability_weight[..., None]
        is_label = targets[..., None] == jnp.arange(logits.shape[-1])
        d_logits = (d_logits - jnp.where(is_label, weights[..., None], 0.0)).astype(x.dtype)
        d_x = jnp.einsum("BCV,VD->BCD", d_logits, table_VD.astype(x.dtype))
        d_table += jax.lax.platform_dependent(
            d_logits, x, cpu=_table_gradient_cpu, default=_table_gradient
        )
        return (jax.tree.map(jnp.add, total, sums), d_table), d_x

    zero = TokenSums(*(jnp.zeros((), jnp.float32) for _ in TokenSums._fields))
    pieces = tuple(_split(z, chunk) for z in (x_BTD, targets_BT, weights_BT))
    (sums, d_table), d_x = jax.lax.scan(
        body, (zero, jnp.zeros(table_VD.shape, jnp.float32)), pieces
    )
    d_x = jnp.moveaxis(d_x, 0, 1).reshape(x_BTD.shape)
    return (sums.loss + z_loss * sums.z_loss, sums), (d_x, d_table.astype(table_VD.dtype))


def _table_gradient(d_logits_BCV, x_BCD):
    return jnp.einsum("BCV,BCD->VD", d_logits_BCV, x_BCD, preferred_element_type=jnp.float32)


def _table_gradient_cpu(d_logits_BCV, x_BCD):
    """The same as a transposed product, fenced off so that it stays one: XLA's CPU backend
    otherwise transposes the gradient of the logits, V wide, before it multiplies."""
    product_DV = jnp.einsum("BCD,BCV->DV", x_BCD, d_logits_BCV, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product_DV).T


def _objective_backward(z_loss, chunk, residuals, cotangents):
    d_x, d_table = residuals
    scale = cotangents[0]
    return d_x * scale.astype(d_x.dtype), d_table * scale.astype(d_table.dtype), None, None


_objective.defvjp(_objective_forward, _objective_backward)


def cross_entropy(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
) -> tuple[jax.Array, TokenSums]:
    """sum_t w_t (log Z_t - logit[target_t] + z_loss (log Z_t)^2), log Z_t the log-sum-exp of x_t
    table^T.

    Works through chunks of about `chunk_tokens` tokens; forward and backward hold one chunk of
    logits only. Gradients reach x_BTD and table_VD through the first result; the sums are for
    reporting and carry none.

    Args:
        x_BTD: final hidden states.
        table_VD: output embedding; cast to the dtype of x for the products, which accumulate in
            float32.
        targets_BT: label of every position, in [0, V).
        weights_BT: float32, 0 where a position does not count.
        z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).
        chunk_tokens: upper bound on the tokens of a chunk.

    Returns:
        The objective, a scalar sum in float32, and the TokenSums.
    """
    chunk = _chunk_length(*x_BTD.shape[:2], chunk_tokens)
    with jax.named_scope("cross_entropy"):
        return _objective(x_BTD, table_VD, targets_BT, weights_BT, z_loss, chunk)
