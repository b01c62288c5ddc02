"""Placement: every parameter has a rule, a mesh axis is used once in an array, and sizes that do
not divide are refused by name."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import STREAM_MIXERS
from kha_jax.attention.projections import GroupedQuery
from kha_jax.config import ConfigError
from kha_jax.feed_forward import SwiGLU
from kha_jax.hardware.chips import SLICES
from kha_jax.mesh import MESH_AXES, PRESETS, MeshConfig, hybrid_devices, make_mesh
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics
from kha_jax.planning import topology
from kha_jax.sharding import (
    RULES,
    axis_size,
    batch_sharding,
    constrain,
    gather,
    index_along,
    local_rows,
    on_mesh,
    per_device,
    scatter_sum,
    spec,
    sum_over,
    tree_shardings,
)

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2)]


def mesh_of(data: int, expert: int, model: int) -> jax.sharding.Mesh:
    return make_mesh(
        MeshConfig(data=data, expert=expert, model=model), jax.devices()[: data * expert * model]
    )


def shape_of(*shape: int, axes: tuple[str | None, ...]) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)


def test_the_tests_have_eight_devices():
    assert jax.default_backend() == "cpu" and len(jax.devices()) == 8


def test_spec_follows_the_rules():
    assert spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(
        None, ("data", "expert"), "model", None
    )
    assert spec(("vocabulary", "embed")) == PartitionSpec("model", ("data", "expert"))
    assert spec(("batch", "length", None)) == PartitionSpec(("data", "expert"), None, None)
    assert spec(("experts", "expert_embed", "feed_forward")) == PartitionSpec(
        "expert", "data", "model"
    )
    assert spec(()) == PartitionSpec()


def test_rules_name_mesh_axes_only():
    for logical, part in RULES.items():
        assert (
            {part} - {None} <= set(MESH_AXES)
            if not isinstance(part, tuple)
            else set(part) <= set(MESH_AXES)
        ), logical


def test_spec_refuses_an_unknown_name():
    with pytest.raises(
        ValueError,
        match=r"^layers/query: logical axis 'haeds' has no rule; known are batch, .*heads",
    ):
        spec(("embed", "haeds"), "layers/query")


@pytest.mark.parametrize(
    "axes, named",
    [
        (("heads", "feed_forward"), r"'feed_forward' and 'heads' both map to mesh axis 'model'"),
        (("embed", "head_dim", "embed"), r"'embed' and 'embed' both map to mesh axis 'data'"),
        # One of the two mesh axes of the batch is enough.
        (("batch", "experts"), r"'experts' and 'batch' both map to mesh axis 'expert'"),
        (("embed", "batch"), r"'batch' and 'embed' both map to mesh axis 'data'"),
    ],
)
def test_spec_refuses_a_mesh_axis_used_twice(axes, named):
    with pytest.raises(ValueError, match=f"^router: {named}$"):
        spec(axes, "router")


@pytest.mark.parametrize(
    "sizes, devices, shape",
    [
        ({}, 8, (8, 1, 1)),
        ({"model": 2}, 8, (4, 1, 2)),
        ({"data": 2, "expert": 2, "model": 2}, 8, (2, 2, 2)),
        ({"data": 2, "expert": -1}, 8, (2, 4, 1)),
        ({"data": 1, "model": -1}, 1, (1, 1, 1)),
    ],
)
def test_mesh_shape(sizes, devices, shape):
    assert MeshConfig(**sizes).sizes(devices) == dict(zip(MESH_AXES, shape))


@pytest.mark.parametrize(
    "sizes, devices, found",
    [
        ({"data": 4}, 8, "data=4 x expert=1 x model=1 does not make 8 devices"),
        (
            {"data": 4, "expert": 2, "model": 2},
            8,
            "data=4 x expert=2 x model=2 does not make 8 devices",
        ),
        ({"model": 3}, 8, "data=-1 x expert=1 x model=3 does not make 8 devices"),
        ({"model": 16}, 8, "data=-1 x expert=1 x model=16 does not make 8 devices"),
    ],
)
def test_mesh_of_the_wrong_size(sizes, devices, found):
    with pytest.raises(ConfigError) as error:
        MeshConfig(**sizes).sizes(devices)
    assert str(error.value).startswith(found)


@pytest.mark.parametrize(
    "sizes, problem",
    [
        ({"data": 0}, "data: must be positive, or -1 to take the rest, found 0"),
        ({"model": -2}, "model: must be positive, or -1 to take the rest, found -2"),
        ({"data": -1, "model": -1}, "data: only one axis may be -1, found data and model"),
        (
            {"data": 1, "expert": -1, "model": -1},
            "expert: only one axis may be -1, found expert and model",
        ),
    ],
)
def test_impossible_meshes(sizes, problem):
    with pytest.raises(ConfigError) as error:
        MeshConfig(**sizes)
    assert str(error.value) == problem


def test_make_mesh():
    mesh = make_mesh(MeshConfig(data=2, model=4))
    assert dict(mesh.shape) == {"data": 2, "expert": 1, "model": 4}
    # linen's constraints fail under Explicit, jax's default
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh_of(1, 1, 2).devices.ravel().tolist() == jax.devices()[:2]


def model(mixer: str = "none", **fields) -> ModelConfig:
    """Every axis divides by 8, as the largest mesh here asks."""
    sizes = {"projection": GroupedQuery(query_heads=8, kv_heads=8, head_dim=4), "kernel": "chunked"}
    slots = {slot: STREAM_MIXERS[mixer]() for slot in ("query", "key", "value")}
    return ModelConfig(
        **{
            "layers": 2,
            "width": 16,
            "vocabulary_size": 24,
            "attention": AttentionConfig(**sizes, **slots),
            "feed_forward": SwiGLU(width=32),
            "numerics": Numerics(dtype="float32", init_std=0.5),
            **fields,
        }
    )


def boxed_shapes(config: ModelConfig):
    """Parameters as shapes with their logical axes: nothing is computed."""
    return jax.eval_shape(config.build().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))[
        "params"
    ]


def boxes(tree) -> list[nn.LogicallyPartitioned]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


@pytest.mark.parametrize("mixer", STREAM_MIXERS)
@pytest.mark.parametrize("stack", ["scan", "unroll"])
def test_every_parameter_has_a_rule(mixer, stack):
    leaves = boxes(boxed_shapes(model(mixer, embeddings="untied", stack=stack)))
    for leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert None not in leaf.names and set(leaf.names) <= set(RULES)
        spec(leaf.names)
    # two embeddings and the final norm
    assert sum("layers" in leaf.names for leaf in leaves) == len(leaves) - 3
    # What every device holds whole is small: the knocking matrices and the q/k norms.
    whole = [leaf for leaf in leaves if not any(spec(leaf.names))]
    assert all(
        {"mixer_in", "mixer_out"} < set(leaf.names) or leaf.names == ("layers", "head_dim")
        for leaf in whole
    )


@pytest.mark.parametrize("sizes", MESHES)
def test_tree_shardings_of_the_transformer(sizes):
    mesh = mesh_of(*sizes)
    shapes = boxed_shapes(model("mlp", embeddings="untied"))
    shardings = tree_shardings(shapes, mesh)
    for leaf, sharding in zip(boxes(shapes), jax.tree.leaves(shardings), strict=True):
        assert sharding.mesh == mesh
        sizes = [
            np.prod([mesh.shape[a] for a in np.atleast_1d(part or [])], dtype=int)
            for part in spec(leaf.names)
        ]
        assert sharding.shard_shape(leaf.value.shape) == tuple(np.array(leaf.value.shape) // sizes)
    assert jax.tree.structure(shardings) == jax.tree.structure(nn.unbox(shapes))


def test_unboxed_leaves_are_replicated():
    shardings = tree_shardings({"step": jax.ShapeDtypeStruct((), jnp.int32)}, mesh_of(8, 1, 1))
    assert shardings == {"step": NamedSharding(mesh_of(8, 1, 1), PartitionSpec())}


@pytest.mark.parametrize(
    "sizes, leaf, problem",
    [
        (
            (1, 1, 8),
            shape_of(16, 6, 4, axes=("embed", "heads", "head_dim")),
            "dimension 'heads' of 6 does not divide into 8",
        ),
        (
            (4, 1, 2),
            shape_of(24, 18, axes=("vocabulary", "embed")),
            "dimension 'embed' of 18 does not divide into 4",
        ),
        # 4 divides by each of data and expert, but not by both.
        (
            (4, 2, 1),
            shape_of(4, 3, axes=("batch", "length")),
            "dimension 'batch' of 4 does not divide into 8",
        ),
    ],
)
def test_dimensions_that_do_not_divide_are_named(sizes, leaf, problem):
    with pytest.raises(ValueError) as error:
        tree_shardings({"layers": {"query": leaf}}, mesh_of(*sizes))
    assert str(error.value).startswith(f"layers/query: {problem}")
    tree_shardings({"layers": {"query": leaf}}, mesh_of(1, 1, 1))  # one device takes any size


def test_the_transformer_names_the_parameter_that_does_not_divide():
    shapes = boxed_shapes(model().replace(feed_forward=SwiGLU(width=12)))
    with pytest.raises(
        ValueError,
        match=("^layers/feed_forward/down: dimension 'feed_forward' of 12 does not divide into 8"),
    ):
        tree_shardings(shapes, mesh_of(1, 1, 8))


@pytest.mark.parametrize("sizes", MESHES)
def test_local_rows_cover_the_batch(sizes):
    """One process holds every row, once each, also where model parallelism repeats rows."""
    rows = local_rows(mesh_of(*sizes), 16)
    np.testing.assert_array_equal(rows, np.arange(16))


def test_batch_is_split_over_data_and_expert():
    sharding = batch_sharding(mesh_of(2, 2, 2))
    assert sharding.shard_shape((16, 5)) == (4, 5)


def test_what_was_traced_without_a_mesh_is_traced_again_within_one():
    """The mesh is a part of jit's key, also of a function that was called outside before."""
    seen, x_BTD = [], jnp.ones((8, 4, 16))

    @jax.jit
    def pin(x):
        seen.append(axis_size("batch"))
        return constrain(2 * x, "batch", "length", "feed_forward")

    def shard(y):
        return y.sharding.shard_shape(y.shape)

    assert shard(pin(x_BTD)) == (8, 4, 16)
    with jax.set_mesh(mesh_of(2, 2, 2)):
        assert shard(pin(x_BTD)) == (2, 4, 8)
    placed = jax.device_put(x_BTD, batch_sharding(mesh_of(2, 1, 4)))
    assert shard(jax.jit(on_mesh(mesh_of(2, 1, 4), pin))(placed)) == (4, 4, 4)
    assert seen == [1, 4, 2]


@pytest.mark.parametrize("sizes", MESHES)
def test_devices_meet_by_logical_axis(sizes):
    """Gathered parts are the whole in its order, and scattered sums are what every device holds
    times the devices that hold it."""
    x = jnp.arange(16.0)

    def meet(x):
        whole = gather(x, "experts")
        start = index_along("experts") * len(x)
        kept = jax.lax.dynamic_slice_in_dim(whole, start, len(x)) - x
        return scatter_sum(whole, "experts"), kept, sum_over((jnp.sum(x),), "experts", "heads")[0]

    axes = ("experts",)
    with jax.set_mesh(mesh_of(*sizes)):
        summed, kept, total = jax.jit(per_device(meet, (axes,), (axes, axes, ())))(x)
    np.testing.assert_array_equal(summed, sizes[1] * x)
    np.testing.assert_array_equal(kept, 0)
    assert total == sizes[2] * 120


def test_sharded_equals_unsharded():
    """Parameters born in their shards and the loss of a sharded batch: the same numbers as on one
    device."""
    config = model("linear")
    module, T = config.build(), 6
    tokens_BT = jax.random.randint(jax.random.key(1), (8, T), 0, config.vocabulary_size)
    batch = {
        "tokens": tokens_BT,
        "targets": jnp.roll(tokens_BT, -1, axis=1),
        "segment_ids": jnp.zeros_like(tokens_BT),
        "positions": jnp.broadcast_to(jnp.arange(T), (8, T)),
        "weights": jnp.ones((8, T), jnp.float32),
    }

    def born(key):
        return nn.unbox(module.init(key, tokens_BT)["params"])

    def gradient(params, batch):
        return jax.value_and_grad(lambda p: module.apply({"params": p}, batch, method="loss")[0])(
            params
        )

    mesh = mesh_of(2, 2, 2)
    shardings = tree_shardings(boxed_shapes(config), mesh)
    with jax.set_mesh(mesh):
        sharded = jax.jit(born, out_shardings=shardings)(jax.random.key(0))
        placed = jax.device_put(batch, batch_sharding(mesh))
        loss, grads = jax.jit(gradient, out_shardings=(None, shardings))(sharded, placed)
    for leaf, sharding in zip(jax.tree.leaves(grads), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert len(sharded["embedding"].addressable_shards[0].data) == config.vocabulary_size // 2
    whole = jax.device_put(jax.device_get(sharded))
    expected_loss, expected_grads = jax.jit(gradient)(whole, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-3, atol=1e-4)


def test_presets_say_where_a_run_belongs():
    assert tuple(MeshConfig(preset="v5p-64", model=4).sizes(32).values()) == (8, 1, 4)
    with pytest.raises(ConfigError, match="^preset: 'v5p-64' has 32 devices, found 64"):
        MeshConfig(preset="v5p-64").sizes(64)
    with pytest.raises(ConfigError, match="preset: 'v5p-46' is not known; did you mean 'v5p-64'"):
        MeshConfig(preset="v5p-46")
    assert (
        make_mesh(MeshConfig(preset="1-device")).size == 1
        and make_mesh(MeshConfig(preset="1-host")).size == 8
    )
    assert all(topology(name).chips == PRESETS[name] for name in SLICES)
    assert {name: PRESETS[name] for name in ("v5e-4", "v5p-128")} == {"v5e-4": 4, "v5p-128": 64}


def test_only_data_spans_slices():
    """Sixteen stand-ins in two slices of eight: neighbours along expert and model share a slice,
    the halves of data do not."""

    class Device:
        platform, device_kind, process_index = "cpu", "cpu", 0

        def __init__(self, number):
            self.id, self.slice_index = number, number // 8

    grid = hybrid_devices((4, 2, 2), 2, [Device(i) for i in range(16)])
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert grid.shape == (4, 2, 2) and len({device.id for device in grid.flat}) == 16
    np.testing.assert_array_equal(slices, np.repeat([0, 0, 1, 1], 4).reshape(4, 2, 2))
