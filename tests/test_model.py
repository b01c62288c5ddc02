"""Properties of the transformer: identity at initialisation, causality, isolation, equivariance,
and equal forms."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import KnockingGate, KnockingLinear, KnockingMLP
from kha_jax.attention.projections import GroupedQuery
from kha_jax.feed_forward import SwiGLU
from kha_jax.model import LossConfig, ModelConfig
from kha_jax.modules import Numerics
from kha_jax.remat import POLICIES

PROJECTION = GroupedQuery(query_heads=4, kv_heads=2, head_dim=8)
MIXERS = {
    "linear": KnockingLinear(),
    "residual": KnockingLinear(parameterization="residual"),
    "gate": KnockingGate(),
    "mlp": KnockingMLP(),
}
PLACES = {"v": ["value"], "qkv": ["query", "key", "value"]}
B, T, V = 2, 12, 61


def model(mixer=None, places="v", **changes):
    projection = changes.pop("projection", PROJECTION)
    slots = {} if mixer is None else {slot: MIXERS[mixer] for slot in PLACES[places]}
    attention = AttentionConfig(
        projection=projection, kernel=changes.pop("kernel", "auto"), **slots
    )
    fields = {
        "layers": 2,
        "width": 24,
        "vocabulary_size": V,
        "numerics": Numerics(dtype="float32"),
        "feed_forward": SwiGLU(width=40),
    }
    return ModelConfig(attention=attention, **{**fields, **changes})


def tokens(seed=0, length=T):
    return jax.random.randint(jax.random.key(seed), (B, length), 0, V)


@functools.cache
def fresh(config):
    return nn.unbox(jax.jit(config.build().init)(jax.random.key(0), tokens())["params"])


def initial(config, noise=0.0):
    """Fresh parameters; with noise, every one is moved by noise * normal, so that nothing is
    special about it."""
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + np.float32(noise * random.normal(size=x.shape)), fresh(config)
    )


@functools.cache
def apply(config, optimised=False):
    """The jitted logits; optimised: by LLVM as users have it, whatever the tests' own flags say."""
    options = (
        {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
        if optimised
        else None
    )
    return jax.jit(
        lambda params, *inputs: config.build().apply({"params": params}, *inputs),
        compiler_options=options,
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_fresh_mixer_is_bit_equal_to_the_baseline(mixer):
    base, knocking = model(), model(mixer, "qkv")
    params = initial(knocking)
    shared = {
        name: leaf
        for name, leaf in params["layers"]["attention"].items()
        if not name.endswith("_mixer")
    }
    stripped = {**params, "layers": {**params["layers"], "attention": shared}}
    np.testing.assert_array_equal(
        apply(knocking, optimised=True)(params, tokens()),
        apply(base, optimised=True)(stripped, tokens()),
    )
    moved = apply(knocking, optimised=True)(initial(knocking, 0.3), tokens())
    assert np.isfinite(moved).all()


@pytest.mark.parametrize("mixer", [None, "mlp"])
def test_a_token_does_not_reach_backwards(mixer):
    config = model(mixer, "qkv")
    params = initial(config, 0.3)
    before = apply(config)(params, tokens())
    after = apply(config)(params, tokens().at[:, 7].add(1) % V)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before[:, 7:] - after[:, 7:]).max(axis=(0, 2)) > 0).all()


@pytest.mark.parametrize("mixer", ["linear"])
def test_packed_documents_are_each_alone(mixer):
    config = model(mixer, "qkv")
    params, ids = initial(config, 0.3), tokens()
    segment_ids = jnp.where(jnp.arange(T) < 5, 0, 1) * jnp.ones((B, 1), jnp.int32)
    positions = jnp.where(jnp.arange(T) < 5, jnp.arange(T), jnp.arange(T) - 5) * jnp.ones(
        (B, 1), jnp.int32
    )
    packed = apply(config)(params, ids, positions, segment_ids)
    alone = [apply(config)(params, part) for part in (ids[:, :5], ids[:, 5:])]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), rtol=1e-4, atol=1e-4)
    unpacked = apply(config)(params, ids)
    assert np.abs(unpacked[:, 5:] - packed[:, 5:]).max() > 1e-2


def loss_batch(seed=0):
    ids = tokens(seed, T + 1)
    zeros = jnp.zeros((B, T), jnp.int32)
    weights = (jax.random.uniform(jax.random.key(seed), (B, T)) > 0.3).astype(jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": positions,
        "segment_ids": zeros,
        "weights": weights,
    }


@functools.cache
def loss_and_gradient(config):
    return jax.jit(
        jax.value_and_grad(
            lambda params, batch: config.build().apply({"params": params}, batch, method="loss")[0]
        )
    )


def test_loss_is_the_cross_entropy_of_the_logits():
    config = model("mlp", loss=LossConfig(chunk_tokens=7, z_loss=0.01))
    params, batch = initial(config, 0.3), loss_batch()
    logits = apply(config)(params, batch["tokens"])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    label = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    expected = jnp.sum(batch["weights"] * (log_z - label + 0.01 * log_z**2))
    np.testing.assert_allclose(loss_and_gradient(config)(params, batch)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"stack": "unroll"},
        *({"remat": policy} for policy in POLICIES if policy != "none"),
        {"remat": "full", "stack": "unroll"},
    ],
)
def test_forms_of_the_stack_agree(change):
    plain, changed = model("mlp"), model("mlp", **change)
    params, batch = initial(plain, 0.1), loss_batch()
    chex.assert_trees_all_equal_shapes_and_dtypes(params, initial(changed))
    programs = [loss_and_gradient(config) for config in (plain, changed)]
    texts = [program.lower(params, batch).as_text() for program in programs]
    assert texts[0] != texts[1]  # the setting does something
    results = [program(params, batch) for program in programs]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_untied_embeddings_have_a_table_of_their_own():
    config = model(embeddings="untied")
    params = initial(config)
    assert params["unembedding"].shape == params["embedding"].shape == (V, 24)
    _, grads = loss_and_gradient(config)(params, loss_batch())
    assert np.abs(grads["unembedding"]).max() > 0 and np.abs(grads["embedding"]).max() > 0


def test_bfloat16_computes_over_float32_parameters():
    exact, rounded = model("mlp"), model("mlp", numerics=Numerics(dtype="bfloat16"))
    params, batch = initial(rounded), loss_batch()
    chex.assert_trees_all_equal_dtypes(params, initial(exact))
    (value, grads), (exact_value, exact_grads) = (
        loss_and_gradient(c)(params, batch) for c in (rounded, exact)
    )
    assert value.dtype == jnp.float32 and all(
        g.dtype == jnp.float32 for g in jax.tree.leaves(grads)
    )
    np.testing.assert_allclose(value, exact_value, rtol=1e-2)
    assert value != exact_value
    norms = [
        np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(tree)))
        for tree in (grads, exact_grads)
    ]
    np.testing.assert_allclose(*norms, rtol=5e-2)
