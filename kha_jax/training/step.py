"""A run's config, its state, and its compiled functions: init, train_step and evaluation_step.

Legend: A micro-batches of a step, B batch, T position.
"""

import functools
from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kha_jax.attention.attention import SCORES, SLOTS
from kha_jax.config import under
from kha_jax.feed_forward import moe
from kha_jax.hardware.chips import chip_of
from kha_jax.model import Batch, ModelConfig, Transformer
from kha_jax.ops.losses import TokenSums
from kha_jax.runs.arrays import leaves as by_path
from kha_jax.runs.checkpoint import Checkpoints
from kha_jax.runs.manifest import WEIGHTS, read_manifest
from kha_jax.sharding import batch_sharding, on_mesh, tree_shardings
from kha_jax.training import optimizer
from kha_jax.training.run_config import BATCH, RunConfig
from kha_jax.training.trace import trace


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
    """One run on one mesh: its functions, compiled when they are first called wherever that is, and
    the shapes and places of what they take.

    init: the state from a random key. begin: from (step, params, balance), whose memory it takes,
    with an optimiser that has no moments yet and whose schedule is at that step. train_step: the
    next state and metrics; it takes the memory of the state that it is given. evaluation_step: sums
    over the tokens of a batch. config, compiler_options: the run as it is tuned for the devices,
    and what it is compiled with.
    """

    model: Transformer
    init: Callable[[jax.Array], TrainState]
    begin: Callable[[jax.Array, Any, Any], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluation_step: Callable[[TrainState, Batch], TokenSums]
    abstract: TrainState
    abstract_batch: Batch
    shardings: TrainState
    config: RunConfig
    compiler_options: dict[str, str]

    def lower(self) -> jax.stages.Lowered:
        """The train step, to be compiled ahead of time."""
        return self.train_step.lower(self.abstract, self.abstract_batch)


def variables(state: TrainState) -> dict[str, Any]:
    """What the model is applied with."""
    return {"params": state.params, "balance": state.balance}


def _boxed_variables(model: Transformer, key: jax.Array) -> dict[str, Any]:
    # its one row does not divide over a mesh
    init = on_mesh(None, functools.partial(model.init, method="loss"))
    batch = {name: jnp.ones((1, 1), dtype) for name, dtype in BATCH.items()}
    return {"balance": {}, **init(key, batch)}


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def initial_mixers(config: ModelConfig, seed: int) -> Any:
    """The parameters' tree with the values that mixers of streams and scores, and the matrices of
    other mixers, start from in a run of this seed, and zeros elsewhere; only those are computed."""
    model = any_length(config)
    mixers = {f"{slot}_mixer" for slot in (*SLOTS, *SCORES)}

    def kept(path, role):
        return role == "mixer" or any(getattr(part, "key", None) in mixers for part in path)

    keep = jax.tree_util.tree_map_with_path(kept, optimizer.roles(_axes(model)))

    def take(keep, leaf):
        return leaf if keep else jnp.zeros(())

    return jax.jit(
        lambda: jax.tree.map(
            take, keep, nn.unbox(_boxed_variables(model, jax.random.key(seed))["params"])
        )
    )()


def abstract_variables(config: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Shapes and dtypes of the variables of a model, with their places on a mesh where there is
    one; an empty collection where a model has none.

    Raises:
        ConfigError: names a parameter that does not divide over the mesh.
    """
    model = any_length(config)
    boxed = jax.eval_shape(lambda key: _boxed_variables(model, key), jax.random.key(0))
    if mesh is None:
        return nn.unbox(boxed)
    with under("mesh"):
        places = tree_shardings(boxed, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(boxed),
        places,
    )


def initial_leaves(config: ModelConfig, seed: int, like: dict[str, Any]) -> dict[str, jax.Array]:
    """Those of the variables that a run of this seed starts from, by path; `like`: their shapes and
    places. Nothing else is made."""
    model = any_length(config)

    def born():
        made = nn.unbox(_boxed_variables(model, jax.random.key(seed)))
        return {path: leaf for path, leaf in by_path(made).items() if path in like}

    return jax.jit(born, out_shardings={path: leaf.sharding for path, leaf in like.items()})()


def any_length(config: ModelConfig) -> Transformer:
    """The model with a kernel that runs on the one token that parameters are made with, as not
    every kernel does; they do not depend on it."""
    return config.with_attention(lambda a: a.replace(kernel="reference")).build()


def _axes(model: Transformer) -> Any:
    """The logical axes of every parameter."""
    boxed = jax.eval_shape(lambda key: _boxed_variables(model, key), jax.random.key(0))["params"]
    return jax.tree.map(lambda leaf: leaf.names, boxed, is_leaf=_is_boxed)


def make_trainer(config: RunConfig, mesh: jax.sharding.Mesh) -> Trainer:
    """Builds the model and optimiser of a run and says how its state is laid out on the mesh.

    Raises:
        ConfigError: names a parameter that does not divide over the mesh.
    """
    real = isinstance(mesh, jax.sharding.Mesh)  # nothing is compiled for an abstract one
    config, settings = config.tuned(chip_of(mesh.devices.flat[0].device_kind) if real else None)
    compiled = functools.partial(jax.jit, compiler_options=settings.options or None)
    model, newborn = config.model.build(), any_length(config.model)
    axes = _axes(newborn)
    needs_initial = config.optimizer.mixer.decay == "to_identity"
    initial = initial_mixers(config.model, config.seed) if needs_initial else None
    paths = optimizer.trained(config.optimizer, axes)
    only = functools.partial(optimizer.only, paths)
    tx = optimizer.make(
        config.optimizer,
        config.steps,
        only(axes),
        None if initial is None else only(initial),
        optimizer.value_weights(config.model),
    )

    def boxed_init(key: jax.Array) -> TrainState:
        born = _boxed_variables(newborn, key)
        moments = tx.init(only(born["params"]))
        return TrainState(jnp.zeros((), jnp.int32), born["params"], born["balance"], moments)

    def init(key: jax.Array) -> TrainState:
        return nn.unbox(boxed_init(key))

    def begin(step: jax.Array, params: Any, balance: Any) -> TrainState:
        *moments, schedule = tx.init(only(params))
        return TrainState(step, params, balance, (*moments, schedule._replace(count=step)))

    boxed_state = jax.eval_shape(boxed_init, jax.random.key(0))
    with under("mesh"):
        shardings = tree_shardings(boxed_state, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.unbox(boxed_state),
        shardings,
    )
    shape, rows = (config.batch_size, config.seq_len), batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for name, kind in BATCH.items()}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = _train_step(config, model, tx, only, state, batch)
        return state, {**metrics, **trace(config.model, state.params)}

    def evaluation_step(state: TrainState, batch: Batch) -> TokenSums:
        return model.apply(variables(state), batch, method="loss")[1][0]

    return Trainer(
        model=model,
        init=jax.jit(init, out_shardings=shardings),
        begin=jax.jit(begin, donate_argnums=(1, 2), out_shardings=shardings),
        train_step=compiled(
            on_mesh(mesh, train_step), donate_argnums=0, out_shardings=(shardings, None)
        ),
        evaluation_step=compiled(on_mesh(mesh, evaluation_step)),
        abstract=abstract,
        abstract_batch=batch,
        shardings=shardings,
        config=config,
        compiler_options=settings.options,
    )


def begun(trainer: Trainer, checkpoints: Checkpoints, step: int | None) -> TrainState:
    """The state of a checkpoint, with an optimiser of its own where it holds weights alone; without
    a step that of a new run.

    Raises:
        CheckpointError: the files do not hold such a state.
    """
    if step is None:
        return trainer.init(jax.random.key(trainer.config.seed))
    if read_manifest(checkpoints.path(step)).get("holds") != WEIGHTS:
        return checkpoints.restore(step, trainer.abstract)
    weights = checkpoints.restore_part(step, variables(trainer.abstract))
    return trainer.begin(np.int32(step), weights["params"], weights["balance"])


def _train_step(config, model, tx, only, state, batch):
    """One update from one global batch.

    The gradient is that of (sum of the objective over all micro-batches) / (their weighted tokens),
    so a step does not depend on how its tokens are spread over micro-batches or devices. Losses of
    routers (balancing=auxiliary, output=mixture) are the exception: products of means over tokens,
    they are taken in each micro-batch, though over all devices. A non-finite loss or gradient
    leaves everything but the step as it was. only: parameters -> those that are trained; the others
    have neither gradients nor moments.
    """
    own = only(state.params)

    def objective(trained, micro_batch):
        params = optimizer.overlaid(trained, state.params)
        return model.apply(variables(state._replace(params=params)), micro_batch, method="loss")

    gradient = jax.value_and_grad(objective, has_aux=True)

    def accumulate(total, micro_batch):
        (value, (sums, aux)), grads = gradient(own, micro_batch)
        return jax.tree.map(jnp.add, total, (value, sums, grads)), aux

    # sums over all micro-batches
    if config.accumulation == 1:
        (value, (sums, aux)), grads = gradient(own, batch)
    else:
        # Row r goes to micro-batch r mod A, so that each device splits its own rows.
        micro_batches = jax.tree.map(
            lambda z: z.reshape(-1, config.accumulation, *z.shape[1:]).swapaxes(0, 1), batch
        )
        first = jax.tree.map(lambda z: z[0], micro_batches)
        shapes = jax.eval_shape(gradient, own, first)
        (value, (sums, _)), grads = shapes
        zero = jax.tree.map(lambda z: jnp.zeros(z.shape, jnp.float32), (value, sums, grads))
        (value, sums, grads), aux = jax.lax.scan(accumulate, zero, micro_batches)
        counts = jax.tree.map(lambda z: jnp.sum(z, axis=0), aux.counts)
        means = jax.tree.map(lambda z: jnp.mean(z, axis=0), aux.metrics)
        aux = aux._replace(counts=counts, metrics=means)

    # the gradient of the mean over tokens, and its norm
    tokens = jnp.maximum(sums.tokens, 1)

    def mean():  # within its consumers, so that it is never written out
        return jax.tree.map(lambda g: g / tokens, optimizer.float32(grads))

    norm = optax.tree.norm(mean())
    balance, load = _rebalance(config, state.balance, aux.counts)

    def updated(state):
        before = only(state.params)
        updates, moments = tx.update(mean(), state.optimizer, before, norm=norm)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        after = optimizer.apply_updates(before, updates, key)
        params = optimizer.overlaid(after, state.params)
        return TrainState(state.step, params, balance, moments)

    # The update, where all of it is finite: by branches, since a selection would hold the state of
    # before beside the one of after.
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    after = jax.lax.cond(finite, updated, lambda state: state, state)
    metrics = {
        "loss": sums.loss / tokens,
        "grad_norm": norm,
        "learning_rate": optimizer.learning_rate(config.optimizer, config.steps, state.optimizer),
        "nonfinite": 1 - finite.astype(jnp.int32),
        **({"z_loss": sums.z_loss / tokens} if config.model.loss.z_loss else {}),
        **aux.metrics,
        **load,
    }
    return after._replace(step=state.step + 1), metrics


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no leaf holds a nan or an infinity."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _rebalance(config, balance, counts):
    """The routers' biases after a step with these assignments, frozen where mixers alone are
    trained, and the metrics of their load."""
    if not counts:
        return balance, {}
    counts_LE = jnp.concatenate(jax.tree.leaves(counts))
    if not balance:
        return balance, moe.load_metrics(counts_LE, None)
    moved = balance
    if config.optimizer.trainable == "all":
        update = functools.partial(moe.update_bias, config.model.feed_forward)
        moved = jax.tree.map(update, balance, counts)
    return moved, moe.load_metrics(counts_LE, jnp.concatenate(jax.tree.leaves(moved)))
