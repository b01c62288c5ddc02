"""A run's config, its state, and the pure functions that change it: train_step and evaluation_step.

Legend: A micro-batches of a step, B batch, T position.
"""

from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kha_jax import data, moe, optimizer
from kha_jax.config import Config, choice
from kha_jax.model import Batch, ModelConfig, Transformer
from kha_jax.ops.attention import unavailable
from kha_jax.ops.losses import TokenSums
from kha_jax.optimizer import OptimizerConfig
from kha_jax.sharding import MeshConfig, tree_shardings, using


class EvaluationConfig(Config):
    """every: steps between evaluations (the last step always has one), 0 for none. batches: of
    batch_size windows of the validation split, which may hold fewer; they are computed in
    micro-batches like a step."""

    every: int = 100
    batches: int = 8

    def validate(self):
        self.at_least(0, "every")
        self.at_least(1, "batches")


class CheckpointConfig(Config):
    """every: steps between checkpoints (the last step always has one), 0 for none. keep: newest
    ones that stay."""

    every: int = 200
    keep: int = 2

    def validate(self):
        self.at_least(0, "every")
        self.at_least(1, "keep")


class ProfileConfig(Config):
    """A profiler trace of steps start to stop - 1, written below the workdir. stop = 0: none."""

    start: int = 0
    stop: int = 0

    def validate(self):
        self.at_least(0, "start", "stop")
        problem = f"must be greater than start={self.start}, or 0 for no trace, found {self.stop}"
        self.require(self.stop == 0 or self.stop > self.start, "stop", problem)


class RunConfig(Config):
    """Everything that decides a run.

    steps: optimiser steps. seed: of the initial values and of the data order. batch_size: rows of a
    step over all devices. seq_len: tokens of a row. accumulation: micro-batches that a step is
    computed in. max_nonfinite_steps: consecutive steps with a non-finite loss,
    gradient or updated state (none of which is applied) after which the run stops.
    """

    steps: int = 1000
    seed: int = 0
    batch_size: int = 16
    seq_len: int = 256
    accumulation: int = 1
    max_nonfinite_steps: int = 10
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: Config = choice(data.SOURCES, data.PythonSource(), by="source")
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()

    def validate(self):
        self.at_least(1, "steps", "batch_size", "seq_len", "accumulation", "max_nonfinite_steps")
        self.require(0 <= self.seed < 2**32, "seed", f"must be in [0, 2^32), found {self.seed}")
        problem = f"must divide batch_size={self.batch_size}, found {self.accumulation}"
        self.require(self.batch_size % self.accumulation == 0, "accumulation", problem)
        needed, have = self.data.vocabulary_size(), self.model.vocabulary_size
        problem = f"must be at least the data's {needed}, found {have}"
        self.require(have >= needed, "model.vocabulary_size", problem)
        shortest = self.data.minimum_seq_len() if hasattr(self.data, "minimum_seq_len") else 1
        self.require(
            self.seq_len >= shortest,
            "seq_len",
            f"must be at least {shortest} for this data, found {self.seq_len}",
        )

    def check_on(self, sizes: dict[str, int], platform: str) -> None:
        """Checks that the run can be placed on a mesh with these sizes.

        Raises:
            ConfigError: names what does not divide over it, or the kernel that does not run there.
        """
        ways, rows = sizes["data"] * sizes["expert"], self.batch_size // self.accumulation
        problem = (
            f"must divide by {ways} devices in each micro-batch, found {self.batch_size} / "
            f"{self.accumulation}"
        )
        self.require(rows % ways == 0, "config.batch_size", problem)
        problem = f"must divide by mesh.model={sizes['model']}, found {self.seq_len}"
        self.require(self.seq_len % sizes["model"] == 0, "config.seq_len", problem)
        missing = unavailable(self.model.attention.kernel, platform, self.seq_len)
        self.require(missing is None, "config.model.attention.kernel", str(missing))


class TrainState(NamedTuple):
    """All that changes while training. step counts batches; the optimiser counts the updates that
    were applied.

    balance: the routers' biases, which no gradient reaches; empty without them.
    """

    step: jax.Array
    params: Any
    balance: Any
    optimizer: Any


class Trainer(NamedTuple):
    """Functions of one run on one mesh, not yet compiled."""

    model: Transformer
    init: Callable[[jax.Array], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluation_step: Callable[[TrainState, Batch], TokenSums]
    abstract: TrainState
    shardings: TrainState


def variables(state: TrainState) -> dict[str, Any]:
    """What the model is applied with."""
    return {"params": state.params, "balance": state.balance}


def _boxed_variables(model: Transformer, key: jax.Array) -> dict[str, Any]:
    ids, ones = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.float32)
    batch = {"tokens": ids, "targets": ids, "positions": ids, "segment_ids": ids, "weights": ones}
    return {"balance": {}, **model.init(key, batch, method="loss")}


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _initial_knocking(model: Transformer, axes: Any) -> Any:
    """The parameters' tree with the initial value of knocking matrices and zeros elsewhere; they
    use no randomness."""
    keep = jax.tree.map(lambda role: role == "knocking", optimizer.roles(axes))

    def take(keep, leaf):
        return leaf if keep else jnp.zeros(())

    return jax.jit(
        lambda: jax.tree.map(
            take, keep, nn.unbox(_boxed_variables(model, jax.random.key(0))["params"])
        )
    )()


def make_trainer(config: RunConfig, mesh: jax.sharding.Mesh) -> Trainer:
    """Builds the model and optimiser of a run and says how its state is laid out on the mesh.

    Raises:
        ConfigError: names a parameter that does not divide over the mesh.
    """
    model = config.model.build()
    # Parameters do not depend on the kernel, and not every kernel runs on the one token that they
    # are made with.
    any_length = config.model.replace(
        attention=config.model.attention.replace(kernel="reference")
    ).build()
    boxed = jax.eval_shape(lambda key: _boxed_variables(any_length, key), jax.random.key(0))[
        "params"
    ]
    axes = jax.tree.map(lambda leaf: leaf.names, boxed, is_leaf=_is_boxed)
    needs_initial = config.optimizer.knocking.decay == "to_identity"
    initial = _initial_knocking(any_length, axes) if needs_initial else None
    tx = optimizer.make(config.optimizer, config.steps, axes, initial)

    def boxed_init(key: jax.Array) -> TrainState:
        born = _boxed_variables(any_length, key)
        return TrainState(
            jnp.zeros((), jnp.int32), born["params"], born["balance"], tx.init(born["params"])
        )

    def init(key: jax.Array) -> TrainState:
        return nn.unbox(boxed_init(key))

    boxed_state = jax.eval_shape(boxed_init, jax.random.key(0))
    shardings = tree_shardings(boxed_state, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.unbox(boxed_state),
        shardings,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        return _train_step(config, model, tx, state, batch)

    def evaluation_step(state: TrainState, batch: Batch) -> TokenSums:
        return model.apply(variables(state), batch, method="loss")[1][0]

    return Trainer(
        model, init, _on(mesh, train_step), _on(mesh, evaluation_step), abstract, shardings
    )


def _on(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """The function, traced where activations are pinned to the mesh."""

    def inside(*arguments):
        with using(mesh):
            return function(*arguments)

    return inside


def _train_step(config, model, tx, state, batch):
    """One update from one global batch.

    The gradient is that of (sum of the objective over all micro-batches) / (their weighted tokens),
    so a step does not depend on how its tokens are spread over micro-batches or devices. A
    non-finite loss, gradient or updated state leaves everything but the step as it was.
    """

    def objective(params, micro_batch):
        return model.apply(variables(state._replace(params=params)), micro_batch, method="loss")

    gradient = jax.value_and_grad(objective, has_aux=True)

    def accumulate(total, micro_batch):
        (value, (sums, aux)), grads = gradient(state.params, micro_batch)
        return jax.tree.map(jnp.add, total, (value, sums, grads)), aux

    if config.accumulation == 1:
        (value, (sums, aux)), grads = gradient(state.params, batch)
    else:
        # Row r goes to micro-batch r mod A, so that each device splits its own rows.
        micro_batches = jax.tree.map(
            lambda z: z.reshape(-1, config.accumulation, *z.shape[1:]).swapaxes(0, 1), batch
        )
        first = jax.tree.map(lambda z: z[0], micro_batches)
        shapes = jax.eval_shape(gradient, state.params, first)
        (value, (sums, _)), grads = shapes
        zero = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), (value, sums, grads))
        (value, sums, grads), aux = jax.lax.scan(accumulate, zero, micro_batches)
        aux = {
            name: jnp.sum(z, axis=0) if name == "expert_counts" else jnp.mean(z, axis=0)
            for name, z in aux.items()
        }

    tokens = jnp.maximum(sums.tokens, 1)
    grads = jax.tree.map(lambda g: g / tokens.astype(g.dtype), grads)
    norm = optax.tree.norm(grads)
    updates, optimizer_state = tx.update(grads, state.optimizer, state.params)
    balance, load = _rebalance(
        config.model.feed_forward, state.balance, aux.pop("expert_counts", None)
    )
    updated = TrainState(
        state.step, optax.apply_updates(state.params, updates), balance, optimizer_state
    )
    finite = jnp.isfinite(norm) & jnp.isfinite(value) & _all_finite(updated)
    updated = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    metrics = {
        "loss": sums.loss / tokens,
        "grad_norm": norm,
        "learning_rate": optimizer.learning_rate(config.optimizer, config.steps, state.optimizer),
        "nonfinite": 1 - finite.astype(jnp.int32),
        **({"z_loss": sums.z_loss / tokens} if config.model.loss.z_loss else {}),
        **aux,
        **load,
    }
    return updated._replace(step=state.step + 1), metrics


def _all_finite(tree):
    """Whether no leaf holds a nan or an infinity."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _rebalance(feed_forward, balance, counts_LE):
    """The routers' biases after a step with these assignments, and the metrics of their load."""
    if counts_LE is None:
        return balance, {}
    if not balance:
        return balance, moe.load_metrics(counts_LE, None)
    moved = jax.tree.map(lambda bias_LE: moe.update_bias(feed_forward, bias_LE, counts_LE), balance)
    return moved, moe.load_metrics(counts_LE, jax.tree.leaves(moved)[0])
