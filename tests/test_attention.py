"""Every projection with every mixer it takes, in every place, against the float64 oracle and its
own properties."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kha_jax.attention import AttentionConfig
from kha_jax.attention.absorb import absorb, foldable
from kha_jax.attention.mixers import KnockingGate, KnockingLinear, KnockingMLP
from kha_jax.attention.projections import GroupedQuery, GroupedTied, Latent
from kha_jax.config import ConfigError
from kha_jax.parameters import Numerics
from tests import reference

PROJECTIONS = {
    "mha": GroupedQuery(query_heads=4, kv_heads=4, head_dim=8),
    "gqa": GroupedQuery(query_heads=4, kv_heads=2, head_dim=8),
    "mqa": GroupedQuery(query_heads=4, kv_heads=1, head_dim=8, qk_norm="none"),
    "gta": GroupedTied(query_heads=4, kv_heads=2, head_dim=8),
    "mla": Latent(query_heads=4, head_dim=8, value_dim=6, rope_dim=4, kv_lora=12),
    "mla_q_lora": Latent(query_heads=4, head_dim=8, value_dim=8, rope_dim=4, kv_lora=12, q_lora=10),
    "gla": Latent(query_heads=4, head_dim=8, value_dim=8, rope_dim=4, kv_lora=12, groups=2),
}
MIXERS = {
    "linear": KnockingLinear(apply="activations"),
    "weights": KnockingLinear(apply="weights"),
    "gate": KnockingGate(),
    "mlp": KnockingMLP(),
}
SLOTS = ("query", "key", "value")
B, T, D = 2, 11, 16
SEGMENTS = np.array([[0] * 11, [0] * 4 + [1] * 7])
POSITIONS = np.array([np.arange(11), [*range(4), *range(7)]])
PAD = np.array([0, 3])


def combinations():
    """(projection, mixer, slots) that mean something: each slot alone, and all of them."""
    for name, projection in PROJECTIONS.items():
        yield name, None, ()
        for kind, mixer in MIXERS.items():
            slots = tuple(slot for slot in SLOTS if projection.refusal(slot, mixer) is None)
            for places in dict.fromkeys([*[(slot,) for slot in slots], slots] if slots else []):
                yield name, kind, places


CASES = [
    pytest.param(*case, id="-".join([case[0], case[1] or "none", *(slot[0] for slot in case[2])]))
    for case in combinations()
]


def attention(name, kind, slots):
    return AttentionConfig(projection=PROJECTIONS[name], **{slot: MIXERS[kind] for slot in slots})


@functools.cache
def built(config):
    module = config.build(width=D, numerics=Numerics(dtype="float32"))
    return module, jax.jit(
        lambda params, x: module.apply(
            {"params": params}, x, jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)
        )[0]
    )


@functools.cache
def cached(config):
    """The same rows as `built` at the positions of a decoder: four tokens prefilled, the others one
    by one, row 1 padded by three."""
    module, _ = built(config)

    def run(params, x):
        def bound(method, *arguments):
            return module.apply({"params": params}, *arguments, method=method)

        positions = jnp.maximum(jnp.arange(T) - PAD[:, None], 0)
        first, state = bound(
            "prefill", x[:, :4], positions[:, :4], (jnp.arange(4) >= PAD[:, None]).astype(jnp.int32)
        )
        cache = jax.tree.map(
            lambda z: jnp.pad(z, [(0, 0), (0, T - 4), (0, 0)], constant_values=7.0), state
        )

        def one(cache, slot):
            visible = (jnp.arange(T) >= PAD[:, None]) & (jnp.arange(T) <= slot)
            x_B1D, positions_B1 = (
                jax.lax.dynamic_slice_in_dim(z, slot, 1, axis=1) for z in (x, positions)
            )
            y, cache = bound("extend", x_B1D, positions_B1, cache, slot, visible)
            return cache, y[:, 0]

        _, rest = jax.lax.scan(one, cache, jnp.arange(4, T))
        return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)

    return jax.jit(run)


def inputs(seed=0):
    return jax.random.normal(jax.random.key(seed), (B, T, D))


def fresh(config):
    """Random parameters with mixers as they are born."""
    params = dict(random(config))
    for slot, (_, head_dim, _) in config.projection.streams(D).items():
        if f"{slot}_mixer" in params:
            mixer = getattr(config, slot).build(head_dim, Numerics(dtype="float32"), name=None)
            params[f"{slot}_mixer"] = nn.unbox(
                mixer.init(jax.random.key(0), jnp.zeros((1, head_dim)))
            )["params"]
    return params


@functools.cache
def random(config, seed=1):
    """Parameters of order one, so that nothing is small enough to hide."""
    draw = np.random.default_rng(seed)
    shapes = nn.unbox(
        jax.eval_shape(
            lambda: built(config)[0].init(jax.random.key(0), inputs(), jnp.asarray(POSITIONS))[
                "params"
            ]
        )
    )

    def about(path):
        return 1.0 if path[-1].key == "scale" else 0.0

    return jax.tree_util.tree_map_with_path(
        lambda p, z: jnp.float32(about(p) + 0.3 * draw.normal(size=z.shape)), shapes
    )


def for_reference(name, params, slots):
    """(layer, parameters, settings) of tests/reference.py for our parameter tree."""
    projection, config = params["projection"], PROJECTIONS[name]
    kinds = {"kernel": "linear", "up": "mlp", "gate": "gate"}
    mixers = {}
    for slot in slots:
        matrices = params[f"{slot}_mixer"]
        mixers[slot] = (next(kind for key, kind in kinds.items() if key in matrices), matrices)
    out = {"output": params["output"], "mixers": mixers}
    if isinstance(config, GroupedQuery):
        names, norms = (
            ("query", "key", "value"),
            ("query_norm", "key_norm") if config.qk_norm == "rms" else (),
        )
        out.update({n: projection[n] for n in names}, **{n: projection[n]["scale"] for n in norms})
        return "grouped_query", out, {"qk_norm": config.qk_norm == "rms"}
    if isinstance(config, GroupedTied):
        return (
            "grouped_tied",
            {**out, **{n: projection[n] for n in ("query", "state", "rotary_key")}},
            {},
        )
    out.update({n: projection[n] for n in ("latent_down", "rotary_key", "key_up", "value_up")})
    out["latent_norm"] = np.stack(
        [projection[f"latent_norms_{g}"]["scale"] for g in range(config.groups)]
    )
    query = np.concatenate([projection["query"], projection["query_rope"]], axis=-1)
    if config.q_lora:
        out.update(
            query_down=projection["query_down"],
            query_latent_norm=projection["query_norm"]["scale"],
            query_up=query,
        )
    else:
        out["query"] = query
    return ("latent" if config.groups == 1 else "grouped_latent"), out, {}


def relative_error(ours, expected):
    return np.abs(np.asarray(ours, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("name", "kind", "slots"), CASES)
def test_agrees_with_the_oracle(name, kind, slots):
    config = attention(name, kind, slots)
    params = random(config)
    layer, parameters, settings = for_reference(name, params, slots)
    expected = reference.ATTENTION[layer](
        *reference.float64((inputs(), parameters)), POSITIONS, SEGMENTS, settings
    )
    assert relative_error(built(config)[1](params, inputs()), expected) < 1e-5


def decoding_differs(case):
    """Latents are decoded without their mixers' activations, so every place counts there; elsewhere
    all of them at once do."""
    name, _, slots = case.values
    return isinstance(PROJECTIONS[name], Latent) or len(slots) != 1


@pytest.mark.parametrize(
    ("name", "kind", "slots"), [case for case in CASES if decoding_differs(case)]
)
def test_cached_decoding_agrees_with_the_oracle_at_every_position(name, kind, slots):
    config = attention(name, kind, slots)
    params = random(config)
    layer, parameters, settings = for_reference(name, params, slots)
    decoded = cached(config)(params, inputs())
    for row, pad in enumerate(PAD):
        x, positions = inputs()[row : row + 1, pad:], np.arange(T - pad)[None]
        expected = reference.ATTENTION[layer](
            *reference.float64((x, parameters)), positions, np.zeros_like(positions), settings
        )
        assert relative_error(decoded[row, pad:], expected[0]) < 1e-5


@pytest.mark.parametrize(("name", "kind", "slots"), [case for case in CASES if case.values[2]])
def test_a_fresh_mixer_changes_no_bit(name, kind, slots):
    config, base = attention(name, kind, slots), attention(name, None, ())
    params = fresh(config)
    stripped = {key: leaf for key, leaf in params.items() if not key.endswith("_mixer")}
    assert len(params) - len(stripped) == len(slots)
    np.testing.assert_array_equal(
        built(config)[1](params, inputs()), built(base)[1](stripped, inputs())
    )


@pytest.mark.parametrize("name", PROJECTIONS)
def test_weights_and_activations_have_the_same_gradients(name):
    slots = tuple(
        slot for slot in SLOTS if PROJECTIONS[name].refusal(slot, MIXERS["linear"]) is None
    )
    params = random(attention(name, "linear", slots))
    cotangent = jax.random.normal(jax.random.key(5), (B, T, D))
    grads = []
    for kind in ("linear", "weights"):
        run = built(attention(name, kind, slots))[1]
        grads.append(jax.jit(jax.grad(lambda p: jnp.vdot(run(p, inputs()), cotangent)))(params))
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[0]))
    chex.assert_trees_all_close(*grads, atol=2e-5 * scale)


@pytest.mark.parametrize("parameterization", ["direct", "residual"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_absorbing_linear_mixers_changes_nothing(name, parameterization):
    mixer = KnockingLinear(parameterization=parameterization, diag_init=0.7)
    slots = tuple(slot for slot in SLOTS if PROJECTIONS[name].refusal(slot, mixer) is None)
    config = AttentionConfig(projection=PROJECTIONS[name], **{slot: mixer for slot in slots})
    params = random(config)
    baseline, folded = absorb(config, params)
    assert baseline == attention(name, None, ()) and not any(
        key.endswith("_mixer") for key in folded
    )
    chex.assert_trees_all_equal_shapes(folded, random(baseline))
    before, after = built(config)[1](params, inputs()), built(baseline)[1](folded, inputs())
    assert relative_error(after, np.asarray(before, np.float64)) < 1e-5
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[0], absorb(config, stack)[1]), folded, rtol=1e-6
    )


def test_folding_an_mlp_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="value.kind: KnockingMLP is not linear"):
        foldable(attention("gqa", "mlp", ("value",)))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_causal_and_packed(name):
    slots = tuple(
        slot for slot in SLOTS if PROJECTIONS[name].refusal(slot, MIXERS["linear"]) is None
    )
    config = attention(name, "linear", slots)
    params, run = random(config), built(config)[1]

    @jax.jit
    def reads(row, position):
        """[B, T]: how much this output moves with each input, through no approximation."""
        weights = jax.random.normal(jax.random.key(3), (D,))
        return jnp.abs(
            jax.grad(lambda x: jnp.vdot(run(params, x)[row, position], weights))(inputs())
        ).max(axis=-1)

    visible = np.zeros((2, *inputs().shape[:2]), bool)
    visible[0, 0, :7] = True
    visible[1, 1, 4:7] = True  # the second row holds another document before
    np.testing.assert_array_equal(np.stack([reads(0, 6), reads(1, 6)]) > 0, visible)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_parameters_are_those_of_the_accounting(name):
    config = attention(name, None, ())
    assert sum(leaf.size for leaf in jax.tree.leaves(random(config))) == config.parameters(D)


@pytest.mark.parametrize(
    ("projection", "floats"),
    [
        (GroupedQuery(query_heads=32, kv_heads=4, head_dim=128), 1024),
        (GroupedQuery(query_heads=16, kv_heads=8, head_dim=128), 2048),
        (GroupedQuery(query_heads=16, kv_heads=16, head_dim=128), 4096),
        (GroupedQuery(query_heads=32, kv_heads=1, head_dim=128), 256),
        (GroupedTied(query_heads=32, kv_heads=4, head_dim=128), 512 + 64),
        (
            Latent(
                query_heads=32, head_dim=128, value_dim=128, rope_dim=64, kv_lora=512, q_lora=1024
            ),
            512 + 64,
        ),
        (
            Latent(query_heads=32, head_dim=128, value_dim=128, rope_dim=64, kv_lora=256, groups=2),
            512 + 64,
        ),
    ],
)
def test_the_state_holds_what_table_3_prints(projection, floats):
    assert projection.cache_floats() == floats
    module = projection.build(width=256, numerics=Numerics(dtype="float32"))
    identity = type(
        "Identity", (), {"project": staticmethod(lambda x, w: jnp.tensordot(x, w, 1))}
    )()
    x, positions = (
        jax.ShapeDtypeStruct((1, 3, 256), jnp.float32),
        jax.ShapeDtypeStruct((1, 3), jnp.int32),
    )
    (_, state), _ = jax.eval_shape(
        lambda *a: module.init_with_output(jax.random.key(0), *a, dict.fromkeys(SLOTS, identity)),
        x,
        positions,
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 3 * floats


@pytest.mark.parametrize(
    ("name", "slot", "mixer", "reason"),
    [
        ("gta", "key", KnockingLinear(), "one tied state"),
        ("gta", "key", KnockingMLP(), "one tied state"),
        ("mla", "value", KnockingMLP(), "never made when decoding"),
        ("gla", "key", KnockingGate(), "never made when decoding"),
    ],
)
def test_combinations_without_a_meaning_say_why(name, slot, mixer, reason):
    with pytest.raises(ConfigError, match=rf"{slot}.kind: .*{reason}"):
        AttentionConfig(projection=PROJECTIONS[name], **{slot: mixer})


def test_one_group_is_mla_and_a_mixer_costs_its_rows_on_weights():
    auto = KnockingLinear()
    assert auto.on_weights(rows=1536, tokens=32768) and not auto.on_weights(rows=1536, tokens=1024)
    assert auto.flops(4, 128, 1536, 32768) == 2 * 4 * 128**2 * 1536 / 32768
    assert KnockingMLP().flops(4, 128, 1536, 32768) == 2 * 4 * 3 * 128**2


# The axis of each parameter that runs over query heads, or over key/value heads and those they
# serve.
HEAD_AXES = {
    GroupedQuery: ({"query": 1}, {"key": 1, "value": 1}),
    GroupedTied: ({"query": 1}, {"state": 1}),
    Latent: ({"query": 1, "query_rope": 1}, {"key_up": 2, "value_up": 2}),
}


@pytest.mark.parametrize("kind", [None, "linear", "gate", "mlp"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_knocking_commutes_with_any_permutation_of_the_heads(name, kind):
    """Nothing is summed over heads: moving whole heads moves nothing else. Heads x heads matrices
    would fail here."""
    projection = PROJECTIONS[name]
    slots = tuple(slot for slot in SLOTS if kind and projection.refusal(slot, MIXERS[kind]) is None)
    if kind and not slots:
        pytest.skip("refused: " + projection.refusal("value", MIXERS[kind]))
    config = attention(name, kind, slots)
    params = random(config)
    groups = projection.groups if isinstance(projection, Latent) else 1
    shared = (
        projection.query_heads // groups if isinstance(projection, Latent) else projection.kv_heads
    )
    # of the key/value heads, or of the heads within each latent group
    order = np.arange(shared)[::-1]
    each = projection.query_heads // groups // shared
    query = np.concatenate(
        [
            g * projection.query_heads // groups + each * k + np.arange(each)
            for g in range(groups)
            for k in order
        ]
    )
    over_query, over_shared = HEAD_AXES[type(projection)]
    moved = {n: jnp.take(params["projection"][n], query, axis) for n, axis in over_query.items()}
    moved |= {n: jnp.take(params["projection"][n], order, axis) for n, axis in over_shared.items()}
    permuted = {
        **params,
        "projection": {**params["projection"], **moved},
        "output": params["output"][query],
    }
    run = built(config)[1]
    assert (
        relative_error(run(permuted, inputs()), np.asarray(run(params, inputs()), np.float64))
        < 1e-5
    )


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_scaled_query_shows_unless_a_norm_follows(name):
    """T = 4 I is undone by a q/k norm, which therefore comes after the mixer; projections without
    one have to show it."""
    config = attention(name, "linear", ("query",))
    run, params = built(config)[1], random(config)
    one, four = (
        run({**params, "query_mixer": {"kernel": c * jnp.eye(8)}}, inputs()) for c in (1.0, 4.0)
    )
    normalised = isinstance(PROJECTIONS[name], GroupedQuery) and PROJECTIONS[name].qk_norm == "rms"
    assert np.allclose(one, four, rtol=1e-3, atol=1e-4) == normalised
