"""Accounting against eval_shape, XLA's cost analysis and the paper's printed sizes."""

import math

import jax
import jax.numpy as jnp
import pytest

from configs import tables
from kha_jax.accounting import account
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import KnockingGate, KnockingLinear, KnockingMLP
from kha_jax.attention.projections import GroupedQuery, GroupedTied, Latent
from kha_jax.config import to_dict
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.hardware.chips import peak_flops
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics
from tests.cases import ROWS, config_of

PAPER_ATTENTION = AttentionConfig(projection=GroupedQuery(query_heads=32, kv_heads=4, head_dim=128))
SLOTS = ("query", "key", "value")
LINEAR_QKV = {slot: KnockingLinear(apply="activations") for slot in SLOTS}
LINEAR_ON_WEIGHTS = {slot: KnockingLinear(apply="weights") for slot in SLOTS}


def dense_of(layers, width, feed_forward, mixers, **changes):
    fields = {"layers": layers, "width": width, "vocabulary_size": 157184, **changes}
    return ModelConfig(
        attention=PAPER_ATTENTION.replace(**mixers),
        feed_forward=SwiGLU(width=feed_forward),
        **fields,
    )


def dense(layers, width, feed_forward, **mixers):
    return dense_of(layers, width, feed_forward, mixers)


def initialised_size(model):
    ids = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda key: model.build().init(key, ids), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


TABLES = {name: tables.load(name) for name in tables.TABLES}


def as_printed(value, text):
    """Whether a count is the printed one, rounded or cut to its digits."""
    digit = 10.0 ** -len(text[:-1].partition(".")[2])
    return -0.5 * digit <= value / {"M": 1e6, "B": 1e9}[text[-1]] - float(text[:-1]) < digit


@pytest.mark.parametrize("table", TABLES)
def test_rows_have_the_sizes_that_the_paper_prints(table):
    """Parameters and caches of every row (tables 3 to 5), but of those whose note says why not."""
    unlike, rows = set(), TABLES[table].rows
    for name, row in rows.items():
        cost, layers = account(row.run.model, row.run.seq_len), row.run.model.layers
        sizes = [(cost.active, row.active), (cost.parameters, row.total)]
        if not all(as_printed(value, text) for value, text in sizes if text):
            unlike.add(name)
        assert row.cache in (None, cost.cache_floats / layers)
    assert unlike == {name for name, row in rows.items() if row.note}


@pytest.mark.parametrize("scale", tables.SCALES)
def test_smaller_rows_keep_the_ratios(scale):
    """Heads and groups; head_dim, latents and the active feed-forward to width; experts active of
    all; what knocks where."""

    def ratios(run):
        model, experts = run.model, run.model.feed_forward
        routed = isinstance(experts, MoE)
        share = experts.top_k / experts.experts if routed else 1
        active = experts.width * (experts.top_k if routed else 1) / model.width
        projection = model.attention.projection
        given = {name: value for name, value in vars(projection).items() if value}
        sizes = {k: v / model.width if k in tables.WIDTHS else v for k, v in given.items()}
        mixers = {**to_dict(model.attention), "projection": None}
        return share, active, sizes, mixers

    for table in (table for table in TABLES.values() if scale in table.scales):
        for name in table.rows:
            assert ratios(table.run(f"{name}.{scale}")) == ratios(table.run(name))


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        ModelConfig(layers=3, width=48, embeddings="untied", feed_forward=SwiGLU(width=80)),
        ModelConfig(attention=AttentionConfig(**LINEAR_QKV)),
        ModelConfig(attention=AttentionConfig(value=KnockingMLP(), query=KnockingGate())),
        ModelConfig(attention=AttentionConfig(key=KnockingLinear(parameterization="residual"))),
        ModelConfig(
            attention=AttentionConfig(
                projection=GroupedQuery(query_heads=6, kv_heads=2, head_dim=16, qk_norm="none")
            )
        ),
    ],
)
def test_parameters_equal_what_init_makes(model):
    assert account(model, 128).parameters == initialised_size(model)


@pytest.mark.parametrize(
    ("layers", "width", "experts", "active", "total"),
    [
        (12, 1152, MoE(experts=64, top_k=4, width=768), 436.8, 2348),
        (18, 1536, MoE(experts=64, top_k=4, width=1152), 880.3, 6613),
        (23, 2048, MoE(experts=64, top_k=4, width=1536), 1627, 14651),
        (18, 2048, MoE(experts=128, top_k=8, width=384), 1006.2, 6102),
    ],
)
def test_mixture_sizes_are_the_papers(layers, width, experts, active, total):
    """Tables 3 and 5, in millions to the digits that they print."""
    cost = account(dense(layers, width, 1).replace(feed_forward=experts), 4096)
    assert (
        abs(cost.active / 1e6 - active) < (0.05 if active % 1 else 0.5)
        and round(cost.parameters / 1e6) == total
    )
    # without norms; the tied table counts once, as the output
    matmuls = cost.active - width * (2 * layers + 1) - 2 * 128 * layers
    assert (
        account(dense(layers, width, 1).replace(feed_forward=experts), 0).forward_flops
        == 2 * matmuls + 2 * layers * 4096
    )


def test_knocking_parameters_are_the_difference():
    plain, knocking = (
        account(dense(2, 256, 512, **m), 128) for m in ({}, {"value": KnockingMLP()})
    )
    assert knocking.parameters - plain.parameters == knocking.mixing == 2 * 3 * 128**2
    assert plain.mixing == 0


def test_forward_flops_match_xla():
    """An unrolled model at a size where matrix products dominate; the reference kernel computes all
    T keys for every query."""
    T = 256
    attention = AttentionConfig(
        projection=GroupedQuery(query_heads=8, kv_heads=4, head_dim=128), kernel="reference"
    )
    model = ModelConfig(
        layers=2,
        width=1024,
        vocabulary_size=8192,
        attention=attention,
        feed_forward=SwiGLU(width=3072),
        stack="unroll",
        numerics=Numerics(dtype="float32"),
    )
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
    module = model.build()
    params = jax.eval_shape(module.init, jax.random.key(0), ids)
    counted = jax.jit(module.apply).lower(params, ids).cost_analysis()["flops"]
    expected = account(model, T, causal=False, tokens=2 * T).forward_flops * 2 * T
    assert abs(counted / expected - 1) < 0.02


WIDE = {"value_dim": 256, "rope_dim": 64, "kv_lora": 256}  # what latents have beside head_dim


@pytest.mark.parametrize("name", ROWS)
def test_flops_of_every_row_match_xlas_count(name):
    """Of one layer, its heads so wide that matrix products dominate: the row's whole, and what it
    adds to the projection alone."""
    T, width = 512, 512
    config = config_of(name, ROWS[name].on[0]).replace(kernel="reference")
    more = WIDE if isinstance(config.projection, Latent) else {}
    config = config.replace(projection=config.projection.replace(head_dim=256, **more))
    x = jax.ShapeDtypeStruct((1, T, width), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def flops(config):
        module = config.build(width=width, numerics=Numerics(dtype="float32"))
        params = jax.eval_shape(module.init, jax.random.key(0), x, positions)
        counted = jax.jit(module.apply).lower(params, x, positions).cost_analysis()["flops"]
        return counted, config.flops(width, T, T) * T

    alone = AttentionConfig(projection=config.projection, kernel="reference")
    (counted, ours), (base, plain) = (flops(c) for c in (config, alone))
    assert abs(counted / ours - 1) < 0.06  # rotation, softmax and the largest logit are not counted
    assert abs((counted - base) - (ours - plain)) < 0.01 * ours


@pytest.mark.parametrize("seq_len", [512, 4096, 8192])
def test_overhead_of_knocking_at_the_dense_shape(seq_len):
    base, mlp, linear = (
        account(dense(24, 1024, 3072, **m), seq_len)
        for m in ({}, {"value": KnockingMLP()}, LINEAR_QKV)
    )
    assert 1 < mlp.training_flops / base.training_flops <= 1.01
    assert mlp.training_flops < linear.training_flops < 1.025 * base.training_flops


def test_what_is_frozen_has_no_gradient():
    """2 F, and once more what multiplies no frozen weights: the scores, the mixers, and, behind a
    mixer of the weights, the projection of its stream."""
    base, values, scores = dense(3, 64, 96), 2 * 64 * 4 * 128, 2 * 32 * (128 + 128) * 513 / 2
    for mixer, behind in ((KnockingMLP(), 0), (KnockingLinear(apply="weights"), values)):
        model, sizes = dense(3, 64, 96, value=mixer), {"seq_len": 512, "tokens": 1000}
        forward = account(model, **sizes).forward_flops
        again = 3 * (scores + behind) + forward - account(base, **sizes).forward_flops
        found = account(model, trainable="mixers", **sizes).training_flops
        assert math.isclose(found, 2 * forward + again)


def test_linear_on_weights_costs_under_a_thousandth_at_32k_tokens():
    """The 0.8B-6.6B shape: attention of width 1536, and the active feed-forward of 4 experts of
    1152; auto takes the weights."""
    auto = {slot: KnockingLinear() for slot in SLOTS}
    base, linear = (
        account(dense_of(18, 1536, 4 * 1152, m), 4096, tokens=32768).training_flops
        for m in ({}, auto)
    )
    assert 1 < linear / base < 1.001


def test_linear_on_weights_by_xlas_own_count():
    """The same in XLA's FLOPs of one unrolled layer and its gradients, at 32k tokens."""
    flops = []
    for mixers in ({}, {slot: KnockingLinear() for slot in SLOTS}):
        model = dense_of(
            1,
            1536,
            4 * 1152,
            mixers,
            stack="unroll",
            vocabulary_size=1024,
            numerics=Numerics(dtype="float32"),
        )
        ids, weights = (
            jax.ShapeDtypeStruct((8, 4096), jnp.int32),
            jax.ShapeDtypeStruct((8, 4096), jnp.float32),
        )
        batch = {
            "tokens": ids,
            "targets": ids,
            "positions": ids,
            "segment_ids": ids,
            "weights": weights,
        }
        module = model.build()
        params = jax.eval_shape(
            lambda key: module.init(key, jnp.zeros((1, 8), jnp.int32)), jax.random.key(0)
        )
        step = jax.jit(jax.grad(lambda p, b: module.apply(p, b, method="loss")[0]))
        flops.append(step.lower(params, batch).cost_analysis()["flops"])
    assert 1 < flops[1] / flops[0] < 1.001


def test_a_latent_projection_is_the_papers_size():
    """Table 3: MLA with 32 heads adds 91.4M active parameters over GQA 32/4 in 18 layers of width
    1536, GTA saves 12.4M."""

    def count(projection):
        return 18 * AttentionConfig(projection=projection).parameters(1536) / 1e6

    gqa = count(PAPER_ATTENTION.projection)
    mla = count(
        Latent(query_heads=32, head_dim=128, value_dim=128, rope_dim=64, kv_lora=512, q_lora=1024)
    )
    assert abs(mla - gqa - (971.7 - 880.3)) < 0.1
    assert (
        abs(gqa - count(GroupedTied(query_heads=32, kv_heads=4, head_dim=128)) - (880.3 - 867.9))
        < 0.1
    )


def test_causal_halves_the_scores_only():
    model = dense(1, 1024, 3072)
    scores = PAPER_ATTENTION.projection.score_flops
    difference = (
        account(model, 4096, causal=False).forward_flops - account(model, 4096).forward_flops
    )
    assert difference == scores(4096) - scores(4097 / 2)


def test_an_unknown_device_has_no_peak():
    assert math.isnan(peak_flops("cpu"))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
    ],
)
def test_the_peak_is_found_by_what_a_device_calls_itself(kind, peak):
    assert peak_flops(kind) == peak
