"""One attention layer for any model: what `kha_jax.Attention` and `kha_jax.knock` are.

Legend: B batch, T position, D model width, H head width.
"""

import functools
from typing import Any, Mapping

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.attention import attention
from kha_jax.attention.attention import SLOTS, AttentionConfig
from kha_jax.attention.mixers import STREAM_MIXERS, StreamMixer
from kha_jax.attention.outputs import OUTPUT_MIXERS, OutputMixer
from kha_jax.attention.projections import GroupedQuery
from kha_jax.attention.scores import SCORE_MIXERS, ScoreMixer
from kha_jax.config import Config, ConfigError, near
from kha_jax.modules import Numerics
from kha_jax.sharding import Rules, checked_rules, in_auto_mode, on_mesh, own_rules

KNOCKING = ("linear", "mlp", "gate")
TABLES = {
    **dict.fromkeys(SLOTS, STREAM_MIXERS),
    **dict.fromkeys(attention.SCORES, SCORE_MIXERS),
    "output": OUTPUT_MIXERS,
}
FLOATS = (jnp.float32, jnp.bfloat16)


class Attention(nn.Module):
    """Causal self-attention [B, T, D] -> [B, T, D] whose heads interact, as a linen module.

    Its parameters are plain arrays and exactly those of an attention layer of `kha_jax`'s models,
    so that a layer of a checkpoint fits. It computes in the dtype of its input, float32 or
    bfloat16, and on any mesh: nothing is said of where parameters lie, and activations are split by
    `rules`. What mixture of heads adds to the loss comes by `mutable=["losses"]`.

    width: D. query_heads, kv_heads, head_dim: of grouped queries; as many key/value as query heads
    by default, and width / query_heads. query, key, value: what mixes each stream; logits,
    probabilities: the scores; output: what the heads read; each by its name on the command line
    ("mlp"), or a config (`kha_jax.KnockingLinear(apply="weights")`). config: any other attention,
    in place of all of these. rules: logical axis -> mesh axes, before those of
    `kha_jax.sharding.RULES`; an axis that the mesh lacks, or whose devices do not divide, splits
    nothing. numerics: the parameters' dtype and initial scale.
    """

    width: int
    query_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    query: str | StreamMixer = "none"
    key: str | StreamMixer = "none"
    value: str | StreamMixer = "none"
    logits: str | ScoreMixer = "none"
    probabilities: str | ScoreMixer = "none"
    output: str | OutputMixer = "none"
    config: AttentionConfig | None = None
    rules: Rules | None = None
    numerics: Numerics = Numerics()

    @property
    def attention(self) -> AttentionConfig:
        """What the fields make.

        Raises:
            ConfigError: names the field that contradicts another.
        """
        slots = {slot: _named(slot, getattr(self, slot)) for slot in TABLES}
        if self.config is not None:
            sizes = {name: getattr(self, name) for name in ("query_heads", "kv_heads", "head_dim")}
            given = [name for name, size in sizes.items() if size is not None]
            given += [slot for slot in TABLES if getattr(self, slot) != "none"]
            problem = f"stands in place of {' and '.join(given)}; set them in it"
            return self.config if not given else _raise(ConfigError("config", problem))
        if self.query_heads is None:
            raise ConfigError("query_heads", "is required, or a config")
        sizes = {"query_heads": self.query_heads, "kv_heads": self.kv_heads or self.query_heads}
        if self.head_dim is None and self.width % self.query_heads:
            problem = f"must be given where query_heads={self.query_heads} do not divide width"
            raise ConfigError("head_dim", f"{problem}={self.width}")
        head_dim = self.head_dim or self.width // self.query_heads
        return AttentionConfig(projection=GroupedQuery(**sizes, head_dim=head_dim), **slots)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """The layer's output [B, T, D] in the dtype of x.

        positions [B, T]: 0, 1, ... in every row by default. segment_ids [B, T]: the document of
        every token, which attention does not leave; one a row by default.
        """
        expect("x", x, (None, None, self.width), FLOATS)
        B, T, _ = x.shape
        positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions is None else positions
        expect("positions", positions, (B, T), (jnp.integer,))
        if segment_ids is not None:
            expect("segment_ids", segment_ids, (B, T), (jnp.integer,))
        config, fresh = self.attention, not self.has_variable("params", "output")
        layer = config.build(
            width=self.width, numerics=self.numerics.replace(dtype=x.dtype.name), parent=None
        )
        if self.is_initializing() and fresh:
            for name, value in born(layer, self.make_rng("params")).items():
                self.put_variable("params", name, value)

        params = self.variables.get("params", {})
        same_tree("params", params, shapes(config, self.width))
        rules = tuple(checked_rules(self.rules or {}).items())
        y, loss = attend(layer, rules, params, x, positions, segment_ids)
        if not self.is_initializing():
            self.sow("losses", "attention", loss)
        return y


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(
    layer: attention.Attention,
    rules: tuple[tuple[str, Any], ...],
    params: dict[str, Any],
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The layer's output and what it adds to the loss, on the mesh that there is. Compiled as one,
    since `shard_map` outside of a program takes minutes."""

    def run(params, *inputs):
        with own_rules(dict(rules), whole_parts(layer.config, *x.shape[:2])):
            y, aux = layer.apply({"params": params}, *inputs)
        return y, aux.loss

    return in_auto_mode(run, (x, None))(params, x, positions, segment_ids)


def _raise(error: Exception) -> Any:
    raise error


def _named(slot: str, given: str | Config) -> Config:
    table = TABLES[slot]
    if isinstance(given, str) and given not in table:
        raise ConfigError(slot, f"{given!r} is not known; {near(given, table)}")
    return table[given]() if isinstance(given, str) else given


@functools.partial(jax.jit, static_argnums=0)
def born(layer: attention.Attention, key: jax.Array) -> dict[str, Any]:
    """The initial parameters of a layer, as plain arrays. Compiled as one, of which the output that
    nobody reads is no part."""
    x = jnp.zeros((1, 1, layer.width), layer.numerics.dtype)
    # its one row does not divide over a mesh
    init = on_mesh(None, layer.clone(config=layer.config.replace(kernel="auto")).init)
    return nn.unbox(init(key, x, jnp.zeros((1, 1), jnp.int32)))["params"]


@functools.lru_cache
def shapes(config: AttentionConfig, width: int) -> dict[str, Any]:
    """Those of a layer's parameters."""
    layer = config.build(width=width, numerics=Numerics(), parent=None)
    return jax.eval_shape(functools.partial(born, layer), jax.random.key(0))


def same_tree(name: str, given: Any, expected: Any) -> None:
    """Raises ValueError with the first array that is missing, unknown or of another shape."""
    found, wanted = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (given, expected)
    )
    for path in sorted(found | wanted):
        there, here = wanted.get(path, "no such array"), found.get(path, "none")
        if there != here:
            raise ValueError(f"{name}/{path}: expected {there}, found {here}")


def whole_parts(config: AttentionConfig, batch: int, length: int) -> Mapping[str, Any]:
    """For each logical axis, whether so many devices divide it; see `sharding.own_rules`."""
    heads, read = config.projection.output_shape()[0], config.heads_read()["value"]

    def fit(n):
        return heads % n == 0 and (read % n == 0 or n % read == 0)

    rows = {"batch": lambda n: batch % n == 0, "query_length": lambda n: length % n == 0}
    return {**rows, "heads": fit, "kv_heads": fit}


def knock(x: jax.Array, params: Mapping[str, jax.Array], kind: str = "linear") -> jax.Array:
    """Knocking heads behind a projection of your own: x[..., heads, H], before any norm of queries
    or keys and any rotary embedding, in its dtype.

    kind: `linear` is x T, params {"kernel": T}, which begins as the identity; `mlp` has {"up",
    "gate", "down"}, of which up and down begin as the identity and gate at zero; `gate` has
    {"gate"}, which begins at zero; see `KnockingLinear`, `KnockingMLP`, `KnockingGate`. All are [H,
    H] and the same for all heads. Given weights [D, heads, H] for x, `linear` folds T into them.
    """
    if kind not in KNOCKING:
        raise ValueError(f"kind: {kind!r} is not known; {near(kind, KNOCKING)}")
    if getattr(x, "ndim", 0) < 2:
        raise ValueError(f"x: expected [..., heads, H], found {described(x)}")
    expect("x", x, x.shape, FLOATS)
    *_, heads, H = x.shape
    names = {"linear": ["kernel"], "mlp": ["down", "gate", "up"], "gate": ["gate"]}[kind]
    if sorted(params) != names:
        raise ValueError(f"params: expected {names} for kind={kind!r}, found {sorted(params)}")
    for name, matrix in params.items():
        expect(f"params[{name!r}]", matrix, (H, H), FLOATS)
    mixer = STREAM_MIXERS[kind]().build(
        heads=heads, head_dim=H, numerics=Numerics(dtype=x.dtype.name), parent=None
    )
    return mixer.apply({"params": dict(params)}, x)


def described(array: Any) -> str:
    """The dtype and shape of what a user gave."""
    shape = getattr(array, "shape", None)
    return f"a {type(array).__name__}" if shape is None else f"{array.dtype}{list(shape)}"


def expect(name: str, array: Any, shape: tuple[int | None, ...], dtypes: tuple[Any, ...]) -> None:
    """Checks what a user hands in, at the time of tracing; None fits any size.

    Raises:
        ValueError: names the argument, what was found and what was expected.
    """
    kinds = " or ".join(jnp.dtype(d).name if d in FLOATS else d.__name__ for d in dtypes)
    sizes = ", ".join("?" if size is None else str(size) for size in shape)
    said = f"{name}: expected {kinds}[{sizes}], found {described(array)}"
    error = {"custom_message": said, "exception_type": ValueError}
    chex.assert_equal(hasattr(array, "dtype"), True, **error)
    chex.assert_shape(array, shape, **error)
    chex.assert_equal(any(jnp.issubdtype(array.dtype, d) for d in dtypes), True, **error)
