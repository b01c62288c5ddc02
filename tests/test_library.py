"""What anybody's program imports: the layer in other meshes and other frameworks, what it says of
wrong arguments, and the examples of docs/library.md."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kha_jax.nnx
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import STREAM_MIXERS
from kha_jax.attention.outputs import MixtureOfHeads
from kha_jax.attention.projections import GroupedQuery, Latent
from kha_jax.config import ConfigError
from kha_jax.layer import Attention, knock
from kha_jax.sharding import axis_size, own_rules

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
    mixer = STREAM_MIXERS[kind]().build(4, 8, Attention(32).numerics.replace(dtype="float32"), None)
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
