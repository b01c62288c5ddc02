"""What each policy of rematerialisation keeps and runs again, traced and counted, against the one
table that plans count with. Gradients are compared in test_model."""

import functools
import itertools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from kha_jax import remat
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics

B, T, LAYERS, WIDTH = 2, 64, 3, 48
ATTENTION = AttentionConfig(projection=GroupedQuery(query_heads=4, kv_heads=2, head_dim=16))
FEED_FORWARDS = {
    "dense": SwiGLU(width=80),
    "mixture": MoE(experts=8, top_k=2, width=24, kernel="ragged", chunk_tokens=32),
}
ORDER = [name for name in remat.POLICIES if name not in ("dots", "none")]  # least kept first


def model(kind, policy):
    return ModelConfig(
        layers=LAYERS,
        width=WIDTH,
        vocabulary_size=32,
        attention=ATTENTION,
        feed_forward=FEED_FORWARDS[kind],
        remat=policy,
    )


def products(jaxpr, times=1):
    """(FLOPs of all matrix products but grouped ones, how many grouped ones) of a program."""
    flops, grouped = 0, 0
    for equation in jaxpr.eqns:
        name, inside = equation.primitive.name, times * equation.params.get("length", 1)
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            flops += times * 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        grouped += times * (name == "ragged_dot_general")
        for part in jax.tree.leaves(list(equation.params.values())):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                more = products(part, inside)
                flops, grouped = flops + more[0], grouped + more[1]
    return flops, grouped


@functools.cache
def counted(kind, policy):
    """(bytes that the backward pass is given, FLOPs, grouped products) of a loss and its
    gradient."""
    config, ids = model(kind, policy), jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids)
    batch["weights"] = jax.ShapeDtypeStruct((B, T), jnp.float32)
    variables = nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), ids))
    params = variables.pop("params")

    def loss(params, rest, batch):
        return config.build().apply({"params": params, **rest}, batch, method="loss")[0]

    kept = jax.eval_shape(lambda *of: jax.vjp(loss, *of)[1], params, variables, batch)
    program = jax.make_jaxpr(jax.grad(loss))(params, variables, batch).jaxpr
    program, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return size, *products(program)


@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_policies_keep_and_spare_what_the_table_says(kind):
    """Its bytes and its products, from each policy to the next that keeps more; a
    chunk's own rematerialisation does not hide its names."""
    parts = remat.parts(ATTENTION, FEED_FORWARDS[kind], WIDTH, context=T, tokens=B * T)
    top_k = getattr(FEED_FORWARDS[kind], "top_k", 0)
    for less, more in itertools.pairwise(ORDER):
        names = set(remat.POLICIES[more].names) - set(remat.POLICIES[less].names)
        (kept_less, flops_less, grouped_less), (kept_more, flops_more, grouped_more) = (
            counted(kind, policy) for policy in (less, more)
        )
        # the experts that are chosen are int32 and are not worth a place in the table
        chosen = 4 * top_k * LAYERS * B * T if "router" in names else 0
        numbers = sum(parts[name].floats for name in names)
        expected = 2 * numbers * LAYERS * B * T + chosen
        assert kept_more - kept_less == pytest.approx(expected, rel=2e-3), more
        grouped = {"inner"} & names if top_k else set()
        flops = sum(parts[name].flops for name in names - grouped)
        assert flops_less - flops_more == flops * LAYERS * B * T, more
        assert (grouped_less > grouped_more) == bool(grouped)


@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_dots_keeps_every_product_and_the_rest_less(kind):
    dots, inner = counted(kind, "dots"), counted(kind, "inner")
    assert dots[0] >= inner[0] and dots[1] <= inner[1] and dots[2] == inner[2]
    assert counted(kind, "full")[2] >= dots[2]


@pytest.mark.slow
def test_what_a_chunk_of_experts_keeps_gives_the_same_gradient():
    """Dense layers are compared in test_model."""
    ids = jax.random.randint(jax.random.key(0), (B, T), 0, 32)
    batch = {name: ids for name in ("tokens", "targets")} | {"weights": jnp.ones((B, T))}
    batch |= {"positions": jnp.arange(T) + 0 * ids, "segment_ids": 0 * ids}
    plain, inner = (
        model("mixture", policy).replace(layers=1, numerics=Numerics(dtype="float32"))
        for policy in ("none", "inner")
    )
    variables = nn.unbox(jax.jit(plain.build().init)(jax.random.key(1), ids))
    params = variables.pop("params")
    gradients = [
        jax.jit(
            jax.grad(
                lambda params, built=config.build(): built.apply(
                    {"params": params, **variables}, batch, method="loss"
                )[0]
            )
        )(params)
        for config in (plain, inner)
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=1e-5)
