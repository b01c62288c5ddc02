"""Every attention of tests/cases.py, against the float64 oracle and its own properties."""

import importlib
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import variants
from kha_jax import accounting, sharding
from kha_jax.attention import AttentionConfig, mixers, outputs, projections, scores
from kha_jax.attention.attention import LARGEST
from kha_jax.attention.devices import SAMPLE, attend
from kha_jax.attention.mixers import HeadComposition, KnockingGate, KnockingLinear, KnockingMLP
from kha_jax.attention.outputs import (
    DifferentialOutput,
    GatedOutput,
    HeadGroupNorm,
    MixtureOfHeads,
    routing,
)
from kha_jax.attention.projections import Collaborative, GroupedQuery, GroupedTied, Latent
from kha_jax.attention.scores import TalkingHeads
from kha_jax.comparing import properties
from kha_jax.comparing.properties import EXACT, PAD, POSITIONS, SEGMENTS, B, T, relative_error
from kha_jax.config import ConfigError, from_dict, to_dict
from kha_jax.inference.folding import fold, foldable, folded_config
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics
from kha_jax.ops import attention as ops
from kha_jax.training.run_config import OptimizerConfig, RunConfig
from kha_jax.training.step import make_trainer
from tests import cases, reference_parts
from tests.cases import (
    CASES,
    CLAIMING,
    FIRST,
    IDS,
    PROJECTIONS,
    ROWS,
    SLOTS,
    D,
    config_of,
    everywhere,
    for_reference,
    layer_of,
    random,
)

each_case = pytest.mark.parametrize(("name", "projection"), CASES, ids=IDS(CASES))
each_row = pytest.mark.parametrize(("name", "projection"), FIRST, ids=IDS(FIRST))


def inputs():
    return layer_of(AttentionConfig()).inputs()


def layer(config, params, x):
    module = config.build(width=D, numerics=EXACT)
    return module.apply({"params": params}, x, jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))[0]


def output(config, params):
    return properties.output(layer_of(config), params)


def finding(measure, name, projection):
    """What a property says of this case."""
    return measure(layer_of(config_of(name, projection)))


@each_case
def test_agrees_with_the_oracle(name, projection):
    config = config_of(name, projection)
    layer, parameters, settings = for_reference(name, projection, random(config))
    arguments = reference_parts.float64((inputs(), parameters))
    expected = layer(*arguments, POSITIONS, SEGMENTS, settings)
    assert relative_error(output(config, random(config)), expected) < 1e-5


@each_case
def test_cached_decoding_agrees_with_the_oracle_at_every_position(name, projection):
    config = config_of(name, projection)
    layer, parameters, settings = for_reference(name, projection, random(config))
    decoded = properties.decoded(layer_of(config))(random(config), inputs())
    for row, pad in enumerate(PAD):
        x, positions = inputs()[row : row + 1, pad:], np.arange(T - pad)[None]
        arguments = (*reference_parts.float64((x, parameters)), positions, np.zeros_like(positions))
        expected = layer(*arguments, settings)
        assert relative_error(decoded[row, pad:], expected[0]) < 1e-5


@each_case
def test_promises_what_its_row_says(name, projection):
    config, row = config_of(name, projection), ROWS[name]
    shared = isinstance(config.projection, Collaborative)
    assert config.identity_at_start == (row.starts is not None), (
        f"row {name!r} says starts={row.starts!r}, its config identity_at_start="
        f"{config.identity_at_start}"
    )
    assert config.mixes_heads == (row.meet or shared)


@each_row
def test_a_linear_map_is_what_the_mixer_does(name, projection):
    """`effective` is what is traced and drawn: of a linear mixer that heads share, z~ = z T."""
    config, params = config_of(name, projection), random(config_of(name, projection))
    for slot, (heads, head_dim, _) in config.projection.streams(D).items():
        mixer, own = getattr(config, slot), params.get(f"{slot}_mixer")
        T = mixer.linear_map(own) if own and mixer.linear else None
        if T is None:
            continue
        z = jax.random.normal(jax.random.key(0), (3, heads, head_dim))
        module = mixer.build(heads=heads, head_dim=head_dim, numerics=EXACT)
        assert relative_error(module.apply({"params": own}, z), z @ T) < 1e-5


@pytest.mark.parametrize(("name", "projection"), CLAIMING, ids=IDS(CLAIMING))
def test_starts_as_its_projection_alone(name, projection):
    found = finding(properties.start, name, projection)
    assert found.holds, found.text
    starts = ROWS[name].starts
    assert starts == "close" or found.figure == 0, (
        f"row {name!r} says starts={starts!r}; it differs by {found.figure:.3g} at the start"
    )


@each_case
def test_only_heads_that_meet_show_a_permutation(name, projection):
    """Nothing is summed over heads in knocking: moving whole heads moves nothing else. Heads x
    heads matrices, the common misreading, would fail here."""
    found = finding(properties.heads, name, projection)
    assert found.holds, found.text


@each_row
def test_causal_and_packed(name, projection):
    found = finding(properties.causality, name, projection)
    assert found.holds, found.text
    found = finding(properties.documents, name, projection)
    assert found.holds, found.text
    layer, params = layer_of(config_of(name, projection)), random(config_of(name, projection))
    visible = np.zeros((2, B, T), bool)
    visible[0, 0, :7] = True
    visible[1, 1, 4:7] = True  # the second row holds another document before
    reads = [properties.influence(layer, params, row, 6) > 0 for row in (0, 1)]
    np.testing.assert_array_equal(np.stack(reads), visible)


@each_row
def test_eight_devices_compute_what_one_does(name, projection):
    found = finding(properties.devices, name, projection)
    assert found.holds, found.text


@pytest.mark.slow
@each_row
def test_eight_devices_have_the_gradients_of_one(name, projection):
    config = config_of(name, projection)
    mesh = make_mesh(MeshConfig(data=2, model=4))
    cotangent = np.asarray(jax.random.normal(jax.random.key(5), (B, T, D)))

    def loss(params, x):
        return jnp.vdot(layer(config, params, x), cotangent)

    gradients = jax.grad(loss, argnums=(0, 1))
    everywhere_whole = jax.NamedSharding(mesh, jax.P())
    on_eight = jax.jit(sharding.on_mesh(mesh, gradients))
    ours = on_eight(*jax.device_put((random(config), inputs()), everywhere_whole))
    expected = jax.device_get(jax.jit(gradients)(random(config), inputs()))
    scale = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    chex.assert_trees_all_close(jax.device_get(ours), expected, atol=2e-5 * scale)


@each_case
def test_the_accounting_counts_what_is_there(name, projection):
    found = finding(properties.accounting, name, projection)
    assert found.holds, found.text


def in_two_groups(up_gCNH):
    """[1, C, N, H] -> [2, C, N/2, H]: each group has half of the heads."""
    return jnp.concatenate(jnp.split(up_gCNH, 2, axis=2))


REDUCTIONS = {
    "multi-head attention is collaborative heads that are concatenated": (
        AttentionConfig(projection=PROJECTIONS["shared"]),
        AttentionConfig(projection=PROJECTIONS["mha"].replace(qk_norm="none")),
        lambda params: {
            **params,
            "projection": {
                "query": params["projection"]["query"].reshape(D, -1),
                "key": params["projection"]["key"].reshape(D, -1),
                "value": params["projection"]["value"],
                "mixing": jnp.repeat(jnp.eye(4), 4, axis=1),
            },
        },
    ),
    "a mixture of heads that are all on and scored alike is none": (
        AttentionConfig(
            projection=PROJECTIONS["gqa"], output=MixtureOfHeads(shared_heads=1, top_k=3)
        ),
        AttentionConfig(projection=PROJECTIONS["gqa"]),
        lambda params: {
            **params,
            "output_mixer": {
                "shared": jnp.zeros((D, 1)),
                "routed": jnp.zeros((D, 3)),
                "kinds": jnp.zeros((D, 2)),
            },
        },
    ),
    "groups whose latents are one and the same are MLA": (
        AttentionConfig(projection=PROJECTIONS["mla"].replace(groups=2)),
        AttentionConfig(projection=PROJECTIONS["mla"]),
        lambda params: {
            **params,
            "projection": {
                **params["projection"],
                "latent_down": jnp.repeat(params["projection"]["latent_down"], 2, axis=1),
                "latent_norms_1": params["projection"]["latent_norms_0"],
                **{
                    name: in_two_groups(params["projection"][name])
                    for name in ("key_up", "value_up")
                },
            },
        },
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_exact_reductions(name):
    general, special, as_general = REDUCTIONS[name]
    params = random(special)
    ours, expected = output(general, as_general(params)), output(special, params)
    assert relative_error(ours, expected) < 1e-6


def test_a_routers_loss_and_metrics_on_a_worked_example():
    """Two tokens, three routed heads of which one is chosen: P = (.5, .3, .2), f = (1, 0, 0)."""
    p_BTR = jnp.array([[[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]]])
    chosen_BTR = jnp.array([[[1.0, 0, 0], [1, 0, 0]]])
    aux = routing(p_BTR, chosen_BTR, 0.01)
    np.testing.assert_allclose(aux.loss, 0.01 * 9 * 0.5 / 3, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["head_max_violation"], 2, rtol=1e-6)
    even = routing(jnp.full((1, 1, 3), 1 / 3), chosen_BTR[:, :1], 0.01)
    np.testing.assert_allclose(even.metrics["head_gate_entropy"], 1, rtol=1e-6)


@pytest.mark.parametrize("projection", ["no_norm", "gta", "mla_q_lora", "gla"])
def test_weights_and_activations_have_the_same_gradients(projection):
    mixers = [KnockingLinear(apply=apply) for apply in ("activations", "weights")]
    configs = [at_all_slots(projection, mixer) for mixer in mixers]
    cotangent = jax.random.normal(jax.random.key(5), (B, T, D))

    def loss(params, config):
        return jnp.vdot(layer(config, params, inputs()), cotangent)

    grads = [jax.jit(jax.grad(loss), static_argnums=1)(random(c), c) for c in configs]
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[0]))
    chex.assert_trees_all_close(*grads, atol=2e-5 * scale)


def at_all_slots(projection, mixer):
    """The mixer wherever this projection takes it."""
    takes = [slot for slot in SLOTS if PROJECTIONS[projection].why_not(slot, mixer) is None]
    return AttentionConfig(projection=PROJECTIONS[projection], **everywhere(mixer, *takes))


FOLDING = {
    "direct": (KnockingLinear(diag_init=0.7), ("mqa", "gta", "mla", "mla_q_lora", "gla", "shared")),
    "residual": (KnockingLinear(parameterization="residual"), ("gqa",)),
    "composed": (HeadComposition(), ("no_norm", "gta", "mla")),
}
FOLDED = [(name, projection) for name, (_, on) in FOLDING.items() for projection in on]


@pytest.mark.parametrize(("name", "projection"), FOLDED, ids=IDS(FOLDED))
def test_folding_linear_mixers_changes_nothing(name, projection):
    config = at_all_slots(projection, FOLDING[name][0])
    params, baseline = random(config), folded_config(config)
    folded = fold(config, params)
    assert baseline == AttentionConfig(projection=PROJECTIONS[projection])
    chex.assert_trees_all_equal_shapes(folded, random(baseline))
    assert relative_error(output(baseline, folded), output(config, params)) < 1e-5
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    first = jax.tree.map(lambda leaf: leaf[0], fold(config, stack))
    chex.assert_trees_all_close(first, folded, rtol=1e-6)


def test_folding_a_composition_into_fewer_heads_leaves_a_projection_of_those():
    config = config_of("fewer", "mha")
    fewer = PROJECTIONS["mha"].replace(kv_heads=2)
    assert folded_config(config) == AttentionConfig(projection=fewer)
    folded = fold(config, random(config))
    error = relative_error(output(folded_config(config), folded), output(config, random(config)))
    assert error < 1e-5


@pytest.mark.parametrize(
    ("name", "message"),
    [("mlp", "KnockingMLP is not linear"), ("virtual", "composes its 2 cached heads when")],
)
def test_what_does_not_fold_says_why(name, message):
    with pytest.raises(ConfigError, match=message):
        foldable(config_of(name, ROWS[name].on[0]))


def test_a_projection_says_which_weights_a_mixer_folds_into(monkeypatch):
    monkeypatch.setattr(GroupedQuery, "stream_weights", {"query": "query"})
    linear = KnockingLinear()
    assert foldable(AttentionConfig(projection=GroupedQuery(), query=linear)) == ["query"]
    with pytest.raises(ConfigError, match="value.kind: GroupedQuery.stream_weights names no"):
        foldable(AttentionConfig(projection=GroupedQuery(), value=linear))


@pytest.mark.parametrize(
    ("projection", "floats"),
    [
        (GroupedQuery(query_heads=32, kv_heads=4, head_dim=128), 1024),
        (GroupedQuery(query_heads=16, kv_heads=8, head_dim=128), 2048),
        (GroupedQuery(query_heads=16, kv_heads=16, head_dim=128), 4096),
        (GroupedQuery(query_heads=32, kv_heads=1, head_dim=128), 256),
        (GroupedTied(query_heads=32, kv_heads=4, head_dim=128), 512 + 64),
        (Latent(query_heads=32, head_dim=128, q_lora=1024), 512 + 64),
        (Latent(query_heads=32, head_dim=128, groups=2), 512 + 64),
    ],
)
def test_caches_are_what_table_3_prints(projection, floats):
    assert AttentionConfig(projection=projection).cache_floats() == floats


def test_virtual_heads_halve_the_cache():
    gqa = AttentionConfig(projection=GroupedQuery(query_heads=32, kv_heads=4, head_dim=128))
    fewer = gqa.projection.replace(kv_heads=2)
    virtual = everywhere(HeadComposition(heads_read=4), "key", "value")
    halved = AttentionConfig(projection=fewer, **virtual)
    assert halved.cache_floats() == gqa.cache_floats() / 2 + 4  # the k norm's factors


GQA = PROJECTIONS["gqa"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"projection": PROJECTIONS["gta"], "key": KnockingMLP()}, "key.kind: .*one tied state"),
        ({"projection": PROJECTIONS["mla"], "value": KnockingMLP()}, "value.kind: .*never made"),
        ({"projection": PROJECTIONS["gla"], "key": HeadComposition()}, "key.kind: .*2 latents"),
        ({"projection": PROJECTIONS["shared"], "key": KnockingLinear()}, "key.kind: .*no head"),
        (
            {"projection": GQA, "key": HeadComposition(heads_read=4)},
            "key.heads_read: must make as many key heads as value heads, found 4 and 2",
        ),
        (
            {"projection": GQA, **everywhere(HeadComposition(heads_read=3), "key", "value")},
            "key.kind: .*2 heads do not repeat into 3",
        ),
        (
            {"projection": GQA, "query": HeadComposition(heads_read=8)},
            "query.heads_read: must leave 4 heads, found 8",
        ),
        (
            {"projection": GQA, "logits": TalkingHeads(), "kernel": "splash"},
            "kernel: 'splash' never holds the scores of all heads at once.*use 'auto'",
        ),
        (
            {"projection": PROJECTIONS["mha"], "output": DifferentialOutput()},
            "output.kind: .*pairs of query heads share a key head, found 1",
        ),
        (
            {"projection": GQA, "output": MixtureOfHeads(shared_heads=2, top_k=3)},
            "output.kind: .*2 are shared, which leaves 2 to choose top_k=3 from",
        ),
    ],
)
def test_combinations_without_a_meaning_say_why(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        AttentionConfig(**fields)


def test_a_mixer_costs_its_rows_on_weights():
    auto = KnockingLinear()
    assert auto.on_weights(rows=1536, tokens=32768) and not auto.on_weights(rows=1536, tokens=1024)
    assert auto.flops(4, 128, 1536, 32768) == 2 * 4 * 128**2 * 1536 / 32768
    assert KnockingMLP().flops(4, 128, 1536, 32768) == 2 * 4 * 3 * 128**2
    assert HeadComposition().flops(4, 128, 1536, 1024) == 2 * 4 * 4 * 128


@pytest.mark.parametrize("projection", ["gqa", "no_norm", "gta", "gla"])
def test_a_scaled_query_shows_unless_a_norm_follows(projection):
    """T = 4 I is undone by a q/k norm, which therefore comes after the mixer; projections without
    one have to show it."""
    config = AttentionConfig(projection=PROJECTIONS[projection], query=KnockingLinear())
    params = random(config)
    scaled = ({**params, "query_mixer": {"kernel": c * jnp.eye(8)}} for c in (1.0, 4.0))
    one, four = (output(config, p) for p in scaled)
    assert np.allclose(one, four, rtol=1e-3, atol=1e-4) == (projection == "gqa")


def test_latents_are_those_of_the_papers_by_default():
    """MLA caches 4 H and R = H/2, GLA as much in two latents, whatever H; values have H."""
    for H in (32, 64, 128):
        for groups, latent in ((1, 4 * H), (2, 2 * H)):
            projection = Latent(query_heads=8, head_dim=H, groups=groups)
            assert projection.latent_width == latent and projection.rotary_width == H // 2
            assert projection.output_shape() == (8, H)
            assert AttentionConfig(projection=projection).cache_floats() == 4 * H + H // 2


def test_a_gate_depends_on_its_input_and_not_only_on_what_was_read():
    config = AttentionConfig(projection=GQA, output=GatedOutput())
    params = random(config)
    other = {**params, "output_mixer": {"gate": -params["output_mixer"]["gate"]}}
    assert relative_error(output(config, params), output(config, other)) > 1e-2


@pytest.mark.parametrize("mixer", [HeadGroupNorm(), KnockingGate()])
def test_bfloat16_stays_bfloat16(mixer):
    fields = {"output": mixer} if isinstance(mixer, HeadGroupNorm) else {"value": mixer}
    config = AttentionConfig(projection=GQA, probabilities=TalkingHeads(), **fields)
    module = config.build(width=D, numerics=Numerics(dtype="bfloat16"))
    x, positions = jnp.zeros((1, 4, D), jnp.bfloat16), jnp.zeros((1, 4), jnp.int32)
    (y, _), params = jax.eval_shape(module.init_with_output, jax.random.key(0), x, positions)
    assert y.dtype == jnp.bfloat16


SEAMS = {
    "query": mixers.STREAM_MIXERS,
    "logits": scores.SCORE_MIXERS,
    "output": outputs.OUTPUT_MIXERS,
    "projection": projections.PROJECTIONS,
}
ADDED = [  # kind, seam, projection that it is tried on
    ("scale", "query", "mla"),
    ("next", "logits", "gqa"),
    ("scaled", "output", "mla"),
    ("shared_key_value", "projection", "shared_key_value"),
]


@pytest.fixture(scope="module")
def page():
    """Every block of docs/add_a_variant.md, run in the file that it names."""
    text = (Path(__file__).parent.parent / "docs" / "add_a_variant.md").read_text()
    blocks = re.findall(r"^In `(.*?)\.py`.*?:\n\n```python\n(.*?)```", text, re.M | re.S)
    assert len(blocks) == text.count("```python")
    tables = (*SEAMS.values(), cases.ROWS, cases.LAYERS, cases.PROJECTIONS)
    before, made = [dict(table) for table in tables], {}
    for file, block in blocks:
        place = file.removesuffix("/__init__").replace("/", ".")
        new = not (Path(__file__).parent.parent / f"{file}.py").exists()
        names = {**({} if new else vars(importlib.import_module(place))), **made}
        exec(compile(block, f"{file}.py", "exec"), names)
        made |= {name: value for name, value in names.items() if getattr(value, "__module__", 0)}
    yield
    for table, old in zip(tables, before):
        table.clear()
        table.update(old)


def a_step_is_traced(kind, projection):
    """Whatever training asks of an attention: roles, multipliers, the trace of its matrices."""
    model = ModelConfig(layers=1, width=D, attention=config_of(kind, projection))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    trainer = make_trainer(RunConfig(batch_size=2, seq_len=8, model=model), mesh)
    state, _ = jax.eval_shape(trainer.train_step, trainer.abstract, trainer.abstract_batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, trainer.abstract)


@pytest.mark.parametrize("kind, seam, projection", ADDED, ids=[kind for kind, *_ in ADDED])
def test_the_page_adds_a_variant_of_every_kind(page, kind, seam, projection):
    test_agrees_with_the_oracle(kind, projection)
    test_cached_decoding_agrees_with_the_oracle_at_every_position(kind, projection)
    test_promises_what_its_row_says(kind, projection)
    test_a_linear_map_is_what_the_mixer_does(kind, projection)
    test_only_heads_that_meet_show_a_permutation(kind, projection)
    test_causal_and_packed(kind, projection)
    test_the_accounting_counts_what_is_there(kind, projection)
    test_eight_devices_compute_what_one_does(kind, projection)
    a_step_is_traced(kind, projection)
    if seam != "projection":
        test_starts_as_its_projection_alone(kind, projection)
        assert kind in variants(AttentionConfig())
    else:
        model = ModelConfig(attention=config_of(kind, projection))
        rate = OptimizerConfig(value_learning_rate_multiplier=3.0)
        with pytest.raises(ConfigError, match="^optimizer.value_learning_rate_multiplier: does no"):
            RunConfig(model=model, optimizer=rate)
    chosen = from_dict(AttentionConfig, {seam: {"kind": kind}})
    assert to_dict(chosen)[seam]["kind"] == kind


# ---------------------------------------------------------------- the largest logit


@pytest.mark.parametrize(
    "name", ["mha", "gqa", "gta", "mla", "gla", "shared", "talking", "virtual"]
)
def test_the_largest_logit_of_the_first_row_is_exact(name):
    """All queries of a row this short are looked at: against loops over queries and visible keys in
    NumPy, with packed documents."""
    fields = {"talking": {"logits": TalkingHeads()}}.get(name, {})
    if name == "virtual":
        compose = HeadComposition(heads_read=4)
        fields = {"key": compose, "value": compose}
    config = AttentionConfig(projection=PROJECTIONS.get(name, PROJECTIONS["gqa"]), **fields)
    params = random(config)
    module = config.build(width=D, numerics=EXACT)
    where = jnp.asarray(POSITIONS)[::-1], jnp.asarray(SEGMENTS)[::-1]  # two documents come first

    def streams(module, x):
        q_BTNH, state = module.projection(x, where[0], module.mixers)
        return q_BTNH, module.projection.keys_and_values(state, module.mixers)[0]

    x = inputs()
    aux = module.apply({"params": params}, x, *where)[1]
    q, k = (np.asarray(z[0]) for z in module.apply({"params": params}, x, method=streams))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    s_NTS = np.einsum("TNH,SNH->NTS", q, k) * config.projection.scale()
    if name == "talking":
        s_NTS = np.einsum("NTS,NM->MTS", s_NTS, params["logits_mixer"]["kernel"])
    seen = [
        s_NTS[:, t, s] for t in range(T) for s in range(t + 1) if SEGMENTS[1, t] == SEGMENTS[1, s]
    ]
    np.testing.assert_allclose(aux.metrics[LARGEST], np.max(seen), rtol=1e-5)


def test_a_long_row_is_looked_at_by_evenly_spaced_queries():
    """150 tokens, every third query: a key that all see decides, and what only others see not."""
    T, picked = 150, np.arange(2, 150, 3)
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, T, 4, 8)).astype(np.float32)

    def largest(q):
        return attend(q, k, v, None, ops.ScoreMaps(), 8**-0.5, "auto")[1]

    s_NTS = np.einsum("TNH,SNH->NTS", q[0], k[0]) / 8**0.5
    expected = max(s_NTS[:, t, : t + 1].max() for t in picked)
    np.testing.assert_allclose(largest(q), expected, rtol=1e-5)
    louder = np.where(np.isin(np.arange(T), picked)[None, :, None, None], q, 100 * q)
    np.testing.assert_allclose(largest(louder), expected, rtol=1e-5)
    assert not np.any(jax.grad(largest)(q))


@pytest.mark.parametrize("name", ["kha_moe_6b", "dense_600m"])
def test_the_largest_logit_costs_less_than_half_a_percent(name):
    """XLA's count, of all layers, against the training FLOPs of the one row that it looks at."""
    config = from_dict(RunConfig, importlib.import_module(f"configs.{name}").get_config("mlp"))
    of, T = config.model.attention.projection, config.seq_len
    q, k = (
        jax.ShapeDtypeStruct((1, rows, heads, of.head_dim), jnp.bfloat16)
        for rows, heads in ((SAMPLE, of.query_heads), (T, of.kv_heads))
    )
    ids, places = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, T), (SAMPLE,)))
    count = jax.jit(ops.largest_logit).lower(q, k, ids, places, 1.0).cost_analysis()["flops"]
    row = accounting.account(config.model, T, tokens=T).training_flops * T
    assert 2 * SAMPLE * T * of.query_heads * of.head_dim <= count
    assert config.model.layers * count < 0.005 * row
