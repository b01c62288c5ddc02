"""Fewer cached heads of a trained model, against NumPy and the model that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kha_jax.accounting import cache_bytes
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import KnockingLinear, KnockingMLP
from kha_jax.attention.projections import GroupedQuery, GroupedTied, Latent
from kha_jax.config import ConfigError
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.inference.compression import basis, compress
from kha_jax.model import AttentionFrom, ModelConfig
from kha_jax.modules import Numerics

SIZES = {"query_heads": 4, "head_dim": 8}
GQA = AttentionConfig(projection=GroupedQuery(kv_heads=4, **SIZES))
BASE = ModelConfig(
    layers=3,
    width=16,
    vocabulary_size=32,
    attention=GQA,
    feed_forward=SwiGLU(width=16),
    numerics=Numerics(dtype="float32"),
)
IDS = np.random.default_rng(0).integers(0, 32, (2, 10)).astype(np.int32)


@functools.cache
def variables_of(model):
    """Variables that are nowhere as they are born, so that mixers show."""
    born = jax.eval_shape(lambda: nn.unbox(model.build().init(jax.random.key(0), IDS)))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda z: jnp.float32(0.3 * draw.normal(size=z.shape)), born)


def logits(model, variables):
    return np.asarray(jax.jit(model.build().apply)(variables, IDS))


def test_the_profile_is_that_of_the_best_combinations():
    """Each error is that of the reconstruction, and no rank-k matrix is nearer (Eckart-Young, by
    the eigenvalues of the heads' moments)."""
    W_DKH = np.random.default_rng(0).normal(size=(6, 5, 3))
    flat = W_DKH.transpose(1, 0, 2).reshape(5, -1)
    eigenvalues = np.linalg.eigvalsh(flat @ flat.T)
    for heads in range(1, 6):
        found = basis(W_DKH, heads)
        made = np.einsum("DJH,JK->DKH", found.heads, found.kernel)
        error = np.linalg.norm(made - W_DKH) / np.linalg.norm(W_DKH)
        np.testing.assert_allclose(found.errors[heads - 1], error, atol=1e-12)
        # the singular values are in the kernel alone
        gram = np.einsum("DJH,DIH->JI", found.heads, found.heads)
        np.testing.assert_allclose(gram, np.eye(heads), atol=1e-12)
        best = np.sqrt(eigenvalues[: 5 - heads].sum() / eigenvalues.sum())
        np.testing.assert_allclose(error, best, atol=1e-7)


LINEAR = {"key": KnockingLinear(), "value": KnockingLinear()}
EXACT = {
    "grouped": (BASE, 0),
    "linear mixers": (BASE.replace(attention=GQA.replace(**LINEAR)), 0),
    "tied": (BASE.replace(attention=AttentionConfig(projection=GroupedTied(**SIZES))), 0),
    "later layers of a mixture": (
        BASE.replace(feed_forward=MoE(experts=4, top_k=2, width=8, dense_layers=1, dense_width=16)),
        2,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_as_many_heads_as_before_change_nothing(name):
    model, first = EXACT[name]
    made, variables, _ = compress(model, variables_of(model), 4, first)
    shapes = jax.eval_shape(lambda: nn.unbox(made.build().init(jax.random.key(0), IDS)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    expected = logits(model, variables_of(model))
    np.testing.assert_allclose(logits(made, variables), expected, atol=1e-5)


@pytest.mark.parametrize(("heads", "first"), [(2, 0), (2, 1), (3, 0)])
def test_fewer_heads_are_the_model_of_the_nearest_weights(heads, first):
    """Two or three cached heads, composed to four under the k norm, read what the low-rank weights
    make."""
    variables = variables_of(BASE)
    made, fewer, profiles = compress(BASE, variables, heads, first)
    projection = dict(variables["params"]["layers"]["attention"]["projection"])
    for slot in ("key", "value"):
        W_LDKH = np.array(projection[slot])
        for layer in range(first, 3):
            flat = W_LDKH[layer].transpose(1, 0, 2).reshape(4, -1)
            U, s, V = np.linalg.svd(flat, full_matrices=False)
            low = (U[:, :heads] * s[:heads]) @ V[:heads]
            W_LDKH[layer] = low.reshape(4, 16, 8).transpose(1, 0, 2)
            error = np.linalg.norm(flat - low) / np.linalg.norm(flat)
            np.testing.assert_allclose(profiles[slot][layer][heads - 1], error, rtol=1e-5)
        projection[slot] = jnp.asarray(W_LDKH)
    assert [*profiles["key"]] == list(range(first, 3))
    layers = variables["params"]["layers"]
    layers = {**layers, "attention": {**layers["attention"], "projection": projection}}
    expected = logits(BASE, {"params": {**variables["params"], "layers": layers}})
    np.testing.assert_allclose(logits(made, fewer), expected, atol=1e-5)
    # the heads and the k norm's four factors for each of four heads
    kept = (3 - first) * 4 * (2 * heads * 8 + 4) + first * 4 * 2 * 4 * 8
    assert cache_bytes(made) == kept < cache_bytes(BASE)


@pytest.mark.parametrize(
    ("model", "heads", "first", "problem"),
    [
        (BASE, 5, 0, "kv_heads: must be 1 to 4, .* found 5"),
        (BASE, 2, 3, "later.layer: must be below layers=3"),
        (
            BASE.replace(attention=AttentionConfig(projection=Latent(**SIZES))),
            2,
            0,
            "Latent has no key/value heads",
        ),
        (BASE.replace(attention=GQA.replace(value=KnockingMLP())), 2, 0, "is not linear"),
        (BASE.replace(later=AttentionFrom(attention=GQA)), 2, 2, "leave out --layers"),
        (
            BASE.replace(attention=GQA.replace(projection=GQA.projection.replace(bias="qkv"))),
            2,
            0,
            "projection.bias: keys and values with a bias",
        ),
    ],
)
def test_what_cannot_be_compressed_says_why(model, heads, first, problem):
    with pytest.raises(ConfigError, match=problem):
        compress(model, variables_of(model), heads, first)
