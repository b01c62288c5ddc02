"""What every attention has to keep, measured on one layer of any config: what it promises of its
start and of its heads, causality, packed documents, decoding, folding, sharding, accounting.

Legend: B batch, T position, D model width, N query heads, K key/value heads.
"""

import functools
import math
import re
from collections import Counter
from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kha_jax import sharding
from kha_jax.accounting import count_parameters
from kha_jax.attention import AttentionConfig
from kha_jax.config import ConfigError
from kha_jax.inference.folding import fold, foldable, folded_config
from kha_jax.mesh import MeshConfig, make_mesh
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics

EXACT = Numerics(dtype="float32")
LIMIT, SHOWS = 1e-5, 1e-2  # relative errors: up to which two are equal, from which they are not
B, T = 2, 12
# The second row holds two documents; in decoding it is padded by three.
SEGMENTS = np.array([[0] * T, [0] * 4 + [1] * (T - 4)])
POSITIONS = np.array([np.arange(T), [*range(4), *range(T - 4)]])
PAD, PREFILLED, LAST = np.array([0, 3]), 4, 5
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


class Layer(NamedTuple):
    """One attention layer of a model of this width, and what its properties are tried with."""

    config: AttentionConfig
    width: int

    def inputs(self, seed: int = 0) -> jax.Array:
        """x [B, T, D]."""
        return jax.random.normal(jax.random.key(seed), (B, T, self.width))

    def init(self) -> Any:
        """Parameters as they are born, boxed with their logical axes."""
        x, positions = jnp.zeros((1, 2, self.width)), jnp.zeros((1, 2), jnp.int32)
        module = self.config.build(width=self.width, numerics=EXACT)
        return module.init(jax.random.key(0), x, positions)["params"]

    def boxed(self) -> Any:
        """Shapes of the parameters, boxed with their logical axes."""
        return jax.eval_shape(self.init)

    def random(self, seed: int = 1) -> dict[str, Any]:
        """Parameters that keep activations of order one, so that nothing is small enough to
        hide."""
        draw = np.random.default_rng(seed)

        def fill(path, z):
            about = 1.0 if path[-1].key == "scale" else 0.0
            size = 0.3 if about else 1.2 / math.sqrt(max(z.shape))
            return jnp.float32(about + size * draw.normal(size=z.shape))

        return jax.tree_util.tree_map_with_path(fill, nn.unbox(self.boxed()))

    def fresh(self) -> dict[str, Any]:
        """Random parameters, but mixers as they are born."""
        born = nn.unbox(jax.jit(self.init)())
        mixers = {name: leaf for name, leaf in born.items() if name.endswith("_mixer")}
        return {**self.random(), **mixers}

    def permuted(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters with whole heads in another order: key/value heads reversed, or those of
        each latent group, each with the query heads that read it; of one key/value head the pairs
        that read it."""
        boxed, N = self.boxed(), self.config.projection.query_heads

        def is_box(leaf):
            return isinstance(leaf, nn.LogicallyPartitioned)

        boxes = jax.tree.leaves(boxed["projection"], is_leaf=is_box)
        sizes = [(name, n) for box in boxes for name, n in zip(box.names, box.value.shape)]
        groups = max([n for name, n in sizes if name == "groups"], default=1)
        units = min([n for name, n in sizes if name == "kv_heads"], default=N // groups)
        units = units if units > 1 else max(1, N // 2)

        def one(box, leaf):
            within = 1 if "groups" in box.names else groups
            for axis, name in enumerate(box.names):
                size = leaf.shape[axis]
                if name in ("heads", "kv_heads") and size % (within * units) == 0:
                    order = np.arange(size).reshape(within, units, -1)[:, ::-1].reshape(-1)
                    leaf = jnp.take(leaf, order, axis)
            return leaf

        return jax.tree.map(one, boxed, params, is_leaf=is_box)


@functools.cache
def whole(layer: Layer) -> Callable:
    """(params, x, positions, segment ids, cotangent of the output) -> (output, cotangent of x),
    compiled once."""
    module = layer.config.build(width=layer.width, numerics=EXACT)

    def run(params, x, positions, segments, d_y):
        def apply(x):
            return module.apply({"params": params}, x, positions, segments)[0]

        y, pull = jax.vjp(apply, x)
        return y, pull(d_y)[0]

    return jax.jit(run)


def output(layer: Layer, params: Any, x: jax.Array | None = None) -> np.ndarray:
    """What the layer makes of packed rows [B, T, D]."""
    x = layer.inputs() if x is None else x
    return np.asarray(whole(layer)(params, x, POSITIONS, SEGMENTS, jnp.zeros_like(x))[0])


def influence(layer: Layer, params: Any, row: int, position: int) -> np.ndarray:
    """[B, T]: how much this output moves with each input, through no approximation."""
    x = layer.inputs()
    weights = jax.random.normal(jax.random.key(3), (layer.width,))
    d_y = jnp.zeros_like(x).at[row, position].set(weights)
    d_x = whole(layer)(params, x, POSITIONS, SEGMENTS, d_y)[1]
    return np.asarray(jnp.abs(d_x).max(axis=-1))


@functools.cache
def decoded(layer: Layer) -> Callable:
    """(params, x) -> the output [B, T, D] at the positions of a decoder, compiled once: PREFILLED
    tokens at once, the others one by one but the LAST ones, which come together; row 1 padded."""
    module = layer.config.build(width=layer.width, numerics=EXACT)

    def run(params, x):
        def bound(method, *arguments):
            return module.apply({"params": params}, *arguments, method=method)

        column = jnp.arange(T)
        positions = jnp.maximum(column - PAD[:, None], 0)
        real = (column >= PAD[:, None]).astype(jnp.int32)
        # what is not there yet holds what must not be looked at
        known = jnp.where(column[:, None] < PREFILLED, x, 7.0)
        first, cache = bound("prefill", known, positions, real)

        def more(cache, slot, count=1):
            new = (jax.lax.dynamic_slice_in_dim(z, slot, count, axis=1) for z in (x, positions))
            y, cache = bound("extend", *new, cache, slot, PAD)
            return cache, y

        cache, each = jax.lax.scan(more, cache, jnp.arange(PREFILLED, T - LAST))
        _, last = more(cache, T - LAST, LAST)
        return jnp.concatenate([first[:, :PREFILLED], each[:, :, 0].swapaxes(0, 1), last], axis=1)

    return jax.jit(run)


def on_devices(layer: Layer, params: Any, sizes: MeshConfig) -> np.ndarray:
    """`output` on a mesh of virtual or real devices."""
    module = layer.config.build(width=layer.width, numerics=EXACT)
    mesh = make_mesh(sizes, jax.devices()[: max(1, sizes.data) * sizes.model])

    def apply(params, x, positions, segments):
        return module.apply({"params": params}, x, positions, segments)[0]

    everywhere = jax.NamedSharding(mesh, jax.P())
    placed = jax.device_put((params, layer.inputs(), POSITIONS, SEGMENTS), everywhere)
    return np.asarray(jax.jit(sharding.on_mesh(mesh, apply))(*placed))


def relative_error(ours: Any, expected: Any) -> float:
    """Largest difference over the largest magnitude expected."""
    ours, expected = (np.asarray(z, np.float64) for z in (ours, expected))
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


class Finding(NamedTuple):
    """A property of a layer: whether it holds (None where it does not apply), the figure that says
    so, and what the figure is."""

    holds: bool | None
    figure: float
    text: str


def within(error: float, text: str, limit: float = LIMIT) -> Finding:
    """That two are equal: `text` says which."""
    return Finding(error <= limit, error, f"{text} differs by {error:.2g}, at most {limit:g}")


def unasked(reason: str) -> Finding:
    """That a property does not apply."""
    return Finding(None, math.nan, reason)


def start(layer: Layer) -> Finding:
    """Mixers as they are born change nothing, where all of them promise that."""
    plain = AttentionConfig(projection=layer.config.projection, kernel=layer.config.kernel)
    if not layer.config.identity_at_start or plain == layer.config:
        return unasked("promises nothing of its start")
    params = layer.fresh()
    bare = {name: leaf for name, leaf in params.items() if not name.endswith("_mixer")}
    expected = output(layer._replace(config=plain), bare)
    error = relative_error(output(layer, params), expected)
    return within(error, "the output at the start from that of the projection alone", 1e-6)


def heads(layer: Layer) -> Finding:
    """Moving whole heads, each with its weights, shows where heads are mixed and nowhere else."""
    params = layer.random()
    moved = layer.permuted(params)
    if all(a is b or np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, moved)))):
        return unasked("has one head")
    error = relative_error(output(layer, moved), output(layer, params))
    if not layer.config.mixes_heads:
        return within(error, "it says that it mixes no heads, and the output under a permutation")
    said = f"it says that it mixes heads, and a permutation changes {error:.2g}, at least {SHOWS:g}"
    return Finding(error >= SHOWS, error, said)


def causality(layer: Layer) -> Finding:
    """No output moves with a later input."""
    reads = influence(layer, layer.random(), 0, 6)[0]
    return _nothing_from(reads[7:], reads[:7], "later tokens")


def documents(layer: Layer) -> Finding:
    """No output moves with another document or another row."""
    reads = influence(layer, layer.random(), 1, 6)
    hidden = np.concatenate([reads[0], reads[1, :4]])
    return _nothing_from(hidden, reads[1, 4:7], "other documents")


def _nothing_from(hidden: np.ndarray, visible: np.ndarray, whose: str) -> Finding:
    share = float(hidden.max() / max(visible.max(), 1e-30))
    said = f"the gradient of {whose} is {share:.2g} of that of visible ones, and must be 0"
    return Finding(share == 0 and visible.max() > 0, share, said)


def decoding(layer: Layer) -> Finding:
    """Tokens decoded one by one from a cache are those of the whole rows."""
    params, x, column = layer.random(), layer.inputs(), np.arange(T)
    rows = np.maximum(column - PAD[:, None], 0), (column >= PAD[:, None]).astype(np.int32)
    expected = whole(layer)(params, x, *rows, jnp.zeros_like(x))[0]
    ours = decoded(layer)(params, x)
    pairs = [(ours[row, pad:], expected[row, pad:]) for row, pad in enumerate(PAD)]
    error = max(relative_error(*pair) for pair in pairs)
    return within(error, "what is decoded from a cache from the whole")


def folding(layer: Layer) -> Finding:
    """Folding its stream mixers into the weights changes nothing, where that can be done."""
    try:
        slots = foldable(layer.config)
    except ConfigError as error:
        return unasked(str(error))
    if not slots:
        return unasked("has nothing to fold")
    params = layer.random()
    folded = layer._replace(config=folded_config(layer.config))
    ours = output(folded, fold(layer.config, params))
    return within(relative_error(ours, output(layer, params)), "the output of folded weights")


def devices(layer: Layer) -> Finding:
    """Several devices, which split the rows and the heads (or the queries, where scores mix heads),
    compute what one does."""
    heads, there = layer.config.projection.query_heads, len(jax.devices())
    devices = math.gcd(heads, 4) if there >= 8 else math.gcd(heads, there // 2)
    if there < 2:
        return unasked("needs two devices")
    params = layer.random()
    ours = on_devices(layer, params, MeshConfig(data=2, model=devices))
    error = relative_error(ours, output(layer, params))
    return within(error, f"the output of {2 * devices} devices from that of one")


def accounting(layer: Layer) -> Finding:
    """Parameters and cache are as many as the accounting says."""
    params = nn.unbox(layer.boxed())
    module = layer.config.build(width=layer.width, numerics=EXACT)
    x, positions = jnp.zeros((B, T, layer.width)), jnp.zeros((B, T), jnp.int32)

    def prefill(params):
        return module.apply({"params": params}, x, positions, method="prefill")[1]

    there = _size(params), _size(jax.eval_shape(prefill, params)) / (B * T)
    counted = layer.config.parameters(layer.width), layer.config.cache_floats()
    for name, have, says in zip(("parameters", "cached numbers a token"), there, counted):
        if have != says:
            return Finding(False, says - have, f"{have:,g} {name}, the accounting says {says:,g}")
    return Finding(True, 0.0, "parameters and cache are as counted")


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


PROPERTIES = {
    "identity at the start": start,
    "permuted heads": heads,
    "causality": causality,
    "packed documents": documents,
    "cached decoding": decoding,
    "folding": folding,
    "devices": devices,
    "accounting": accounting,
}


def check(model: ModelConfig) -> dict[str, Finding]:
    """Each property of a model's attention: of all kinds of its layers, the first that fails, or
    the first."""
    layers = [Layer(attention, model.width) for attention in model.attentions().values()]
    out = {}
    for name, measure in PROPERTIES.items():
        findings = [_tried(measure, layer) for layer in layers]
        out[name] = next((found for found in findings if found.holds is False), findings[0])
    if out["accounting"].holds:
        out["accounting"] = _tried(_of_model, model)
    return out


def _tried(measure: Callable[[Any], Finding], of: Any) -> Finding:
    try:
        return measure(of)
    except Exception as error:  # whatever a stranger's module raises
        said = " ".join(str(error).split())[:200]
        return Finding(False, math.nan, f"{type(error).__name__}: {said}")


def _of_model(model: ModelConfig) -> Finding:
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: model.build().init(jax.random.key(0), ids))["params"]
    have, says = _size(shapes), count_parameters(model)
    said = f"{have:,} parameters in all, the accounting says {says:,}"
    return Finding(have == says, says - have, said)


def collectives(text: str) -> Counter:
    """How often each kind of collective stands in an HLO text."""
    return Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", text))


def collectives_of(layer: Layer, devices: int) -> Counter:
    """What one forward pass of the layer moves where this many devices split its heads: compiled
    for virtual CPU devices, never run."""
    mesh = make_mesh(MeshConfig(data=1, model=devices), jax.devices("cpu")[:devices])
    module = layer.config.build(width=layer.width, numerics=EXACT)

    def apply(params, x, positions):
        return module.apply({"params": params}, x, positions)[0]

    rows = sharding.batch_sharding(mesh)
    places = sharding.tree_shardings(layer.boxed(), mesh), rows, rows
    shapes = nn.unbox(layer.boxed()), layer.inputs(), jnp.asarray(POSITIONS)
    step = jax.jit(sharding.on_mesh(mesh, apply), in_shardings=places)
    return collectives(step.lower(*shapes).compile().as_text())
