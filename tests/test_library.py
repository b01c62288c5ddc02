"""What anybody's program imports: the layer in other meshes and other frameworks, what it says of
wrong arguments, and the examples of docs/library.md."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kha_jax.nnx
from experiments.cli.config_files import run_config_file
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import STREAM_MIXERS
from kha_jax.attention.outputs import MixtureOfHeads
from kha_jax.attention.projections import GroupedQuery, Latent
from kha_jax.config import ConfigError, from_dict, to_dict
from kha_jax.data import SOURCES
from kha_jax.errors import RunError
from kha_jax.layer import Attention, knock
from kha_jax.modules import Numerics
from kha_jax.sharding import axis_size, own_rules
from kha_jax.storage import write_json
from kha_jax.training.run_config import RunConfig
from kha_jax.training.run_folder import read_config, write_registrations
from tests.examples import blocks

ROOT = Path(__file__).parent.parent

SIZES = {"width": 32, "query_heads": 8, "kv_heads": 4, "head_dim": 4}
X = jax.random.normal(jax.random.key(1), (4, 8, 32))
OURS = {"batch": "fsdp", "heads": "tp", "kv_heads": "tp", "query_length": "tp"}


def mesh_of(kind: AxisType, *names: str) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), names, axis_types=(kind,) * 2)


@pytest.fixture(scope="module")
def knocking():
    layer = Attention(**SIZES, value="mlp")
    params = layer.init(jax.random.key(0), X)
    return layer, params, layer.apply(params, X)


@pytest.mark.parametrize("rules", [None, OURS], ids=["default", "own"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_the_layer_computes_the_same_on_any_mesh(knocking, kind, rules):
    """A mesh with axes of other names, set and not, as a linen and as an nnx module."""
    (layer, params, expected), mesh = knocking, mesh_of(kind, "fsdp", "tp")
    layer = layer.clone(rules=rules)
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("fsdp")))
    np.testing.assert_allclose(layer.apply(placed, x), expected, atol=1e-6)
    with jax.set_mesh(mesh):
        out = jax.jit(layer.apply)(placed, x)
        np.testing.assert_allclose(out, expected, atol=1e-6)
        assert out.sharding.spec[:1] == ("fsdp",) or rules is None
        wrapped = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(x)
        assert wrapped(x).shape == x.shape


def test_the_layer_runs_within_a_shard_map(knocking):
    """Of somebody's own over the axis that ours is split by too."""
    layer, params, expected = knocking
    rows = PartitionSpec("data")
    with jax.set_mesh(mesh_of(AxisType.Auto, "data", "model")):
        split = jax.shard_map(
            layer.apply,
            in_specs=(PartitionSpec(), rows),
            out_specs=rows,
            axis_names={"data"},
            check_vma=False,
        )
        np.testing.assert_allclose(jax.jit(split)(params, X), expected, atol=1e-6)


def test_own_rules_are_a_part_of_what_is_traced():
    """A function that jit or checkpoint traced under other rules is traced again."""
    counted = jax.jit(jax.checkpoint(lambda x: x * axis_size("heads")))
    with jax.set_mesh(mesh_of(AxisType.Auto, "fsdp", "tp")):
        assert counted(1.0) == 1
        for rule, size in {"tp": 4, "fsdp": 2, ("fsdp", "tp"): 8}.items():
            with own_rules({"heads": rule}, {}):
                assert counted(1.0) == size
        with own_rules({"heads": ("fsdp", "tp")}, {"heads": lambda n: 6 % n == 0}):
            assert counted(1.0) == 2  # six heads over the first axis alone
        assert counted(1.0) == 1


def test_the_parameters_are_those_of_a_models_layer(knocking):
    layer, params, expected = knocking
    numerics = layer.numerics.replace(dtype="float32")
    model = layer.attention.build(width=32, numerics=numerics)
    positions = jnp.broadcast_to(jnp.arange(8), (4, 8))
    own = nn.unbox(model.init(jax.random.key(0), X, positions))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(model.apply(params, X, positions)[0], expected, atol=1e-6)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_the_dtype_is_that_of_the_input(knocking):
    layer, params, expected = knocking
    with jax.default_matmul_precision("highest"):
        exact = layer.apply(params, X)
    assert exact.dtype == jnp.float32
    np.testing.assert_allclose(exact, expected, rtol=1e-4, atol=1e-6)
    low = layer.apply(params, X.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, atol=2e-3)


def test_documents_are_apart(knocking):
    layer, params, _ = knocking
    ids = jnp.repeat(jnp.arange(2), 4)[None].repeat(4, axis=0)
    halves = [layer.apply(params, half) for half in (X[:, :4], X[:, 4:])]
    whole = layer.apply(params, X, segment_ids=ids)
    np.testing.assert_allclose(whole, jnp.concatenate(halves, axis=1), atol=1e-6)


def test_what_mixture_of_heads_adds_to_the_loss():
    """Also scanned and recomputed in somebody's own block, and in nnx."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + Attention(**SIZES, output=MixtureOfHeads(), name="attention")(x), None

    stack = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0, "losses": 0},
        split_rngs={"params": True},
        length=3,
    )()
    variables = stack.init(jax.random.key(0), X, None)
    assert set(variables) == {"params"}
    _, told = stack.apply(variables, X, None, mutable=["losses"])
    (losses_L,) = jax.tree.leaves(told)
    assert losses_L.shape == (3,) and jnp.all(losses_L > 0)
    layer = kha_jax.nnx.Attention(**SIZES, output="mixture", rngs=nnx.Rngs(0))
    layer(X, mutable=["losses"])
    (loss,) = jax.tree.leaves(layer.attention)
    assert loss > 0


def test_nnx_is_the_same_module(knocking):
    layer, params, expected = knocking
    module = kha_jax.nnx.Attention(**SIZES, value="mlp", rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    own = nnx.to_pure_dict(state)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params["params"])
    nnx.replace_by_pure_dict(state, params["params"])
    nnx.update(module, state)
    np.testing.assert_allclose(module(X), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp", "gate"])
def test_knock_is_the_mixer(kind):
    """On any leading axes; the linear kind on weights is the same as on what they make."""
    numerics = Numerics(dtype="float32")
    mixer = STREAM_MIXERS[kind]().build(heads=4, head_dim=8, numerics=numerics)
    z = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    params = nn.unbox(mixer.init(jax.random.key(1), z))["params"]
    np.testing.assert_allclose(knock(z, params, kind), z, atol=1e-6)  # the identity at the start
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), (8, 8)), params
    )
    np.testing.assert_allclose(knock(z, params, kind), mixer.apply({"params": params}, z))
    if kind == "linear":
        weights = jax.random.normal(jax.random.key(3), (5, 4, 8))
        x = jax.random.normal(jax.random.key(4), (2, 3, 5))
        made = [jnp.einsum("BTD,DNH->BTNH", x, w) for w in (weights, knock(weights, params))]
        np.testing.assert_allclose(knock(made[0], params), made[1], rtol=1e-4, atol=1e-5)


WRONG = {
    "x: expected float32 or bfloat16[?, ?, 32], found float32[8, 32]": lambda a, p: a.apply(
        p, X[0]
    ),
    "x: expected float32 or bfloat16[?, ?, 32], found int32": lambda a, p: a.apply(
        p, X.astype(int)
    ),
    "x: expected float32 or bfloat16[?, ?, 32], found a list": lambda a, p: a.apply(p, [1]),
    "positions: expected integer[4, 8], found int32[8]": lambda a, p: a.apply(p, X, jnp.arange(8)),
    "segment_ids: expected integer[4, 8], found float32[4, 8]": lambda a, p: a.apply(
        p, X, segment_ids=jnp.ones((4, 8))
    ),
    "params/value_mixer/down: expected (4, 4), found none": lambda a, p: a.apply(
        Attention(**SIZES).init(jax.random.key(0), X), X
    ),
    "params['kernel']: expected float32 or bfloat16[4, 4], found float32[3, 3]": lambda a, p: knock(
        jnp.ones((2, 8, 4)), {"kernel": jnp.eye(3)}
    ),
    "params: expected ['gate'] for kind='gate', found ['kernel']": lambda a, p: knock(
        X, {"kernel": X}, "gate"
    ),
    "x: expected [..., heads, H], found float32[4]": lambda a, p: knock(jnp.ones(4), {}),
    "kind: 'linaer' is not known; did you mean 'linear'?": lambda a, p: knock(X, {}, "linaer"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(knocking, message):
    layer, params, _ = knocking
    with pytest.raises(ValueError) as error:
        WRONG[message](layer, params)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"value": "mlpp"}, "value: 'mlpp' is not known; did you mean 'mlp'?"),
        ({"rules": {"head": "tp"}}, "rules['head']: is no logical axis"),
        ({"config": AttentionConfig()}, "config: stands in place of query_heads and kv_heads"),
        ({"query_heads": None}, "query_heads: is required, or a config"),
        ({"query_heads": 7, "kv_heads": None, "head_dim": None}, "query_heads=7 do not divide"),
    ],
)
def test_fields_that_contradict_are_named(fields, message):
    with pytest.raises(ConfigError) as error:
        Attention(**{**SIZES, **fields}).init(jax.random.key(0), X)
    assert message in str(error.value)


def test_any_attention_is_a_layer():
    config = AttentionConfig(projection=Latent(query_heads=4, head_dim=8))
    layer = Attention(32, config=config)
    assert layer.apply(layer.init(jax.random.key(0), X), X).shape == X.shape
    assert layer.attention == config and Attention(32, 8).attention == AttentionConfig(
        projection=GroupedQuery(query_heads=8, kv_heads=8, head_dim=4)
    )


def outside(folder, cache):
    """Runs the page in a folder that has a copy of the library and nothing else of here."""
    shutil.copytree(ROOT / "kha_jax", folder / "kha_jax", dirs_exist_ok=True)
    shutil.copy(ROOT / "tests" / "examples.py", folder)
    page, here = str(ROOT / "docs" / "library.md"), {"KHA_JAX_CACHE": str(cache)}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | here
    line = [sys.executable, "examples.py", page]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_examples_run_outside_of_the_repository(tmp_path, cache):
    said = outside(tmp_path, cache)
    assert "A trained run: left out" in said and "(2, 64, 256) float32" in said
    assert {"own.py", "own_config.py"} <= {path.name for path in tmp_path.iterdir()}


def test_the_examples_are_short():
    for before, code in blocks((ROOT / "docs" / "library.md").read_text()):
        assert len([line for line in code.splitlines() if line.strip()]) <= 25, before[-200:]


def test_importing_is_quick_and_loads_names_when_they_are_used():
    program = (
        "import sys, time; t = time.perf_counter(); import kha_jax; "
        "print(time.perf_counter() - t < 0.5, 'jax' in sys.modules, len(dir(kha_jax)) > 20); "
        "print(all(getattr(kha_jax, name).__doc__ for name in kha_jax.__all__))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "True", "True"]
    assert {"Attention", "AttentionConfig", "knock", "fold", "Decoder", "load"} <= set(
        kha_jax.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'Attenion'"):
        kha_jax.Attenion


@pytest.fixture
def own(tmp_path):
    """A folder with own.py and a config, whose kinds are known here until the test ends."""
    codes = [code for _, code in blocks((ROOT / "docs" / "library.md").read_text())]
    for name, code in zip(("own.py", "own_config.py"), codes[-3:-1]):
        (tmp_path / name).write_text(code)
    yield tmp_path
    STREAM_MIXERS.pop("symmetric", None), SOURCES.pop("sums", None), sys.modules.pop("own", None)


def test_a_run_folder_remembers_who_registered_a_kind(own):
    config = from_dict(RunConfig, run_config_file(str(own / "own_config.py")))
    write_registrations(own, config)
    write_json(own / "config.json", to_dict(config))
    written = to_dict(config)
    assert read_config(own) == config
    for table, kind in ((STREAM_MIXERS, "symmetric"), (SOURCES, "sums")):
        del table[kind]
    del sys.modules["own"]
    sys.path.remove(str(own))
    assert to_dict(read_config(own)) == written  # by its file
    del STREAM_MIXERS["symmetric"], sys.modules["own"]
    (own / "own.py").rename(own / "gone.py")
    message = "config.model.attention.value: 'symmetric' was registered by own .*own.py.*cannot be"
    with pytest.raises(RunError, match=message):
        read_config(own)
    (own / "own.py").write_text("")
    with pytest.raises(RunError, match="no longer registers it"):
        read_config(own)
    (own / "registered.json").write_text("[3]")
    with pytest.raises(RunError, match="registered.json: is damaged"):
        read_config(own)


def test_an_ordinary_run_registers_nothing(tmp_path):
    write_registrations(tmp_path, RunConfig())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_own_kinds_are_trained_generated_from_resumed_and_analysed(own, cache):
    run, config = own / "runs" / "own", own / "own_config.py"
    train = ("train", f"--config={config}", f"--workdir={run}", "--config.checkpoint.every=2")
    train = (*train, "--config.batch_size=8", "--config.seq_len=32", "--allow_changes=steps")

    def said(*line):
        program = [sys.executable, "-m", f"experiments.{line[0]}", *line[1:]]
        environment = {**os.environ, "KHA_JAX_CACHE": str(cache)}
        done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, text = said(*train, "--config.steps=2")
    assert code == 0, text
    code, text = said(*train, "--config.steps=4")
    assert code == 0 and "resuming after step 2" in text, text
    generate = ("generate", f"--workdir={run}", "--prompt=3+4=", "--tokens=4")
    code, text = said(*generate)
    assert code == 0 and text.startswith("3+4="), text
    _, text = said("analyze", f"--workdir={run}", f"--out={own / 'figures'}")
    assert "value/kernel" in text, text  # figures need an extra
    assert "3+4=" in outside(own, cache).partition("A trained run")[2]
    (own / "own.py").unlink()
    code, text = said(*generate)
    assert code == 2 and "'symmetric' was registered by own" in text and text.count("\n") == 1, text


def test_fold_names_what_does_not_fit(knocking):
    layer, params = Attention(**SIZES, value="linear"), knocking[1]["params"]
    with pytest.raises(ValueError, match="parameters/value_mixer/down: expected no such array"):
        kha_jax.fold(layer.attention, params)
    with pytest.raises(ValueError, match=r"parameters: expected 'output' among .*, found 'params'"):
        kha_jax.fold(layer.attention, {"params": params})
    with pytest.raises(TypeError, match=r"an AttentionConfig \(layer.attention\), found Attention"):
        kha_jax.fold(layer, params)
