"""The training step: accumulation, non-finite steps, optimiser roles, and one device against
eight."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from kha_jax import data
from kha_jax.attention import AttentionConfig, devices
from kha_jax.attention.attention import LARGEST
from kha_jax.attention.mixers import KnockingLinear, KnockingMLP, NoMixer
from kha_jax.attention.projections import GroupedQuery, GroupedTied, Latent
from kha_jax.attention.scores import TalkingHeads
from kha_jax.config import ConfigError
from kha_jax.data.loader import to_device
from kha_jax.errors import CheckpointError
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.inference.folding import foldable_slots
from kha_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from kha_jax.model import AttentionFrom, LossConfig, ModelConfig
from kha_jax.modules import Numerics
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.training import optimizer
from kha_jax.training.optimizer import learning_rate, make, roles, schedule
from kha_jax.training.run_config import MixerOptimizerConfig, OptimizerConfig, RunConfig
from kha_jax.training.step import _rebalance, make_trainer
from tests import cases

KEY = jax.random.key(7)
ATTENTION = AttentionConfig(
    projection=GroupedQuery(query_heads=4, kv_heads=4, head_dim=8),
    value=KnockingMLP(),
    query=KnockingLinear(),
)
MODEL = ModelConfig(
    layers=2,
    width=32,
    vocabulary_size=64,
    attention=ATTENTION,
    feed_forward=SwiGLU(width=64),
    numerics=Numerics(dtype="float32"),
    loss=LossConfig(z_loss=1e-3, chunk_tokens=64),
)
RUN = RunConfig(
    steps=20,
    batch_size=8,
    seq_len=16,
    model=MODEL,
    data=data.MultiQueryAssociativeRecall(pairs=4, vocabulary=64),
    mesh=MeshConfig(data=1),
    optimizer=OptimizerConfig(learning_rate=1e-2),
)


def random_batch(seed=0, uneven=True):
    random = np.random.default_rng(seed)
    ids = random.integers(0, 64, (8, 17)).astype(np.int32)
    weights = (
        random.random((8, 16)) < (np.arange(8)[:, None] + 1) / 9 if uneven else np.ones((8, 16))
    ).astype(np.float32)
    segment_ids = (np.arange(16) > 9).astype(np.int32) * np.ones((8, 1), np.int32)
    positions = np.where(segment_ids, np.arange(16) - 10, np.arange(16)).astype(np.int32)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": positions,
        "segment_ids": segment_ids,
        "weights": weights,
    }


@functools.cache
def fresh(model):
    """Initial parameters, compiled once for all meshes and optimisers."""
    trainer = make_trainer(RUN.replace(model=model), make_mesh(RUN.mesh, jax.devices()[:1]))
    return jax.device_get(trainer.init(jax.random.key(0)).params)


@functools.cache
def begun(config, devices=1):
    """(trainer, initial state, step that takes NumPy batches and leaves its state) on the first
    devices."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    trainer = make_trainer(config, mesh)
    zeros = jax.tree.map(lambda z: np.zeros(z.shape, z.dtype), trainer.abstract)
    state = jax.device_put(
        zeros._replace(params=fresh(config.model.replace(remat="none", stack="scan"))),
        trainer.shardings,
    )
    rows = trainer.abstract_batch["tokens"].sharding

    def step(state, batch):
        return trainer.train_step(jax.tree.map(jnp.copy, state), to_device(batch, rows, 8))

    return trainer, state, step


@functools.cache
def trained(config, devices=1, steps=3):
    """(trainer, state, metrics of every step) of a few steps on the first devices."""
    trainer, state, step = begun(config, devices)
    out = []
    for i in range(steps):
        state, metrics = step(state, random_batch(i))
        out.append(jax.device_get(metrics))
    return trainer, state, out


def test_accumulation_is_weighted_by_tokens():
    """Micro-batches with very different token counts give the whole batch's step, not the mean of
    their means."""
    _, whole, whole_metrics = trained(RUN)
    _, parts, parts_metrics = trained(RUN.replace(accumulation=4))
    for a, b in zip(whole_metrics, parts_metrics):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    chex.assert_trees_all_close(whole.params, parts.params, atol=2e-4)


def test_mixers_alone_are_trained_and_as_they_are_among_all():
    """Bit-equal elsewhere; Adam's first step does not depend on the other gradients, clipped too.
    Moments are those of the mixers."""
    alone = RUN.replace(optimizer=RUN.optimizer.replace(trainable="mixers"), accumulation=2)
    trainer, state, _ = trained(alone, steps=1)
    before, among = flatten_dict(fresh(MODEL)), flatten_dict(trained(RUN, steps=1)[1].params)
    mixers = {path for path in before if {"query_mixer", "value_mixer"} & {*path}}
    for path, leaf in flatten_dict(jax.device_get(state.params)).items():
        if path in mixers:
            np.testing.assert_allclose(leaf, among[path], atol=2e-4)
            assert np.abs(leaf - before[path]).max() > 1e-4
        else:
            np.testing.assert_array_equal(leaf, before[path])
    moments = [leaf for leaf in jax.tree.leaves(trainer.abstract.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * alone.cost().mixing
    paths = optimizer.trained(alone.optimizer, fresh(MODEL))
    assert paths == mixers
    balance = {"layers": jnp.zeros((2, 4))}
    frozen, _ = _rebalance(alone, balance, {"layers": jnp.arange(8).reshape(2, 4)})
    chex.assert_trees_all_equal(frozen, balance)


def test_mixers_that_are_not_there_are_not_trained():
    run = RUN.replace(optimizer=RUN.optimizer.replace(trainable="mixers"))
    plain = MODEL.replace(attention=AttentionConfig(projection=ATTENTION.projection))
    with pytest.raises(ConfigError, match="^optimizer.trainable: trains nothing with 'mixers'"):
        run.replace(model=plain)
    assert run.with_model(plain).optimizer == RUN.optimizer  # a folded run is trained as a whole
    assert run.with_model(MODEL) == run


@pytest.mark.parametrize(
    "mesh",
    [(2, 2, 2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((8, 1, 1), (2, 1, 4)))],
)
def test_eight_devices_train_as_one(mesh):
    _, one, one_metrics = trained(RUN)
    sizes = dict(zip(MESH_AXES, mesh))
    _, eight, eight_metrics = trained(RUN.replace(mesh=MeshConfig(**sizes)), devices=8)
    for a, b in zip(one_metrics, eight_metrics):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        assert a[LARGEST].shape == (2,)
        np.testing.assert_allclose(a[LARGEST], b[LARGEST], rtol=1e-4)
    chex.assert_trees_all_close(jax.device_get(one.params), jax.device_get(eight.params), atol=2e-4)


@pytest.mark.slow
def test_the_largest_logit_changes_nothing_else(monkeypatch):
    """Bit for bit, with micro-batches and rematerialisation; and it costs what it computes alone:
    nothing in the backward pass."""
    config = RUN.replace(accumulation=2, model=MODEL.replace(remat="dots"))
    states, flops = [], []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(devices, "_largest_logit", lambda *_: jnp.zeros(()))
        trainer, state, _ = begun.__wrapped__(config)
        step, rows = trainer.lower().compile(), trainer.abstract_batch["tokens"].sharding
        state, metrics = step(state, to_device(random_batch(), rows, 8))
        assert np.all(metrics[LARGEST] > 0) == looks
        states.append(jax.device_get(state))
        flops.append(step.cost_analysis()["flops"])
    chex.assert_trees_all_equal(*states)
    queries, keys, heads, width, layers = 16, 16, 4, 8, 2
    assert flops[0] - flops[1] < 2 * layers * queries * keys * heads * (2 * width + 8)


VARIANTS = {
    "mqa": (GroupedQuery(query_heads=8, kv_heads=1, head_dim=8), KnockingMLP()),
    "gta": (GroupedTied(query_heads=8, kv_heads=4, head_dim=8), KnockingMLP()),
    "gla": (Latent(query_heads=8, head_dim=8, kv_lora=16, groups=2), KnockingLinear()),
    "mixture": (GroupedQuery(query_heads=8, kv_heads=4, head_dim=8), KnockingLinear()),
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 1, 4)])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_on_meshes_as_on_one_device(name, mesh):
    """The losses of 20 steps to 1e-5."""
    projection, mixer = VARIANTS[name]
    feed_forward = MoE(experts=8, top_k=2, width=16) if name == "mixture" else MODEL.feed_forward
    model = MODEL.replace(
        attention=AttentionConfig(projection=projection, value=mixer), feed_forward=feed_forward
    )
    config = RUN.replace(model=model, optimizer=OptimizerConfig(learning_rate=1e-3))
    one = trained(config, steps=20)[2]
    eight = trained(
        config.replace(mesh=MeshConfig(**dict(zip(MESH_AXES, mesh)))), devices=8, steps=20
    )[2]
    np.testing.assert_allclose([m["loss"] for m in eight], [m["loss"] for m in one], rtol=1e-5)


# Of each kind of mixer one where heads mix, differ or are routed; test_attention compares the
# gradients of all of them.
MECHANISMS = ("talking", "virtual", "mea", "differential", "mixture", "unshared", "all_at_once")


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanisms_train_on_eight_devices_as_on_one(name):
    """The losses of ten steps to 1e-5, and all of them finite."""
    attention = cases.config_of(name, cases.ROWS[name].on[0])
    model = MODEL.replace(attention=attention)
    config = RUN.replace(model=model, optimizer=OptimizerConfig(learning_rate=1e-3))
    one = trained(config, steps=10)[2]
    eight = trained(config.replace(mesh=MeshConfig(data=2, expert=2, model=2)), devices=8, steps=10)
    for a, b in zip(one, eight[2], strict=True):
        assert a["nonfinite"] == 0
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a[LARGEST], b[LARGEST], rtol=1e-3)


def test_parameters_and_optimiser_state_are_born_sharded():
    trainer, state, _ = trained(RUN.replace(mesh=MeshConfig(data=2, expert=1, model=4)), devices=8)
    up = state.params["layers"]["feed_forward"]["up"]
    assert up.addressable_shards[0].data.shape == (2, 32 // 2, 64 // 4)
    moment = state.optimizer[1].mu["layers"]["feed_forward"]["up"]
    assert moment.sharding.is_equivalent_to(up.sharding, up.ndim)
    assert state.params["layers"]["attention"]["value_mixer"]["up"].sharding.is_fully_replicated


def test_a_kernel_that_needs_long_rows_still_makes_its_parameters():
    model = MODEL.replace(attention=ATTENTION.replace(kernel="splash"))
    trainer = make_trainer(RUN.replace(model=model), make_mesh(RUN.mesh, jax.devices()[:1]))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        trainer.abstract.params, trained(RUN)[0].abstract.params
    )


def test_what_is_wrong_with_later_layers_is_said_of_their_fields():
    later = AttentionFrom(layer=1, attention=ATTENTION.replace(kernel="splash"))
    run = RUN.replace(
        model=MODEL.replace(attention=ATTENTION.replace(value=NoMixer()), later=later)
    )
    with pytest.raises(ConfigError, match=r"^model\.later\.attention\.kernel: 'splash' runs on"):
        run.check_on({"data": 1, "expert": 1, "model": 1}, "cpu")
    with pytest.raises(ConfigError, match=r"^later\.attention\.value\.kind: KnockingMLP is not"):
        foldable_slots(run.model)


def test_a_non_finite_step_changes_nothing_but_the_step():
    _, state, _ = trained(RUN)
    step, batch = begun(RUN)[2], random_batch(9)
    batch["weights"] = batch["weights"] * np.float32(np.nan)
    after, metrics = step(state, batch)
    assert metrics["nonfinite"] == 1
    assert after.step == state.step + 1
    chex.assert_trees_all_equal(after.params, state.params)
    chex.assert_trees_all_equal(after.optimizer, state.optimizer)
    _, healthy = step(after, random_batch(10))
    assert healthy["nonfinite"] == 0 and np.isfinite(healthy["loss"])


def test_the_loss_falls_on_one_batch():
    _, state, step = begun(RUN)
    losses = []
    for _ in range(20):
        state, metrics = step(state, random_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_evaluation_sums_agree_with_training_loss():
    trainer, state, _ = trained(RUN)
    sums = trainer.evaluation_step(state, random_batch(3))
    _, metrics = begun(RUN)[2](state, random_batch(3))
    np.testing.assert_allclose(sums.loss / sums.tokens, metrics["loss"], rtol=1e-6)


AXES = {
    "kernel": ("layers", "embed", "feed_forward"),
    "norm": ("layers", "embed"),
    "final_norm": ("embed",),
    "table": ("vocabulary", "embed"),
    "knock": ("layers", "mixer_in", "mixer_out"),
    "bias": ("layers", "kv_heads", "head_dim"),
}


def test_roles_follow_from_logical_axes():
    assert roles(AXES) == {
        "kernel": "weight",
        "norm": "vector",
        "final_norm": "vector",
        "table": "weight",
        "knock": "mixer",
        "bias": "vector",
    }


def one_update(config, knock, initial=None):
    """Parameters after one update with zero gradients: what decay alone does."""
    params = {
        "kernel": jnp.ones((2, 3, 4)),
        "norm": jnp.ones((2, 3)),
        "final_norm": jnp.ones(3),
        "table": jnp.ones((5, 3)),
        "knock": knock,
        "bias": jnp.ones((2, 3, 4)),
    }
    tx = make(config, 10, AXES, initial)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return jax.tree.map(lambda p, u: p + u, params, updates)


@pytest.mark.parametrize("bound", [1.0, 100.0])
def test_gradients_are_clipped_as_optax_does(bound):
    grads = {name: jnp.arange(1.0, 9.0) * scale for name, scale in (("a", 1.0), ("b", -0.5))}
    theirs = optax.clip_by_global_norm(bound).update(grads, optax.EmptyState())[0]
    for given in ({}, {"norm": optax.tree.norm(grads)}):
        ours = optimizer._clip(bound).update(grads, optax.EmptyState(), **given)[0]
        chex.assert_trees_all_equal(ours, theirs)


def test_bfloat16_parameters_lose_no_update():
    """Below their precision they move in the mean as float32 ones do, the same again from the same
    key; float32 ones as optax moves them, bit for bit."""
    exact = {"a": jnp.linspace(-2.0, 2.0, 4096), "b": jnp.full(4096, 1.0)}
    start = optax.tree.cast(exact, jnp.bfloat16)
    moves, seen = jax.tree.map(lambda z: jnp.full(z.shape, -1e-4), exact), []

    @jax.jit
    def moved(parameters):
        def one(p, step):
            return optimizer.apply_updates(p, moves, jax.random.fold_in(KEY, step)), None

        return jax.lax.scan(one, parameters, jnp.arange(100))[0]

    for _ in range(2):
        seen.append(moved(start))
    chex.assert_trees_all_equal(*seen)
    for name, leaf in seen[0].items():
        assert leaf.dtype == jnp.bfloat16
        way = optimizer.float32(leaf) - optimizer.float32(start[name])
        np.testing.assert_allclose(jnp.mean(way), -1e-2, rtol=0.02)
    ours = optimizer.apply_updates(exact, moves, KEY)
    chex.assert_trees_all_equal(ours, optax.apply_updates(exact, moves))


@pytest.mark.parametrize("x", [1.0 + 2**-9, -3.0 - 2**-8, 1e-30, 0.0, 1.5])
def test_rounding_at_random_takes_a_neighbour_and_is_exact_in_the_mean(x):
    rounded = optimizer.round_at_random(jnp.full(20_000, x, jnp.float32), KEY)
    rounded = np.asarray(rounded, np.float64)
    step = 2.0 ** (np.floor(np.log2(abs(x))) - 7) if x else 0.0
    assert np.all(np.abs(rounded - np.float64(np.float32(x))) < max(step, 1e-300))
    np.testing.assert_allclose(rounded.mean(), x, atol=0.02 * step)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_moments_are_float32_over_bfloat16_parameters(accumulation):
    numerics = Numerics(param_dtype="bfloat16")
    config = RUN.replace(model=MODEL.replace(numerics=numerics), accumulation=accumulation)
    trainer = make_trainer(config, make_mesh(RUN.mesh, jax.devices()[:1]))
    after, _ = trainer.train_step.eval_shape(trainer.abstract, trainer.abstract_batch)
    kinds = ("params", jnp.bfloat16), ("optimizer", jnp.float32)
    for state in (trainer.abstract, after):
        for part, kind in kinds:
            leaves = [leaf for leaf in jax.tree.leaves(getattr(state, part)) if leaf.ndim]
            assert {leaf.dtype for leaf in leaves} == {jnp.dtype(kind)}


@pytest.mark.parametrize("decay", ["weights", "none", "to_identity"])
def test_weight_decay_by_role(decay):
    config = OptimizerConfig(
        learning_rate=0.5,
        weight_decay=0.1,
        warmup_fraction=0,
        mixer=MixerOptimizerConfig(decay=decay),
    )
    eye = jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    rate = float(schedule(config, 10)(0))
    after = one_update(
        config, 3 * eye, {name: eye if name == "knock" else jnp.zeros(()) for name in AXES}
    )
    np.testing.assert_allclose(after["kernel"], 1 - rate * 0.1, rtol=1e-6)
    np.testing.assert_allclose(after["table"], 1 - rate * 0.1, rtol=1e-6)
    for vector in ("norm", "final_norm", "bias"):
        np.testing.assert_array_equal(after[vector], 1)
    expected = {"weights": 3 - rate * 0.1 * 3, "none": 3.0, "to_identity": 3 - rate * 0.1 * 2}[
        decay
    ]
    np.testing.assert_allclose(after["knock"], expected * eye, rtol=1e-6)


@pytest.mark.slow
def test_to_identity_in_a_run_pulls_to_the_initial_matrices():
    """With decay to the initial value, a fresh model's mixers move by their gradients only,
    whatever the decay's strength, also where they start at random."""
    random_start = ATTENTION.replace(logits=TalkingHeads(init="variance_scaling"))
    strong, none = (
        trained(
            RUN.replace(
                model=MODEL.replace(attention=random_start),
                optimizer=OptimizerConfig(
                    weight_decay=decay, mixer=MixerOptimizerConfig(decay="to_identity")
                ),
            ),
            steps=1,
        )
        for decay in (50.0, 0.0)
    )

    def mixers(result):
        attention = result[1].params["layers"]["attention"]
        return attention["value_mixer"], attention["logits_mixer"]

    chex.assert_trees_all_equal(mixers(strong), mixers(none))


def test_mixers_and_values_have_learning_rates_of_their_own():
    """Each weight moves by its own factor times what it moves without."""

    def multiplied(mixers, values):
        rule = MixerOptimizerConfig(learning_rate_multiplier=mixers)
        return OptimizerConfig(weight_decay=0, mixer=rule, value_learning_rate_multiplier=values)

    base, changed = (
        flatten_dict(trained(RUN.replace(optimizer=one), steps=1)[1].params)
        for one in (multiplied(1.0, 1.0), multiplied(2.0, 3.0))
    )
    values = ("layers", "attention", "projection", "value")
    factors = {path: 2.0 if "_mixer" in "".join(path) else 1.0 for path in base}
    assert set(factors.values()) == {1.0, 2.0} and values in factors
    factors[values] = 3.0
    for path, start in flatten_dict(fresh(MODEL)).items():
        moved = factors[path] * (base[path] - start)
        np.testing.assert_allclose(moved, changed[path] - start, rtol=1e-3, atol=1e-7)
    with pytest.raises(ConfigError, match="does nothing with trainable='mixers', found 3"):
        OptimizerConfig(trainable="mixers", value_learning_rate_multiplier=3.0)


@pytest.mark.parametrize("projection", cases.PROJECTIONS)
def test_every_projection_has_weights_that_make_its_values(projection):
    """Where they stand among the parameters; nothing else of attention reads a value's rate."""
    attention = AttentionConfig(projection=cases.PROJECTIONS[projection])
    model = MODEL.replace(attention=attention)
    trainer = make_trainer(RUN.replace(model=model), make_mesh(RUN.mesh, jax.devices()[:1]))
    (found,) = optimizer.value_weights(model)
    assert found in flatten_dict(trainer.abstract.params)


def test_schedule_warms_up_and_ends_at_the_final_fraction():
    config, steps = (
        OptimizerConfig(learning_rate=2.0, warmup_fraction=0.05, final_fraction=0.1),
        1000,
    )
    rates = np.array([schedule(config, steps)(i) for i in (0, 24, 49, 50, 525, 1000)])
    np.testing.assert_allclose(rates, [2 / 50, 1.0, 2.0, 2.0, 0.5 * (2.0 + 0.2), 0.2], rtol=1e-5)
    wsd = config.replace(schedule="wsd", decay_fraction=0.2)
    rates = np.array([schedule(wsd, steps)(i) for i in (0, 24, 49, 50, 799, 800, 900, 1000)])
    expected = [2 / 50, 1.0, 2.0, 2.0, 2.0, 2.0, 0.5 * (2.0 + 0.2), 0.2]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.parametrize("updates", [100, 899])
def test_only_the_stable_part_of_wsd_is_prolonged_without_a_jump(updates):
    for kind in ("cosine", "wsd"):
        old = RUN.replace(steps=1000, optimizer=OptimizerConfig(schedule=kind))
        rates = optimizer.jump(old, old.replace(steps=2000), updates)
        assert (rates is None) == (kind == "wsd")
        assert optimizer.jump(old, old, updates) is None
    was, now = optimizer.jump(old, old.replace(steps=2000), 1000)
    assert (was, now) == pytest.approx((7.5e-5, 7.5e-4))


def test_learning_rate_reads_the_optimisers_own_count():
    trainer, state, metrics = trained(RUN)
    np.testing.assert_allclose(
        metrics[-1]["learning_rate"], schedule(RUN.optimizer, RUN.steps)(2), rtol=1e-6
    )
    np.testing.assert_allclose(
        learning_rate(RUN.optimizer, RUN.steps, state.optimizer),
        schedule(RUN.optimizer, RUN.steps)(3),
        rtol=1e-6,
    )


def test_a_reader_passes_over_a_damaged_checkpoint_and_changes_nothing(tmp_path):
    """A writer sets newer damaged checkpoints aside; whoever only reads leaves the folder as it is,
    and takes a part of the state."""
    state = {"params": {"w": jnp.arange(4.0)}, "other": jnp.zeros(3)}
    writer = Checkpoints(tmp_path, 5)
    for step in (1, 2):
        writer.save(step, state)
    writer.close()
    manifest = tmp_path / "00000002" / "MANIFEST.json"
    manifest.write_text("{")
    reader = Checkpoints(tmp_path, 5)
    assert reader.newest_good(set_aside=False) == 1 and manifest.exists()
    abstract = {
        "params": {
            "w": jax.ShapeDtypeStruct(
                (4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            )
        }
    }
    part = reader.restore_part(1, abstract)
    assert set(part) == {"params"}
    np.testing.assert_array_equal(part["params"]["w"], np.arange(4.0))
    with pytest.raises(CheckpointError, match="nothing/w is missing"):
        reader.restore_part(1, {"nothing": abstract["params"]})
    assert reader.newest_good() == 1 and not manifest.exists()
