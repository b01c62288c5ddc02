"""Every projection with every mixer it takes, in every place, against the float64 oracle and its own properties."""

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
    "linear": KnockingLinear(apply="activations"), "weights": KnockingLinear(apply="weights"), "gate": KnockingGate(), "mlp": KnockingMLP()
}  # fmt: skip
SLOTS = ("query", "key", "value")
B, T, D = 2, 11, 16
SEGMENTS = np.array([[0] * 11, [0] * 4 + [1] * 7])
POSITIONS = np.array([np.arange(11), [*range(4), *range(7)]])


def combinations():
    """(projection, mixer, slots) that mean something: each slot alone, and all of them."""
    for name, projection in PROJECTIONS.items():
        yield name, None, ()
        for kind, mixer in MIXERS.items():
            slots = tuple(slot for slot in SLOTS if projection.refusal(slot, mixer) is None)
            for places in dict.fromkeys([*[(slot,) for slot in slots], slots] if slots else []):
                yield name, kind, places


CASES = [pytest.param(*case, id="-".join([case[0], case[1] or "none", *(slot[0] for slot in case[2])])) for case in combinations()]


def attention(name, kind, slots):
    return AttentionConfig(projection=PROJECTIONS[name], **{slot: MIXERS[kind] for slot in slots})


@functools.cache
def built(config):
    module = config.build(width=D, numerics=Numerics(dtype="float32"))
    return module, jax.jit(lambda params, x: module.apply({"params": params}, x, jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))[0])


def inputs(seed=0):
    return jax.random.normal(jax.random.key(seed), (B, T, D))


def initial(config):
    module, _ = built(config)
    return nn.unbox(module.init(jax.random.key(0), inputs(), jnp.asarray(POSITIONS)))["params"]


def random(config, seed=1):
    """Parameters of order one, so that nothing is small enough to hide."""
    leaves, tree = jax.tree.flatten(initial(config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


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
        names, norms = ("query", "key", "value"), ("query_norm", "key_norm") if config.qk_norm == "rms" else ()
        out.update({n: projection[n] for n in names}, **{n: projection[n]["scale"] for n in norms})
        return "grouped_query", out, {"qk_norm": config.qk_norm == "rms"}
    if isinstance(config, GroupedTied):
        return "grouped_tied", {**out, **{n: projection[n] for n in ("query", "state", "rotary_key")}}, {}
    out.update({n: projection[n] for n in ("latent_down", "rotary_key", "key_up", "value_up")})
    out["latent_norm"] = np.stack([projection[f"latent_norms_{g}"]["scale"] for g in range(config.groups)])
    query = np.concatenate([projection["query"], projection["query_rope"]], axis=-1)
    if config.q_lora:
        out.update(query_down=projection["query_down"], query_latent_norm=projection["query_norm"]["scale"], query_up=query)
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
    expected = reference.ATTENTION[layer](*reference.float64((inputs(), parameters)), POSITIONS, SEGMENTS, settings)
    assert relative_error(built(config)[1](params, inputs()), expected) < 1e-5


@pytest.mark.parametrize(("name", "kind", "slots"), [case for case in CASES if case.values[2]])
def test_a_fresh_mixer_changes_no_bit(name, kind, slots):
    config, base = attention(name, kind, slots), attention(name, None, ())
    params = initial(config)
    stripped = {key: leaf for key, leaf in params.items() if not key.endswith("_mixer")}
    assert len(params) - len(stripped) == len(slots)
    np.testing.assert_array_equal(built(config)[1](params, inputs()), built(base)[1](stripped, inputs()))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_weights_and_activations_have_the_same_gradients(name):
    slots = tuple(slot for slot in SLOTS if PROJECTIONS[name].refusal(slot, MIXERS["linear"]) is None)
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
    assert baseline == attention(name, None, ()) and not any(key.endswith("_mixer") for key in folded)
    chex.assert_trees_all_equal_shapes(folded, initial(baseline))
    before, after = built(config)[1](params, inputs()), built(baseline)[1](folded, inputs())
    assert relative_error(after, np.asarray(before, np.float64)) < 1e-5
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], absorb(config, stack)[1]), folded, rtol=1e-6)


def test_folding_an_mlp_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="value.kind: KnockingMLP is not linear"):
        foldable(attention("gqa", "mlp", ("value",)))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_causal_and_packed(name):
    slots = tuple(slot for slot in SLOTS if PROJECTIONS[name].refusal(slot, MIXERS["linear"]) is None)
    config = attention(name, "linear", slots)
    params, run = random(config), built(config)[1]
    before, after = run(params, inputs()), run(params, inputs().at[:, 6].add(1.0))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after)[0, 6:].max(axis=-1) > 0).all()
    elsewhere = run(params, inputs().at[1, 2].add(1.0))
    np.testing.assert_array_equal(before[1, 4:], elsewhere[1, 4:])  # another document of the same row


@pytest.mark.parametrize("name", PROJECTIONS)
def test_parameters_are_those_of_the_accounting(name):
    config = attention(name, None, ())
    assert sum(leaf.size for leaf in jax.tree.leaves(initial(config))) == config.parameters(D)


@pytest.mark.parametrize(
    ("projection", "floats"),
    [
        (GroupedQuery(query_heads=32, kv_heads=4, head_dim=128), 1024), (GroupedQuery(query_heads=16, kv_heads=8, head_dim=128), 2048),
        (GroupedQuery(query_heads=16, kv_heads=16, head_dim=128), 4096), (GroupedQuery(query_heads=32, kv_heads=1, head_dim=128), 256),
        (GroupedTied(query_heads=32, kv_heads=4, head_dim=128), 512 + 64),
        (Latent(query_heads=32, head_dim=128, value_dim=128, rope_dim=64, kv_lora=512, q_lora=1024), 512 + 64),
        (Latent(query_heads=32, head_dim=128, value_dim=128, rope_dim=64, kv_lora=256, groups=2), 512 + 64),
    ],
)  # fmt: skip
def test_the_state_holds_what_table_3_prints(projection, floats):
    assert projection.cache_floats() == floats
    module = projection.build(width=256, numerics=Numerics(dtype="float32"))
    mixers = {slot: KnockingLinear().build(H, Numerics(), name=None).clone(parent=None) for slot, (_, H, _) in projection.streams(256).items()}
    identity = {slot: type("Identity", (), {"project": staticmethod(lambda x, w: jnp.tensordot(x, w, 1))})() for slot in mixers}
    x, positions = jax.ShapeDtypeStruct((1, 3, 256), jnp.float32), jax.ShapeDtypeStruct((1, 3), jnp.int32)
    (_, state), _ = jax.eval_shape(lambda *a: module.init_with_output(jax.random.key(0), *a, identity), x, positions)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 3 * floats


@pytest.mark.parametrize(
    ("name", "slot", "mixer", "reason"),
    [
        ("gta", "key", KnockingLinear(), "one tied state"), ("gta", "key", KnockingMLP(), "one tied state"),
        ("mla", "value", KnockingMLP(), "never made when decoding"), ("gla", "key", KnockingGate(), "never made when decoding"),
    ],
)  # fmt: skip
def test_combinations_without_a_meaning_say_why(name, slot, mixer, reason):
    with pytest.raises(ConfigError, match=rf"{slot}.kind: .*{reason}"):
        AttentionConfig(projection=PROJECTIONS[name], **{slot: mixer})


def test_one_group_is_mla_and_a_mixer_costs_its_rows_on_weights():
    auto = KnockingLinear()
    assert auto.on_weights(rows=1536, tokens=32768) and not auto.on_weights(rows=1536, tokens=1024)
    assert auto.flops(4, 128, 1536, 32768) == 2 * 4 * 128**2 * 1536 / 32768
    assert KnockingMLP().flops(4, 128, 1536, 32768) == 2 * 4 * 3 * 128**2
