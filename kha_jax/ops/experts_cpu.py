"""Dropless experts on a CPU, where jax's grouped product costs every expert for every row.

The first C assignments of each expert, C a little above the mean load, are computed as one batched
product over experts; what exceeds C follows in a loop over blocks of rows, as many as there are.
With an even load nothing exceeds; with all tokens on one expert nearly everything does, and is
still computed.

Legend: N tokens, K experts a token, M = N K assignments, E experts, C slots of each, D model width,
F expert width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kha_jax.ops.gating import swiglu

MARGIN = 2.5  # of C over the mean load, in standard deviations of a load drawn at random
BLOCK = 64  # rows of one product of the loop


class Plan(NamedTuple):
    """Where each assignment is computed. order_M: assignments sorted by expert, then padding;
    starts_E, sizes_E: each expert's range in it; slot_NK: the slot e C + c of each assignment, or E
    C for those of the loop."""

    order_M: jax.Array
    starts_E: jax.Array
    sizes_E: jax.Array
    slot_NK: jax.Array


def _slots(assignments: int, experts: int) -> int:
    """C: none where most experts would be idle, as in decoding, since every slot costs its expert's
    weights."""
    mean = assignments / experts
    return 0 if mean < 8 else int(-(-(mean + MARGIN * mean**0.5) // 8) * 8)


def _plan(chosen_NK: jax.Array, E: int, C: int) -> Plan:
    chosen_M, M = chosen_NK.reshape(-1), chosen_NK.size
    if (E + 1) * M > 2**32:
        raise ValueError(f"{M:,} assignments to {E} experts at once: raise accumulation")
    # Expert and assignment in one number, since sorting pairs takes three times as long.
    key_M = jnp.sort(chosen_M.astype(jnp.uint32) * M + jnp.arange(M, dtype=jnp.uint32))
    order_M = (key_M % M).astype(jnp.int32)
    # where each expert's range begins, and the rank of each assignment in its own
    bounds = jnp.searchsorted(key_M, jnp.arange(E + 1, dtype=jnp.uint32) * M)
    place_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(order_M.size, dtype=order_M.dtype))
    rank_M = place_M - bounds[jnp.minimum(chosen_M, E)]
    # the first C of an expert have slots, the others are left to the loop
    slot_M = jnp.where((rank_M < C) & (chosen_M < E), chosen_M * C + rank_M, E * C)
    order_M = jnp.pad(order_M, (0, BLOCK))
    return Plan(order_M, bounds[:-1], bounds[1:] - bounds[:-1], slot_M.reshape(chosen_NK.shape))


def _heads(plan: Plan, C: int, weights_NK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token and weight [E, C] of each slot; the weight of an empty one is 0."""
    at_EC = plan.starts_E[:, None] + jnp.arange(C)
    assignment_EC = plan.order_M[at_EC]
    filled_EC = jnp.arange(C) < plan.sizes_E[:, None]
    return assignment_EC // weights_NK.shape[1], jnp.where(
        filled_EC, weights_NK.reshape(-1)[assignment_EC], 0
    )


def _gather(z_ECD: jax.Array, slot_NK: jax.Array, weights_NK: jax.Array) -> jax.Array:
    """sum over k of weights_nk z[slot_nk]; assignments without a slot count as zero."""
    z_SD = z_ECD.reshape(-1, z_ECD.shape[-1])
    S, total = z_SD.shape[0], 0
    for k in range(slot_NK.shape[1]):
        weight_N = jnp.where(slot_NK[:, k] < S, weights_NK[:, k], 0)
        total += weight_N[:, None] * z_SD[jnp.minimum(slot_NK[:, k], S - 1)]
    return total


def _overflow(plan: Plan, C: int, K: int, body, carry):
    """carry = body(expert, assignments [BLOCK], which of them count, carry) over the blocks that
    the slots leave over."""
    left_E = jnp.maximum(plan.sizes_E - C, 0)
    busy = jnp.argsort(left_E == 0, stable=True)

    def expert(i, carry):
        e = busy[i]

        def block(b, carry):
            start = plan.starts_E[e] + C + b * BLOCK
            assignment = jax.lax.dynamic_slice_in_dim(plan.order_M, start, BLOCK)
            return body(e, assignment, jnp.arange(BLOCK) < left_E[e] - b * BLOCK, carry)

        return jax.lax.fori_loop(0, -(-left_E[e] // BLOCK), block, carry)

    return jax.lax.fori_loop(0, jnp.sum(left_E > 0), expert, carry)


def _pick(weights, e):
    return jax.lax.dynamic_index_in_dim(weights, e, keepdims=False)


@jax.custom_vjp
def blocked(x_ND, chosen_NK, weights_NK, gate_EDF, up_EDF, down_EFD):
    """See ops.experts.experts; the id E contributes nothing, and none is above it."""
    return _forward(x_ND, chosen_NK, weights_NK, gate_EDF, up_EDF, down_EFD)[0]


def _forward(x_ND, chosen_NK, weights_NK, gate_EDF, up_EDF, down_EFD):
    E, K = gate_EDF.shape[0], chosen_NK.shape[1]
    C = _slots(chosen_NK.size, E)
    plan = _plan(chosen_NK, E, C)
    # slots: one batched product over experts
    if C:
        token_EC, _ = _heads(plan, C, weights_NK)
        x_ECD = x_ND[token_EC]
        gate_ECF, up_ECF = x_ECD @ gate_EDF, x_ECD @ up_EDF
        y_ND = _gather(swiglu(gate_ECF, up_ECF) @ down_EFD, plan.slot_NK, weights_NK)
    else:
        gate_ECF = up_ECF = jnp.zeros((E, 0, gate_EDF.shape[2]), x_ND.dtype)
        y_ND = jnp.zeros_like(x_ND)

    # what exceeds them: a loop over blocks of rows
    def body(e, assignment, counts, y_ND):
        token = assignment // K
        x = x_ND[token]
        y = swiglu(x @ _pick(gate_EDF, e), x @ _pick(up_EDF, e)) @ _pick(down_EFD, e)
        weight = jnp.where(counts, weights_NK.reshape(-1)[assignment], 0)
        return y_ND.at[token].add(weight[:, None] * y)

    y_ND = _overflow(plan, C, K, body, y_ND)
    return y_ND, (x_ND, weights_NK, plan, gate_ECF, up_ECF, gate_EDF, up_EDF, down_EFD)


def _backward(saved, dy_ND):
    x_ND, weights_NK, plan, gate_ECF, up_ECF, gate_EDF, up_EDF, down_EFD = saved
    K, C = weights_NK.shape[1], gate_ECF.shape[1]
    # slots: by the products that the forward pass kept
    if C:
        token_EC, weight_EC = _heads(plan, C, weights_NK)
        x_ECD, dy_ECD = x_ND[token_EC], dy_ND[token_EC]
        dx_ECD, dw_EC, *totals = _expert_gradients(
            x_ECD, dy_ECD, weight_EC, gate_ECF, up_ECF, gate_EDF, up_EDF, down_EFD
        )
        dx_ND = _gather(dx_ECD, plan.slot_NK, jnp.ones_like(weights_NK))
        dw_M = jnp.pad(dw_EC.reshape(-1), (0, 1))[plan.slot_NK.reshape(-1)]
    else:
        totals = [jnp.zeros_like(w) for w in (gate_EDF, up_EDF, down_EFD)]
        dx_ND, dw_M = jnp.zeros_like(x_ND), jnp.zeros((weights_NK.size,), weights_NK.dtype)

    # what exceeds them: its products are made again
    def body(e, assignment, counts, carry):
        dx_ND, dw_M, totals = carry
        token, own = assignment // K, [_pick(w, e) for w in (gate_EDF, up_EDF, down_EFD)]
        x, weight = x_ND[token], jnp.where(counts, weights_NK.reshape(-1)[assignment], 0)
        dx, dw, *parts = _expert_gradients(x, dy_ND[token], weight, x @ own[0], x @ own[1], *own)
        totals = [
            jax.lax.dynamic_update_index_in_dim(z, _pick(z, e) + part, e, axis=0)
            for z, part in zip(totals, parts)
        ]
        return dx_ND.at[token].add(dx), dw_M.at[assignment].add(jnp.where(counts, dw, 0)), totals

    dx_ND, dw_M, totals = _overflow(plan, C, K, body, (dx_ND, dw_M, totals))
    return (
        dx_ND,
        np.zeros(weights_NK.shape, jax.dtypes.float0),
        dw_M.reshape(weights_NK.shape),
        *totals,
    )


def _expert_gradients(x, dy, weight, gate, up, w_gate, w_up, w_down):
    """Gradients of weight * SwiGLU(x) by x, weight and the three matrices; leading axes, if any,
    run over experts.

    The weight's own is <h W_down, dy> = <h, dy W_down^T>, so that the output need not be kept.
    """

    def turned(z):
        return z.swapaxes(-1, -2)

    h, backward = jax.vjp(swiglu, gate, up)
    dh = dy @ turned(w_down)
    dw = jnp.sum(h * dh, axis=-1)
    dgate, dup = backward(dh * weight[..., None])
    d_down = turned(h * weight[..., None]) @ dy
    return (
        dgate @ turned(w_gate) + dup @ turned(w_up),
        dw,
        turned(x) @ dgate,
        turned(x) @ dup,
        d_down,
    )


blocked.defvjp(_forward, _backward)
