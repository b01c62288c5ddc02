"""What inspection says of matrices whose numbers are known, and what it reads to say it."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from kha_jax import accounting, analysis
from kha_jax.analysis import curves, figures, measures, reading, style
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import UnsharedLinear
from kha_jax.config import from_dict, to_dict
from kha_jax.errors import CheckpointError, RunError
from kha_jax.mesh import make_mesh
from kha_jax.model import ModelConfig
from kha_jax.ops import matrices
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.training import trace
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import config_hash
from kha_jax.training.step import TrainState, make_trainer

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)
n = 24
IDENTITY, ONES = np.eye(n), np.ones((n, n))
CYCLE = np.roll(IDENTITY, 1, axis=1)  # a permutation without fixed points
LOW_RANK = RNG.normal(size=(n, 3)) @ RNG.normal(size=(3, n))
ROTATION = np.linalg.qr(RNG.normal(size=(n, n)))[0]
THREE_BLOCKS = np.kron(np.eye(3), np.ones((n // 3, n // 3)))


# ---------------------------------------------------------------- measures of one matrix


@pytest.mark.parametrize(
    "T, diagonal, off, distance",
    [
        (IDENTITY, 1, 0, 0),
        (0 * ONES, 0, 0, 1),
        (CYCLE, 0, 1, np.sqrt(2)),
        (ONES, 1, 1 - 1 / n, np.sqrt(n - 1)),
        (3 * IDENTITY, 3, 0, 2),
        (THREE_BLOCKS, 1, 1 - 3 / n, np.sqrt(n / 3 - 1)),
    ],
    ids=["identity", "zero", "permutation", "ones", "scaled", "blocks"],
)
def test_known_matrices(T, diagonal, off, distance):
    T = T.astype(np.float32)
    np.testing.assert_allclose(measures.diagonal_mean(T), diagonal, atol=1e-6)
    np.testing.assert_allclose(measures.off_diagonal_share(T), off, atol=1e-6)
    np.testing.assert_allclose(measures.distance(T, np.eye(n)), distance, rtol=1e-6, atol=1e-6)


def test_spectra():
    np.testing.assert_allclose(measures.spectrum(CYCLE), np.ones(n))
    np.testing.assert_allclose(measures.spectrum(LOW_RANK)[3:], 0, atol=1e-12)
    assert measures.spectrum(LOW_RANK)[2] > 0.1
    stacked = measures.spectrum(np.stack([IDENTITY, ONES]))
    np.testing.assert_allclose(stacked[:, 0], [1, n])


def test_the_spectral_norm_of_the_trace_comes_from_below_and_close():
    T = np.stack([IDENTITY, CYCLE, ONES, LOW_RANK, IDENTITY + 0.1 * RNG.normal(size=(n, n))])
    exact = np.linalg.norm(T, 2, (-2, -1))
    found = np.asarray(matrices.spectral_norm(jnp.asarray(T, jnp.float32)))
    np.testing.assert_allclose(found[:4], exact[:4], rtol=1e-4)
    assert np.all(found <= exact * (1 + 1e-5)) and found[4] > 0.97 * exact[4]
    assert matrices.spectral_norm(jnp.zeros((2, 5))) == 0


def test_blocks_are_found_in_any_order():
    shuffle = RNG.permutation(n)
    found = measures.blocks((THREE_BLOCKS + 5 * IDENTITY)[shuffle][:, shuffle])
    np.testing.assert_allclose(found.modularity, 1 - 1 / 3)
    assert found.shuffled < 0.2
    owner = np.repeat(np.arange(3), n // 3)[shuffle]
    assert len({(a, b) for a, b in zip(owner, found.labels)}) == 3  # the same partition
    assert np.all(np.diff(found.labels[found.order]) >= 0)
    assert measures.blocks(IDENTITY).modularity == 0


# ---------------------------------------------------------------- heads

R, N, H = 4000, 3, 8
Z = RNG.normal(size=(R, N, H))
FREE = measures.moments(Z)


def test_moments_and_mixing_are_those_of_the_streams():
    T = RNG.normal(size=(H, H))
    np.testing.assert_allclose(measures.mixed(FREE, T), measures.moments(Z @ T), atol=1e-9)
    W, scale = RNG.normal(size=(50, N, H)), RNG.uniform(1, 2, 50)
    white = RNG.normal(size=(40_000, 50)) * scale
    streams = np.einsum("rd,dnh->rnh", white, W)
    expected = measures.moments_of_weights(W, scale)
    np.testing.assert_allclose(measures.moments(streams), expected, atol=0.05 * expected.max())


def test_similarity_knows_copies_and_strangers():
    turned = np.linalg.qr(RNG.normal(size=(H, H)))[0]
    copies = Z.copy()
    copies[:, 1] = 7 * Z[:, 0] @ turned
    alike = measures.similarity(measures.moments(copies))
    np.testing.assert_allclose(np.diagonal(alike), 1)
    np.testing.assert_allclose(alike[0, 1], 1, atol=0.01)
    assert alike[0, 2] < 0.01
    np.testing.assert_allclose(alike, alike.T)


def test_heads_are_predicted_by_what_makes_them():
    sums = Z.copy()
    noise = RNG.normal(size=(R, H))
    sums[:, 2] = Z[:, 0] + Z[:, 1] + noise  # a third each
    C = measures.moments(sums)
    np.testing.assert_allclose(measures.predicted_by_peers(C)[2], 2 / 3, atol=0.02)
    np.testing.assert_allclose(measures.predicted_by_one(C)[2], [1 / 3, 1 / 3, 1], atol=0.02)
    np.testing.assert_allclose(measures.predicted_by_one(C)[0, 1], 0, atol=0.02)
    sums[:, 2] -= noise
    assert measures.predicted_by_peers(measures.moments(sums))[2] > 0.999
    crowded = measures.moments_of_weights(RNG.normal(size=(2 * H, N, H)))
    np.testing.assert_allclose(measures.predicted_by_peers(crowded), 1, atol=1e-4)


def test_principal_angles():
    basis, angle = np.eye(H)[:, :2], np.radians(30)
    turned = basis.copy()
    turned[:, 1] = np.cos(angle) * np.eye(H)[1] + np.sin(angle) * np.eye(H)[5]
    np.testing.assert_allclose(measures.principal_angles(basis, turned), [0, 30], atol=1e-5)
    np.testing.assert_allclose(measures.principal_angles(basis, np.eye(H)[:, 4:6]), [90, 90])
    stretched = Z * np.linspace(3, 1, H)  # every head varies most along the first features
    bases = measures.subspaces(measures.moments(stretched), 2)
    assert measures.principal_angles(bases[0], basis).max() < 15
    assert measures.between_heads(bases) < 15
    assert np.isnan(measures.between_heads(bases[:1]))


def test_gates():
    scales = np.array([-2.0, 0, 2])
    W = np.outer(np.eye(H)[3], [1, -1, 0, 0])
    (direction,) = measures.steepest(W)
    assert abs(direction[3]) == pytest.approx(1)
    found = measures.gate_response(W, np.eye(H)[3], scales)
    np.testing.assert_allclose(found[1], 1)
    np.testing.assert_allclose(found[2], [2 / (1 + np.exp(-2)), 2 / (1 + np.exp(2)), 1, 1])
    np.testing.assert_allclose(found[0] + found[2], 2)
    np.testing.assert_allclose(measures.gate_response(0 * W, direction, scales), 1)


# ---------------------------------------------------------------- runs


def test_smoothing_leaves_out_what_is_not_finite():
    losses = 3 * np.exp(-np.arange(400) / 100) + 1 + 0.05 * RNG.normal(size=400)
    losses[301] = np.nan
    smooth = curves.smoothed(losses, 11)
    assert np.isfinite(smooth).all() and abs(smooth[200] - losses[195:206].mean()) < 1e-9


def tiny():
    model = {
        "layers": 3,
        "width": 32,
        "attention": {
            "projection": {"kind": "grouped_query", "query_heads": 4, "kv_heads": 2, "head_dim": 8},
            "value": {"kind": "mlp"},
            "query": {"kind": "linear", "parameterization": "residual", "diag_init": 0.5},
        },
        "feed_forward": {
            "kind": "moe",
            "experts": 4,
            "top_k": 2,
            "width": 16,
            "dense_layers": 1,
            "dense_width": 32,
        },
        "numerics": {"dtype": "float32"},
    }
    return from_dict(RunConfig, {"steps": 40, "batch_size": 4, "seq_len": 64, "model": model})


@pytest.fixture(scope="module")
def trainer():
    config = tiny()
    return config, make_trainer(config, make_mesh(config.mesh, jax.devices()[:1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory, trainer):
    """A run folder with two checkpoints of random parameters, and what it was written from."""
    config, made = trainer
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    about = {"config": config_hash(config)}
    checkpoints = Checkpoints(workdir / "checkpoints", 2, lambda step: about)
    draw = np.random.default_rng(1).normal

    def fill(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return np.zeros(leaf.shape, leaf.dtype)
        return np.asarray(draw(size=leaf.shape), leaf.dtype)

    state = TrainState(*(jax.tree.map(fill, part) for part in made.abstract))
    for step in (20, 40):
        state = state._replace(step=np.int32(step))
        checkpoints.save(step, jax.tree.map(jnp.asarray, state))
    checkpoints.close()
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    rows = []
    for step in range(1, 41):
        rows.append({"step": step, "loss": 5 - step / 20, "grad_norm": 1.0})
        if step % 10 == 0:
            logged = trace.trace(config.model, state.params)
            rows[-1] |= {name: np.asarray(value).tolist() for name, value in logged.items()}
    rows.append({"step": 40, "val_loss": 3.0, "val_bits_per_byte": 4.3})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(lines + '{"step": 41, "lo')  # still being written
    return analysis.Run(workdir), state


def test_matrices_are_found_by_their_place(run):
    run, state = run
    stacks = run.matrices()
    assert run.step == 40 and run.steps == [20, 40]
    assert list(stacks) == ["query/residual", "value/up", "value/gate", "value/down"]
    for place, stack in stacks.items():
        slot, name = place.split("/")
        stored = np.concatenate(
            [
                state.params[segment]["attention"][f"{slot}_mixer"][name]
                for segment in ("dense_layers", "layers")
            ]
        )
        expected = stored + 0.5 * np.eye(8) if name == "residual" else stored
        np.testing.assert_allclose(stack.T, expected, rtol=1e-6)
        assert (stack.layers, stack.axis) == ((0, 1, 2), "feature")
        assert stack.start.any() == (name != "gate")
        assert stack.rotary == ((0, 8) if slot == "query" else (0, 0))
    transforms = run.transforms()
    np.testing.assert_allclose(
        transforms["value"].T, stacks["value/up"].T @ stacks["value/down"].T, rtol=1e-6
    )
    weights = run.stream_weights("value")
    assert len(weights) == 3 and weights[0][0].shape == (32, 2, 8)
    np.testing.assert_array_equal(
        weights[2][0], state.params["layers"]["attention"]["projection"]["value"][1]
    )
    assert run.stream_weights("query", widest=31) == []


def test_matrices_between_heads_and_of_unequal_layers(tmp_path):
    """Segments whose shapes differ, a composition of heads, a score mixer, in a bare checkpoint: by
    their paths alone."""
    attention = {"output": np.zeros((2, 4, 8, 16), np.float32)}
    composed = {**attention, "key_mixer": {"kernel": np.ones((2, 2, 4), np.float32)}}
    talking = {
        "output": np.zeros((1, 4, 8, 16), np.float32),
        "key_mixer": {"kernel": np.ones((1, 8, 8), np.float32)},
        "logits_mixer": {"kernel": np.ones((1, 4, 4), np.float32)},
        "value_mixer": {"kernel": np.ones((1, 2, 8, 8), np.float32)},  # one for each head
        "output_mixer": {"gate": np.ones((1, 16, 4), np.float32)},  # reads the block's input
    }
    params = {"layers_2": {"attention": composed}, "layers_10": {"attention": talking}}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"params": jax.tree.map(jnp.asarray, params)})
    checkpoints.close()
    stacks = analysis.Run(tmp_path / "checkpoints" / "00000001").matrices()
    repeated = np.kron(np.eye(2), np.ones((1, 2)))
    np.testing.assert_array_equal(stacks["layers_2/key/kernel"].start, [repeated, repeated])
    assert {name: (s.T.shape, s.layers, s.axis) for name, s in stacks.items()} == {
        "layers_2/key/kernel": ((2, 2, 4), (0, 1), "head"),
        "layers_10/key/kernel": ((1, 8, 8), (2,), "feature"),
        "value/kernel/0": ((1, 8, 8), (2,), "feature"),
        "value/kernel/1": ((1, 8, 8), (2,), "feature"),
        "logits/kernel": ((1, 4, 4), (2,), "head"),
    }


def test_a_few_matrices_are_read_without_the_rest(tmp_path):
    """Counted by the storage library: 16 KB of matrices in 8 MB of other leaves."""
    draw = np.random.default_rng(0).normal
    T = np.asarray(draw(size=(4, 32, 32)), np.float32)
    big = np.asarray(draw(size=(2, 1000, 1000)), np.float32)
    attention = {"value_mixer": {"kernel": T}, "output": np.zeros((4, 2, 32, 8), np.float32)}
    state = {"params": {"layers": {"attention": attention}, "embedding": big}}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, jax.tree.map(jnp.asarray, state))
    checkpoints.close()

    def bytes_read():
        name = "/tensorstore/kvstore/file/bytes_read"
        (found,) = tensorstore.experimental_collect_matching_metrics(name)
        return found["values"][0]["value"]

    before = bytes_read()
    stacks = analysis.Run(tmp_path).matrices()
    read = bytes_read() - before
    np.testing.assert_array_equal(stacks["value/kernel"].T, T)
    assert 0.8 * T.nbytes < read < 4 * T.nbytes
    before = bytes_read()
    analysis.Run(tmp_path).checkpoint.read(["params/embedding"])
    assert bytes_read() - before > 0.8 * big.nbytes  # the count does see what is read


def test_the_trace_is_that_of_the_matrices(run):
    run, _ = run
    logged, stacks = analysis.trace(run.metrics()), run.matrices()
    assert list(logged) == list(stacks)
    for place, stack in stacks.items():
        T = stack.T
        steps, values = logged[place]["diagonal_mean"]
        assert steps.tolist() == [10, 20, 30, 40] and values.shape == (4, 3)
        np.testing.assert_allclose(values[-1], measures.diagonal_mean(T), rtol=1e-5, atol=1e-6)
        far = logged[place]["identity_distance"][1][-1]
        np.testing.assert_allclose(far, measures.distance(T, np.eye(8)), rtol=1e-5, atol=1e-6)
        share = logged[place]["off_diagonal_share"][1][-1]
        np.testing.assert_allclose(share, measures.off_diagonal_share(T), rtol=1e-5)
        norm = logged[place]["spectral_norm"][1][-1] / measures.spectrum(T)[:, 0]
        assert np.all(norm > 0.9) and np.all(norm < 1 + 1e-4)


def test_a_trace_has_the_steps_that_all_segments_have():
    """What is not finite is left out, segment by segment."""
    name = "knocking/{}/value/kernel/spectral_norm"
    rows = [
        {"step": step, name.format("layers"): [1.0 * step], name.format("layers_2"): [2.0 * step]}
        for step in (10, 20, 30)
    ]
    del rows[1][name.format("layers_2")]
    steps, values = analysis.trace(rows)["value/kernel"]["spectral_norm"]
    np.testing.assert_array_equal(steps, [10, 30])
    np.testing.assert_array_equal(values, [[10, 20], [30, 60]])


def test_a_step_logs_the_trace_of_what_it_made(trainer):
    _, made = trainer
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids)
    batch["weights"] = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    metrics = jax.eval_shape(made.train_step, made.abstract, batch)[1]
    named = {name: z.shape for name, z in metrics.items() if name.startswith(trace.TRACE)}
    assert len(named) == 4 * 2 * 4  # measures, segments, matrices
    assert named["knocking/dense_layers/query/residual/diagonal_mean"] == (1,)
    assert named["knocking/layers/value/gate/spectral_norm"] == (2,)


def test_matrices_of_single_heads_are_traced_by_their_mean():
    T = jnp.asarray(RNG.normal(size=(2, 3, 4, 4)), jnp.float32)
    params = {"layers": {"attention": {"value_mixer": {"kernel": T}}}}
    model = ModelConfig(layers=2, attention=AttentionConfig(value=UnsharedLinear()))
    logged = trace.trace(model, params)
    found = logged["knocking/layers/value/kernel/diagonal_mean"]
    np.testing.assert_allclose(found, np.trace(T, axis1=2, axis2=3).mean(1) / 4, rtol=1e-5)


@pytest.mark.parametrize("name", ["kha_moe_6b", "dense_600m", "kha_tiny"])
def test_the_trace_costs_less_than_half_a_percent_of_a_step(name):
    """XLA's count of the trace, which every device computes, against the accounting's count of the
    training FLOPs on 64 devices (kha_tiny: one)."""
    import importlib

    config = from_dict(RunConfig, importlib.import_module(f"configs.{name}").get_config("linear"))
    H, layers = config.model.attention.projection.head_dim, config.model.layers

    def layer(segment):
        T = jax.ShapeDtypeStruct((segment.layers, H, H), jnp.float32)
        slots = ("query", "key", "value")
        return {"attention": {f"{slot}_mixer": {"kernel": T} for slot in slots}}

    params = {segment.name: layer(segment) for segment in config.model.segments()}
    traced = functools.partial(trace.trace, config.model)
    compiled = jax.jit(traced).lower(params).compile()
    tokens = config.batch_size * config.seq_len
    cost = accounting.account(config.model, config.seq_len, tokens=tokens)
    step = cost.training_flops * tokens / (1 if name == "kha_tiny" else 64)
    assert 3 * layers * 2 * H**3 < compiled.cost_analysis()["flops"] < 0.005 * step


def test_variants_are_rows_of_what_runs_cost(run):
    run, _ = run
    (row,) = analysis.variants([run])
    assert (row.name, row.tokens, row.loss, row.bits_per_byte) == ("tiny", 40 * 4 * 64, 3.0, 4.3)
    assert row.cost.mixing == 3 * 4 * 8 * 8 < row.cost.parameters


def test_what_is_not_there_is_said_in_one_line(run, tmp_path):
    run, _ = run
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        analysis.Run(tmp_path)
    with pytest.raises(RunError, match=r"step 30 is not kept; it has \[20, 40\]"):
        analysis.Run(run.folder, 30)
    bare = run.folder / "checkpoints" / "00000040"
    with pytest.raises(RunError, match="is a bare checkpoint of one step; leave out --step"):
        analysis.Run(bare, 40)
    with pytest.raises(CheckpointError, match="has no leaf params/nothing"):
        run.checkpoint.read(["params/nothing"])
    with pytest.raises(CheckpointError, match="metrics.jsonl: No such file"):
        analysis.read_metrics(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="does not hold a state"):
        analysis.Run(tmp_path)


@pytest.mark.slow
def test_streams_are_those_that_the_model_makes(run):
    """The recorded streams are the mixer's input and output: mixing the one gives the other."""
    run, _ = run
    streams, stacks = analysis.streams(run, rows=2), run.matrices()
    assert set(streams) == {"query", "key", "value"}
    before, after = streams["query"]
    assert before.shape == (3, 128, 4, 8)
    for layer, T in enumerate(stacks["query/residual"].T):
        np.testing.assert_allclose(after[layer], before[layer] @ T, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(streams["key"].before, streams["key"].after)
    up, gate, down = (stacks[f"value/{name}"].T[0] for name in ("up", "gate", "down"))
    v = streams["value"].before[0].astype(np.float64)
    expected = 2 * ((v @ up) / (1 + np.exp(-(v @ gate)))) @ down
    np.testing.assert_allclose(streams["value"].after[0], expected, rtol=1e-3, atol=1e-2)


# ---------------------------------------------------------------- figures


@pytest.fixture
def pyplot():
    """matplotlib in the project's style; figures are closed at the end."""
    pytest.importorskip("matplotlib")
    with style.using() as plots:
        yield plots
        plots.close("all")


def test_places_are_written_as_in_a_paper():
    written = {
        "query/kernel": "$T_{q}$",
        "key/residual": "$T_{k}$",
        "value/up": r"$W_{v}^{\mathrm{up}}$",
        "value/kernel/10": "$T_{v}$, head 10",
        "layers_2/logits/kernel": r"layers_2: $T_{\mathrm{logits}}$",
    }
    assert {place: figures.symbol(place) for place in written} == written


def test_heat_maps_name_features_and_mark_the_rotary_halves(pyplot):
    T = np.stack([np.eye(16), np.ones((16, 16))]).astype(np.float32)
    query = reading.Stack(T, (0, 1), T[0], "feature", rotary=(8, 16))
    value = query._replace(rotary=(0, 0))
    figure = figures.heat_maps({"query/kernel": query, "value/kernel": value})
    first, _, last, *_ = figure.axes
    assert first.get_ylabel() == "$T_{q}$\n16 x 16 features"
    assert [int(tick) for tick in first.get_xticks()] == [0, 4, 8, 12]
    upright = {line.get_xdata()[0] for line in first.lines} - {0}  # horizontal ones begin at 0
    assert upright == {7.5, 11.5} and not last.lines
    assert [text.get_text() for text in figure.legends[0].texts] == [figures.HALVES]


def test_runs_are_compared_with_the_first_at_the_steps_that_both_have(pyplot):
    def rows(extra, steps):
        losses = [{"step": step, "loss": 3 + extra} for step in range(40)]
        return losses + [{"step": step, "val_loss": 2 + extra / step} for step in steps]

    runs = {"first": rows(0, (10, 20)), "other": rows(0.5, (10, 15, 20))}
    *_, loss, validation = curves.training(runs).axes
    assert loss.get_title() == validation.get_title() == "the same less that of first"
    np.testing.assert_allclose(loss.lines[1].get_ydata(), 0.5)
    np.testing.assert_array_equal(validation.lines[1].get_xdata(), (10, 20))
    np.testing.assert_allclose(validation.lines[1].get_ydata(), (0.05, 0.025))
    assert validation.get_legend().texts[0].get_text() == "other: +0.025"
    assert len(curves.training({"alone": runs["first"]}).axes) == 2


def test_gates_have_a_legend(pyplot):
    W = RNG.normal(size=(2, 8, 8)).astype(np.float32)
    figure = figures.gates({"value/gate": reading.Stack(W, (0, 1), 0 * W[0], "feature")})
    assert figure.axes[1].get_title() == r"$W_{v}^{\mathrm{gate}}$, layer 1"
    said = [text.get_text() for text in figure.legends[0].texts]
    assert said == ["all features", "the middle half of them", "does nothing"]


def test_a_figure_is_saved_for_papers_and_for_pages(pyplot, tmp_path):
    def draw():
        figure, axes = pyplot.subplots(figsize=(2, 1))
        axes.set_title("$T_q$")
        return figure

    svg = style.save(draw, tmp_path / "one")
    ends = ("_dark.png", *style.SUFFIXES)
    assert {path.name for path in tmp_path.iterdir()} == {f"one{end}" for end in ends}
    assert pyplot.imread(tmp_path / "one.png").shape[:2] == (300, 600)
    pdf = (tmp_path / "one.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf
    assert style.THEMES["light"][0] not in svg and "currentColor" in svg


# ---------------------------------------------------------------- the command


def command(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.analyze", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def external(text):
    """Addresses that a browser would load."""
    loads = r"""(?:src|href)\s*=\s*["'](?!#|data:)([^"']*)|url\((?!["']?#|["']?data:)([^)]*)"""
    return [a or b for a, b in re.findall(loads, text)] + re.findall(
        r"<(?:link|script)|@import", text
    )


@pytest.mark.slow
def test_the_command_writes_one_page_that_loads_nothing(run, tmp_path):
    pytest.importorskip("matplotlib")
    run, _ = run
    code, out, err = command(f"--workdir={run.folder}", f"--out={tmp_path}", "--clip")
    assert code == 0, err
    assert "value/gate" in out
    page = (tmp_path / "index.html").read_text()
    assert external(page) == [] and page.count("<svg") == page.count("<figure>") == 12
    names = "training stability depth heat_maps clipped diagonals spectra blocks gates history"
    for name in (*names.split(), "subspaces", "similarity"):
        for end in ("_dark.png", *style.SUFFIXES):
            assert (tmp_path / f"{name}{end}").stat().st_size > 5000, name
    assert external((tmp_path / "depth.svg").read_text()) == []
    assert external("<img src='http://a/b.png'> url(x.css) <script>") != []
