"""Dropless mixtures of feed-forward experts: every assignment is computed, whatever the load.

KERNELS holds the implementations; `auto` takes the platform's best. All of them compute the same
sum, with gradients of x, the weights of the assignments and the experts.

Legend: N tokens, K experts a token, M = N K assignments sorted by expert, E experts, D model width,
F expert width.
"""

import jax
import jax.numpy as jnp

from kha_jax.ops.checkpoint_names import INNER, checkpoint_name
from kha_jax.ops.experts_cpu import blocked
from kha_jax.ops.gating import swiglu


def experts(
    x_ND: jax.Array,
    chosen_NK: jax.Array,
    weights_NK: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    kernel: str = "auto",
    platform: str | None = None,
) -> jax.Array:
    """y_n = sum over k of weights_nk * SwiGLU_(chosen_nk)(x_n), [N, D] in the dtype of x.

    chosen_NK: expert ids; an id outside [0, E) contributes nothing, so that a device may hold a
    part of the experts. platform: where this will run, for `auto`; jax's default backend by
    default.
    """
    kernel = best_kernel(platform or jax.default_backend()) if kernel == "auto" else kernel
    E = gate_EDF.shape[0]
    held_NK = (chosen_NK >= 0) & (chosen_NK < E)
    chosen_NK, weights_NK = (
        jnp.where(held_NK, chosen_NK, E),
        jnp.where(held_NK, weights_NK, 0).astype(x_ND.dtype),
    )
    with jax.named_scope(f"experts_{kernel}"):
        return KERNELS[kernel](x_ND, chosen_NK, weights_NK, gate_EDF, up_EDF, down_EFD)


def best_kernel(platform: str) -> str:
    """The kernel that `auto` stands for: on a CPU jax's ragged_dot multiplies every row with every
    expert."""
    return "blocked" if platform == "cpu" else "ragged"


def _loop(x_ND, chosen_NK, weights_NK, gate_EDF, up_EDF, down_EFD):
    """Every token through every expert, one expert after the other: the formula as written."""
    y_ND = jnp.zeros_like(x_ND)
    for e in range(gate_EDF.shape[0]):
        weight_N = jnp.sum(jnp.where(chosen_NK == e, weights_NK, 0), axis=-1)
        y_ND += weight_N[:, None] * (swiglu(x_ND @ gate_EDF[e], x_ND @ up_EDF[e]) @ down_EFD[e])
    return y_ND


def _ragged(x_ND, chosen_NK, weights_NK, gate_EDF, up_EDF, down_EFD):
    """Rows sorted by expert and jax's grouped matrix product, which TPU and GPU have kernels for.

    Weights multiply the F-wide hidden rows, so that neither the D-wide results nor their weighted
    copies are kept.
    """
    (N, K), E = chosen_NK.shape, gate_EDF.shape[0]
    order_M = jnp.argsort(chosen_NK.reshape(-1), stable=True)
    row_NK = jnp.argsort(order_M).reshape(N, K)
    sizes_E = jnp.sum(jax.nn.one_hot(chosen_NK, E, dtype=jnp.int32), axis=(0, 1))
    x_MD = _spread(x_ND, order_M // K, row_NK)
    weight_M1 = _spread(weights_NK.reshape(-1, 1), order_M, row_NK.reshape(-1, 1))
    products = (jax.lax.ragged_dot(x_MD, weight_EDF, sizes_E) for weight_EDF in (gate_EDF, up_EDF))
    h_MF = swiglu(*(checkpoint_name(product_MF, INNER) for product_MF in products))
    y_MD = jax.lax.ragged_dot(h_MF * weight_M1, down_EFD, sizes_E)
    # rows of experts held elsewhere
    y_MD = jnp.where((jnp.arange(N * K) < jnp.sum(sizes_E))[:, None], y_MD, 0)
    return _collect(y_MD, order_M // K, row_NK)


# Each other's gradients, so that both directions gather; the gradient of plain indexing would
# scatter.
@jax.custom_vjp
def _spread(x_ND, token_M, row_NK):
    """x[token]: a row for each assignment."""
    return x_ND[token_M]


@jax.custom_vjp
def _collect(y_MD, token_M, row_NK):
    """sum over k of y[row_nk]: a row for each token, accumulated in float32."""
    return sum(y_MD[row_NK[:, k]].astype(jnp.float32) for k in range(row_NK.shape[1])).astype(
        y_MD.dtype
    )


_spread.defvjp(
    lambda x, token, row: (_spread(x, token, row), (token, row)),
    lambda ids, dx: (_collect(dx, *ids), None, None),
)
_collect.defvjp(
    lambda y, token, row: (_collect(y, token, row), (token, row)),
    lambda ids, dy: (_spread(dy, *ids), None, None),
)

KERNELS = {"loop": _loop, "ragged": _ragged, "blocked": blocked}
