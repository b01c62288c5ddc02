"""Gated activations with gradients that every backend runs at matmul speed.

The gradients are written out and fenced off: left to itself, XLA's CPU backend fuses the sigmoid
into the matrix products around it and evaluates it once per block (measured for a SwiGLU layer at
2048 x 256 x 768: 38 ms against 18 ms).
"""

import jax


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise (Shazeer, arXiv 2002.05202)."""
    return gate * jax.nn.sigmoid(gate) * up


def _swiglu_forward(gate, up):
    return jax.lax.optimization_barrier(swiglu(gate, up)), (gate, up)


def _swiglu_backward(residuals, d_out):
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return jax.lax.optimization_barrier(
        (d_out * up * (sigmoid + silu * (1 - sigmoid)), d_out * silu)
    )


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def sigmoid_gate(gate: jax.Array, value: jax.Array) -> jax.Array:
    """2 sigmoid(gate) * value, elementwise: the value itself at gate = 0 (KHA, arXiv 2510.23052,
    equation 9)."""
    return 2 * jax.nn.sigmoid(gate) * value


def _sigmoid_gate_forward(gate, value):
    return jax.lax.optimization_barrier(sigmoid_gate(gate, value)), (gate, value)


def _sigmoid_gate_backward(residuals, d_out):
    gate, value = residuals
    sigmoid = jax.nn.sigmoid(gate)
    d_value = 2 * d_out * sigmoid
    return jax.lax.optimization_barrier((d_value * value * (1 - sigmoid), d_value))


sigmoid_gate.defvjp(_sigmoid_gate_forward, _sigmoid_gate_backward)
