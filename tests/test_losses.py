"""Chunked cross-entropy: the plain form's value and gradients, without ever holding [tokens,
vocabulary]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kha_jax.ops import losses
from kha_jax.ops.losses import cross_entropy

B, T, D, V = 3, 24, 8, 50


def plain(x, table, targets, weights, z_loss):
    """The formula as written, and the sums behind it."""
    logits = jnp.einsum("BTD,VD->BTV", x, table)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    label = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss, squared = jnp.sum(weights * (log_z - label)), jnp.sum(weights * log_z**2)
    correct = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets))
    return loss + z_loss * squared, (loss, squared, correct, jnp.sum(weights))


@functools.cache
def inputs():
    random = np.random.default_rng(0)
    x, table = random.normal(size=(B, T, D)), random.normal(size=(V, D))
    targets = random.integers(0, V, (B, T))
    targets[0, :6] = np.argmax(x[0, :6] @ table.T, axis=-1)  # so that some are right
    return tuple(
        jnp.asarray(z)
        for z in (
            x.astype(np.float32),
            table.astype(np.float32),
            targets,
            random.random((B, T), np.float32),
        )
    )


@pytest.mark.parametrize("chunk_tokens", [1, 9, 36, 72, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_gradients_and_sums_are_those_of_the_plain_form(z_loss, chunk_tokens):
    x, table, targets, weights = inputs()
    ours = functools.partial(cross_entropy, z_loss=z_loss, chunk_tokens=chunk_tokens)
    (value, sums), grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(
        x, table, targets, weights
    )
    (expected, expected_sums), expected_grads = jax.value_and_grad(
        plain, argnums=(0, 1), has_aux=True
    )(x, table, targets, weights, z_loss)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(ours)(x, table, targets, weights)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)
    for ours_grad, grad in zip(grads, expected_grads):
        np.testing.assert_allclose(ours_grad, grad, rtol=1e-4, atol=1e-5)


def test_the_table_gradient_of_other_platforms_is_a_cpu_s(monkeypatch):
    x, table, targets, weights = inputs()

    def gradient():
        return jax.jit(jax.grad(lambda t: cross_entropy(x, t, targets, weights)[0]))(table)

    on_a_cpu = gradient()
    monkeypatch.setattr(losses, "_table_gradient_cpu", losses._table_gradient)
    np.testing.assert_allclose(gradient(), on_a_cpu, rtol=1e-5, atol=1e-6)


def test_the_gradient_scales_with_its_cotangent():
    x, table, targets, weights = inputs()

    def scaled(s):
        return jax.grad(lambda x: s * cross_entropy(x, table, targets, weights)[0])(x)

    np.testing.assert_allclose(scaled(3.0), 3 * scaled(1.0), rtol=1e-6)


def test_large_logits_stay_finite_and_unweighted_labels_do_not_matter():
    x, table, targets, weights = inputs()
    half = weights.at[:, ::2].set(0)

    def value(t):
        return cross_entropy(1e3 * x, table, t, half)[0]

    assert np.isfinite(value(targets))
    assert value(targets) == value(targets.at[:, ::2].set(0))


def temporaries(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_tokens_by_vocabulary_never_exist():
    """At the paper's vocabulary: a chunk of logits and the table's gradient fit, [tokens,
    vocabulary] would not."""
    vocabulary, width, batch, length, chunk = 157184, 64, 2, 1024, 64
    shape = jax.ShapeDtypeStruct
    shapes = (
        shape((batch, length, width), jnp.float32),
        shape((vocabulary, width), jnp.float32),
        shape((batch, length), jnp.int32),
        shape((batch, length), jnp.float32),
    )
    everything = batch * length * vocabulary * 4
    ours = functools.partial(cross_entropy, chunk_tokens=chunk)
    chunk_bytes, table_bytes = chunk * vocabulary * 4, vocabulary * width * 4
    assert temporaries(lambda *a: ours(*a)[0], *shapes) < 3 * chunk_bytes < 0.1 * everything
    assert (
        temporaries(jax.grad(lambda *a: ours(*a)[0], argnums=(0, 1)), *shapes)
        < 4 * chunk_bytes + 3 * table_bytes
        < 0.25 * everything
    )
    assert temporaries(jax.grad(lambda *a: plain(*a, 0.0)[0], argnums=(0, 1)), *shapes) > everything
