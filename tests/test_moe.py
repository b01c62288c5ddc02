"""Mixture of experts: kernels against a plain loop, the layer against the float64 oracle, balancing
and its five known bugs, meshes."""

import functools
import os
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kha_jax.accounting import account
from kha_jax.attention.outputs import MixtureOfHeads
from kha_jax.attention.scores import TalkingHeads
from kha_jax.config import ConfigError
from kha_jax.feed_forward import SwiGLU
from kha_jax.feed_forward.moe import MoE, load_metrics, update_bias
from kha_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from kha_jax.model import AttentionFrom, in_order
from kha_jax.modules import Aux, Numerics, no_aux
from kha_jax.ops import experts_cpu
from kha_jax.ops.experts import KERNELS, experts
from kha_jax.runs import checkpoint
from kha_jax.training.step import make_trainer
from tests import reference, reference_parts
from tests.test_training import RUN, begun, random_batch, trained

D, F = 16, 8


def expert_weights(E, seed=0):
    draw = np.random.default_rng(seed)
    return tuple(
        jnp.float32(draw.normal(size=shape) * 0.3) for shape in ((E, D, F), (E, D, F), (E, F, D))
    )


def routed(kind, N, E, K):
    draw = np.random.default_rng(1)
    chosen = np.argsort(draw.random((N, E)), axis=1)[:, :K]
    if kind == "idle":  # nobody chooses expert 2
        chosen = np.argsort(draw.random((N, E)) - 9.0 * (np.arange(E) == 2), axis=1)[:, ::-1][
            :, :K
        ].copy()
    if kind == "crowded":  # everybody chooses expert 1 first
        chosen[:, 0], chosen[:, 1:] = 1, np.where(chosen[:, 1:] == 1, 0, chosen[:, 1:])
    if kind == "elsewhere":  # half of the experts are on another device
        chosen = chosen - E // 2
    return jnp.asarray(chosen), jnp.float32(draw.random((N, K)))


@functools.cache
def kernel_step(kernel):
    """Value, and gradients of x, the weights of the assignments and the experts."""

    def value(x, weights, matrices, chosen, cotangent):
        y = experts(x, chosen, weights, *matrices, kernel=kernel)
        return jnp.vdot(y, cotangent), y

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(("N", "E", "K"), [(160, 4, 2), (3, 8, 2)], ids=["slots", "decoding"])
@pytest.mark.parametrize("kind", ["random", "idle", "crowded", "elsewhere"])
@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - {"loop"}))
def test_kernels_agree_with_a_loop_over_experts(kernel, kind, N, E, K):
    chosen, weights = routed(kind, N, E, K)
    # more than the slots of an expert, and of more than one block
    if kind == "crowded" and N == 160:
        assert (
            np.bincount(np.asarray(chosen).reshape(-1)).max() - experts_cpu._slots(N * K, E)
            > experts_cpu.BLOCK - 32
        )
    x, cotangent = (jnp.float32(np.random.default_rng(s).normal(size=(N, D))) for s in (2, 3))
    ours, theirs = (
        kernel_step(k)(x, weights, expert_weights(E), chosen, cotangent) for k in (kernel, "loop")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max() + 1e-6))


LAYERS = {
    "sigmoid": MoE(experts=6, top_k=2, width=F),
    "softmax": MoE(experts=6, top_k=3, width=F, scores="softmax", balancing="none"),
    "scaled": MoE(experts=6, top_k=2, width=F, routed_scaling=2.5, shared_experts=2),
    "one": MoE(experts=6, top_k=1, width=F, balancing="sign"),
    "groups": MoE(experts=6, top_k=3, width=F, normalise=False, groups=3, groups_used=2),
}


@functools.cache
def layer(config):
    return config.build(model_width=D, numerics=Numerics(dtype="float32"))


def variables_of(config, bias=None):
    shapes = jax.eval_shape(layer(config).init, jax.random.key(0), jnp.zeros((1, 2, D)))
    draw = np.random.default_rng(5)
    filled = jax.tree.map(lambda z: jnp.float32(0.4 * draw.normal(size=z.shape)), nn.unbox(shapes))
    return {**filled, "balance": {"bias": jnp.float32(bias)}} if bias is not None else filled


def test_more_assignments_than_one_sort_holds_are_refused():
    chosen = jax.ShapeDtypeStruct((2**27, 8), jnp.int32)
    with pytest.raises(ValueError, match="1,073,741,824 assignments to 4 experts at once: raise"):
        jax.eval_shape(functools.partial(experts_cpu._plan, E=4, C=0), chosen)


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_agrees_with_the_oracle(name):
    config = LAYERS[name]
    bias = None if config.balancing == "none" else np.array([0.3, 0, -0.2, 0.1, 0, 0.25])
    variables, x = (
        variables_of(config, bias),
        jnp.float32(np.random.default_rng(6).normal(size=(2, 7, D))),
    )
    y, aux = jax.jit(layer(config).apply)(variables, x)
    names = ("top_k", "scores", "normalise", "groups", "groups_used")
    settings = {name: getattr(config, name) for name in names}
    settings["scaling"] = config.routed_scaling
    expected, counts = reference.mixture(
        *reference_parts.float64((x, variables["params"])),
        np.zeros(6) if bias is None else bias,
        settings,
    )
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(aux.counts["bias"], counts)


def test_the_bias_chooses_but_does_not_weigh():
    """An equal bias for all changes nothing; one that keeps the choice changes nothing either; no
    gradient reaches it."""
    config = LAYERS["sigmoid"]
    x = jnp.float32(np.random.default_rng(6).normal(size=(1, 3, D)))
    run = jax.jit(
        lambda bias: layer(config).apply({**variables_of(config), "balance": {"bias": bias}}, x)[0]
    )
    np.testing.assert_array_equal(run(jnp.zeros(6)), run(jnp.full(6, 0.37)))
    assert np.abs(run(jnp.zeros(6)) - run(jnp.float32([9, 9, 0, 0, 0, 0]))).max() > 1e-3
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda bias: run(bias).sum()))(jnp.zeros(6)), 0)


def test_the_auxiliary_loss_and_the_z_loss_are_their_formulas():
    config = MoE(experts=6, top_k=2, width=F, balancing="auxiliary", router_z_loss=0.1)
    variables, x = (
        variables_of(config),
        jnp.float32(np.random.default_rng(6).normal(size=(2, 7, D))),
    )
    assert "balance" not in variables
    loss = layer(config).apply(variables, x)[1].loss
    logits = np.asarray(x, np.float64) @ np.asarray(variables["params"]["router"], np.float64)
    scores = 1 / (1 + np.exp(-logits))
    counts = np.bincount(np.argsort(-scores, axis=-1)[..., :2].reshape(-1), minlength=6)
    share = (scores / scores.sum(-1, keepdims=True)).mean((0, 1))
    expected = 0.01 * 6 * np.sum(counts / counts.sum() * share) + 0.1 * np.mean(
        np.log(np.exp(logits).sum(-1)) ** 2
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "moved"),
    [  # counts 6, 2, 0, 0: F - Q = 1/2, 0, -1/4, -1/4 with RMS sqrt(3/32)
        ("rms", np.array([-0.5, 0, 0.25, 0.25]) / np.sqrt(0.09375)),
        ("sign", np.array([-1, 0, 1, 1])),
        ("sign_centred", np.array([-1.25, -0.25, 0.75, 0.75])),
    ],
)
def test_each_rule_on_a_worked_example(rule, moved):
    config = MoE(experts=4, top_k=2, balancing=rule, balancing_rate=0.01)
    bias = jnp.float32([[0.1, 0.2, 0.3, 0.4]] * 2)
    counts = jnp.int32([[6, 2, 0, 0], [2, 2, 2, 2]])
    np.testing.assert_allclose(
        update_bias(config, bias, counts), bias + 0.01 * np.stack([moved, np.zeros(4)]), rtol=1e-6
    )


@pytest.mark.parametrize("rule", ["rms", "sign", "sign_centred"])
@pytest.mark.parametrize("experts", [1, 3, 7, 16, 48, 100, 128])
def test_the_bias_moves_by_the_exact_excess(rule, experts):
    """Against integers without bounds, at any size of counts; an even row does not move at all."""
    config = MoE(experts=experts, top_k=1, balancing=rule, balancing_rate=1.0)
    draw = np.random.default_rng(experts)
    most = [10, 1_000, 2**24, (2**31 - 1) // experts]
    counts = np.stack([draw.integers(0, high, experts) for high in most])
    counts[2, 1:] = counts[2, 0] + draw.integers(0, 2, experts - 1)  # nearly even
    counts[3] = most[3] // experts
    excess = counts.astype(object) * experts - counts.sum(-1, keepdims=True).astype(object)
    excess = excess.astype(np.float64)
    size = np.sqrt(np.mean(excess**2, -1, keepdims=True))
    move = -np.sign(excess) if rule != "rms" else -excess / np.where(size > 0, size, 1)
    move -= np.mean(move, -1, keepdims=True) if rule == "sign_centred" else 0
    ours = update_bias(config, jnp.zeros(counts.shape), jnp.asarray(counts, jnp.int32))
    np.testing.assert_allclose(ours, move, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours[3], 0)


def test_where_shares_are_exact_the_bias_moves_as_it_did_in_floats():
    """Bit for bit, so that runs of powers of two go on as they began."""
    config = MoE(experts=64, top_k=4, balancing="rms", balancing_rate=1e-3)
    counts = np.random.default_rng(0).multinomial(2**20, np.full(64, 1 / 64), size=3)
    excess = jnp.float32(counts) / 2.0**20 - 1 / 64
    size = jnp.sqrt(jnp.mean(jnp.square(excess), axis=-1, keepdims=True))
    bias = jnp.linspace(-1.0, 1.0, 64) * jnp.ones((3, 1))
    ours = update_bias(config, bias, jnp.asarray(counts, jnp.int32))
    np.testing.assert_array_equal(ours, bias + config.rate() * (-excess / size))


def test_a_step_has_fewer_assignments_than_its_counts_can_hold():
    at_most = MIXTURE.replace(batch_size=2**23, seq_len=31)
    with pytest.raises(ConfigError, match="^batch_size: .* 8 experts must be below 2.31"):
        at_most.replace(seq_len=32)


def test_load_metrics_on_a_worked_example():
    metrics = load_metrics(
        jnp.float32([[6, 2, 0, 0], [2, 2, 2, 2]]),
        jnp.float32([[0.1, 0.2, 0.3, 0.45], [0, 0, 0, 0]]),
    )
    np.testing.assert_allclose(metrics["max_violation"], [2, 0])
    np.testing.assert_allclose(metrics["smallest_load"], [0, 1])
    np.testing.assert_allclose(metrics["largest_load"], [3, 1])
    np.testing.assert_allclose(metrics["bias_range"], [0.35, 0], atol=1e-6)
    np.testing.assert_allclose(
        metrics["load_entropy"],
        [-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4), 1],
        rtol=1e-6,
    )


# the kernel that compiles fastest
EXPERTS = MoE(experts=8, top_k=2, width=16, balancing_rate=0.01, kernel="ragged")
MIXTURE = RUN.replace(model=RUN.model.replace(feed_forward=EXPERTS))


def bias_of(state):
    return np.asarray(state.balance["layers"]["feed_forward"]["bias"])


def one_step(config):
    """(state, metrics) after a step."""
    _, state, step = begun(config)
    return step(state, random_batch(0))


@functools.cache
def stepped(**changes):
    model = MIXTURE.model.replace(**{k: changes.pop(k) for k in ("remat", "stack") if k in changes})
    return one_step(MIXTURE.replace(model=model, **changes))


def test_the_bias_moves_once_a_step_however_many_micro_batches():
    """Bug classes: updated per micro-batch; counts of the last micro-batch only."""
    whole, parts = stepped()[0], stepped(accumulation=4)[0]
    np.testing.assert_allclose(bias_of(whole), bias_of(parts), atol=1e-7)
    # one rms move of every layer
    np.testing.assert_allclose(np.sqrt(np.mean(bias_of(whole) ** 2, axis=-1)), 0.01, rtol=1e-5)


def test_the_bias_does_not_notice_remat():
    """Bug class: counts doubled because the forward pass runs twice. rms would hide it, the metrics
    do not."""
    (plain, metrics), (full, again) = stepped(), stepped(remat="full")
    np.testing.assert_array_equal(bias_of(plain), bias_of(full))
    counted = metrics["largest_load"]
    np.testing.assert_array_equal(counted, again["largest_load"])


def test_every_layer_has_a_bias_that_moves():
    """Bug class: layers skipped."""
    bias = bias_of(stepped()[0])
    assert bias.shape == (2, 8) and (np.abs(bias).max(axis=-1) > 0).all()
    assert not np.array_equal(bias[0], bias[1])
    np.testing.assert_array_equal(bias, bias_of(stepped(stack="unroll")[0]))


def test_the_bias_is_no_parameter():
    """Bug class: a bias that the optimiser trains or decays."""
    state = stepped()[0]
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert "bias" not in names and bias_of(state).dtype == np.float32
    moments = jax.tree_util.tree_leaves_with_path(state.optimizer)
    assert moments and not any("bias" in jax.tree_util.keystr(path) for path, _ in moments)


@pytest.mark.parametrize("mesh", [(2, 2, 2), pytest.param((2, 4, 1), marks=pytest.mark.slow)])
def test_meshes_train_as_one_device(mesh):
    """Bug class: counts of one device instead of all. expert=4, data=2 exchanges tokens; (2, 2, 2)
    splits the expert width too."""
    config = MIXTURE.replace(
        model=MIXTURE.model.replace(feed_forward=EXPERTS.replace(kernel="auto"))
    )
    _, one, one_metrics = trained(config)
    sizes = dict(zip(MESH_AXES, mesh))
    _, eight, eight_metrics = trained(config.replace(mesh=MeshConfig(**sizes)), devices=8)
    for a, b in zip(one_metrics, eight_metrics):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["largest_load"], b["largest_load"], rtol=1e-6)
    np.testing.assert_allclose(bias_of(one), bias_of(eight), atol=1e-6)
    chex.assert_trees_all_close(jax.device_get(one.params), jax.device_get(eight.params), atol=5e-4)


def test_evaluation_and_a_non_finite_step_leave_the_bias_and_a_checkpoint_keeps_it(tmp_path):
    trainer, state, _ = trained(MIXTURE)
    step, before = begun(MIXTURE)[2], bias_of(state)
    sums = trainer.evaluation_step(state, random_batch(3))
    assert np.isfinite(sums.loss) and np.array_equal(before, bias_of(state))
    broken = state._replace(
        params={**state.params, "embedding": state.params["embedding"] * np.nan}
    )
    after, metrics = step(broken, random_batch(3))
    assert metrics["nonfinite"] == 1 and np.array_equal(before, bias_of(after))
    store = checkpoint.Checkpoints(tmp_path / "checkpoints", 2)
    store.save(3, state)
    store.close()
    restored = checkpoint.Checkpoints(tmp_path / "checkpoints", 2).restore(3, trainer.abstract)
    np.testing.assert_array_equal(bias_of(restored), before)
    assert np.abs(before).max() > 0


@pytest.mark.parametrize("balancing", ["auxiliary", pytest.param("none", marks=pytest.mark.slow)])
def test_models_without_a_bias_train(balancing):
    feed_forward = EXPERTS.replace(balancing=balancing, balancing_rate=None)
    state, metrics = one_step(
        MIXTURE.replace(model=MIXTURE.model.replace(feed_forward=feed_forward))
    )
    assert (
        not jax.tree.leaves(state.balance)
        and np.isfinite(metrics["loss"])
        and "bias_range" not in metrics
    )


ROUTED_HEADS = MIXTURE.model.attention.replace(output=MixtureOfHeads(shared_heads=1, top_k=2))
TALKING = MIXTURE.model.attention.replace(logits=TalkingHeads())
SEGMENTED = MIXTURE.model.replace(
    layers=4,
    attention=ROUTED_HEADS,
    later=AttentionFrom(layer=2, attention=TALKING),
    feed_forward=EXPERTS.replace(shared_experts=1, dense_layers=1, dense_width=48),
)


def test_layers_that_differ_are_segments_of_their_own_and_none_loses_what_it_reports():
    """One dense layer, then experts; heads are routed in the first two layers and talk in the
    others. Metrics and counts of a kind come from every layer that has them."""
    ids = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(SEGMENTED.build().init, jax.random.key(0), ids)
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert total == account(SEGMENTED, 64).parameters
    params = nn.unbox(shapes["params"])
    assert params["dense_layers"]["feed_forward"]["up"].shape == (1, 32, 48)
    assert params["layers"]["feed_forward"]["up"].shape == (1, 8, 32, 16)
    assert params["layers_2"]["feed_forward"]["up"].shape == (2, 8, 32, 16)
    assert "output_mixer" in params["layers"]["attention"]
    assert params["layers_2"]["attention"]["logits_mixer"]["kernel"].shape == (2, 4, 4)
    run = MIXTURE.replace(model=SEGMENTED)
    trainer = make_trainer(run, make_mesh(run.mesh, jax.devices()[:1]))
    state, metrics = jax.eval_shape(trainer.train_step, trainer.abstract, random_batch(0))
    assert metrics["max_violation"].shape == (3,) and metrics["head_max_violation"].shape == (2,)
    assert [bias.shape for bias in jax.tree.leaves(state.balance)] == [(1, 8), (2, 8)]
    one, two = (Aux(jnp.ones(n), {"e": jnp.ones(n)}, {"m": jnp.full(n, n)}) for n in (1, 2))
    joined = in_order({"layers": one, "layers_2": two})
    assert joined.loss == 3 and joined.metrics["m"].tolist() == [1, 2, 2]
    assert set(joined.counts) == {"layers", "layers_2"}


def test_two_sources_of_one_metric_are_refused():
    one = Aux(jnp.ones(()), {"bias": jnp.ones(3)}, {"load": jnp.ones(())})
    joined = no_aux().joined(attention=one, feed_forward=one._replace(metrics={}))
    assert joined.loss == 2 and set(joined.counts) == {"attention", "feed_forward"}
    with pytest.raises(ValueError, match="feed_forward: the metric 'load' is there already"):
        no_aux().joined(attention=one, feed_forward=one)


TPU_LAYER = """
import jax, jax.numpy as jnp, flax.linen as nn
from jax.experimental import topologies
from kha_jax.feed_forward import MoE
from kha_jax.modules import Numerics
device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
config = MoE(experts=128, top_k=8, width=384, kernel="ragged")
layer = config.build(model_width=2048, numerics=Numerics())
x = jax.ShapeDtypeStruct((1, 8192, 2048), jnp.bfloat16)
where = jax.sharding.SingleDeviceSharding(device)
place = lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=where)
variables = jax.tree.map(place, nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x)))
apply = lambda params, x: layer.apply({"params": params, "balance": {"bias": jnp.zeros(128)}}, x)[0]
value = lambda params, x: jnp.sum(apply(params, x).astype(jnp.float32))
step = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
compiled = step.lower(variables["params"], place(x)).compile()
print(compiled.cost_analysis()["flops"] / (3 * config.flops(2048) * 8192))
"""


@pytest.mark.slow
def test_the_layer_of_the_main_model_costs_its_active_parameters_on_a_tpu():
    """The 6.1B shape, compiled ahead of time for v5p: forward and backward, by XLA's count."""
    pytest.importorskip("libtpu", reason="needs the extra: pip install -e '.[plan]'")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", TPU_LAYER],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= float(done.stdout.split()[-1]) < 1.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 17}, "top_k: must be at most experts=16, found 17"),
        ({"experts": 0}, "experts: must be at least 1"),
        ({"balancing": "none", "balancing_rate": 0.1}, "balancing_rate: does nothing"),
        ({"dense_layers": 1}, "dense_width: is needed"),
        ({"dense_width": 64}, "dense_width: is needed for dense_layers=0"),
        ({"balancing": "signn"}, "did you mean 'sign'"),
        ({"routed_scaling": 0.0}, "routed_scaling: must be positive"),
        ({"groups": 3}, "groups: must divide experts=16 into groups of two or more, found 3"),
        ({"groups": 16}, "groups: must divide experts=16 into groups of two or more, found 16"),
        ({"groups_used": 2}, "groups_used: must be at most groups=1, found 2"),
        ({"groups": 8}, "groups_used: must hold top_k=4 experts, found 1 of 2"),
    ],
)
def test_mixtures_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MoE(**settings)


def test_more_dense_layers_than_layers_are_refused_by_name():
    with pytest.raises(
        ConfigError, match="feed_forward.dense_layers: must be below layers=2, found 2"
    ):
        MIXTURE.model.replace(feed_forward=MoE(dense_layers=2, dense_width=8))


def test_shared_feed_forward_counts_as_active():
    plain, shared = (
        MoE(experts=8, top_k=2, width=F),
        MoE(experts=8, top_k=2, width=F, shared_experts=2),
    )
    assert shared.active_parameters(D) - plain.active_parameters(D) == SwiGLU(
        width=2 * F
    ).parameters(D)
