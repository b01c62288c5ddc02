"""The arrays of a checkpoint: named, counted, read back where they fit what is expected."""

import contextlib
import functools
import math
from typing import Any, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from kha_jax.errors import CheckpointError
from kha_jax.storage import retries

NAMED = 5  # leaves that differ from what is expected, at most
# Orbax hands no context of ours to TensorStore
for defaults in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    defaults.update(retries())


def leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path, such as params/layers/attention/query."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def state_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, or of their descriptions."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def copied(state: Any, room: Any) -> Any:
    """The state in the buffers of `room`, an earlier copy: new pages cost ten times a copy. What
    somebody still reads there is not overwritten; jax then takes new ones after all."""
    return jax.tree.map(jnp.copy, state)


def read(checkpointer: ocp.StandardCheckpointer, path: Any, abstract: Any) -> Any:
    """The tree that lies at a path, laid out as the ShapeDtypeStructs in `abstract` say.

    Raises:
        CheckpointError: the files do not hold exactly such a tree.
    """
    _check(checkpointer, path, abstract, partial=False)
    with _said(path):
        return checkpointer.restore(path, abstract)


def read_all(checkpointer: ocp.StandardCheckpointer, path: Any) -> Any:
    """The tree that lies at a path as it is: dicts and lists of arrays on the first device.

    Raises:
        CheckpointError: the files cannot be read.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def described(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    with _said(path):
        tree = checkpointer.metadata(path).item_metadata.tree
        return checkpointer.restore(path, jax.tree.map(described, tree))


def read_part(checkpointer: ocp.StandardCheckpointer, path: Any, abstract: dict) -> dict[str, Any]:
    """Some fields of the tree that lies at a path; the others are not read.

    Raises:
        CheckpointError: the files do not hold them.
    """
    _check(checkpointer, path, abstract, partial=True)
    placed = ocp.checkpoint_utils.construct_restore_args(abstract)
    arguments = ocp.args.PyTreeRestore(item=abstract, restore_args=placed, partial_restore=True)
    with _said(path), ocp.PyTreeCheckpointer() as reader:
        return reader.restore(path, args=arguments)


@contextlib.contextmanager
def _said(path: Any) -> Iterator[None]:
    """Whatever the storage library raises becomes one line."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path} could not be read: {error}") from error


def _check(checkpointer: Any, path: Any, abstract: Any, partial: bool) -> None:
    """Compares shapes and dtypes with what is expected, before anything is read.

    Raises:
        CheckpointError: names leaves that are missing, not expected, or differ.
    """
    try:
        saved = leaves(checkpointer.metadata(path).item_metadata.tree)
    except Exception as error:
        raise CheckpointError(f"{path} holds no state: {error}") from error
    expected, wrong = leaves(abstract), []
    for name, leaf in expected.items():
        want = f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
        if name not in saved:
            wrong.append(f"{name} is missing, expected {want}")
            continue
        storage = saved[name].storage
        found = f"{np.dtype(saved[name].dtype)}{list(saved[name].shape)}"
        if found != want:
            wrong.append(f"{name} is {found}, expected {want}")
        elif storage and math.prod(storage.chunk_shape or ()) > max(1, math.prod(leaf.shape)):
            wrong.append(f"{name} is stored in chunks of {list(storage.chunk_shape)}")
    if not partial:
        wrong += [f"{name} is not expected" for name in saved if name not in expected]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise CheckpointError(
            f"{path} does not hold the state of this config: {'; '.join(wrong[:NAMED])}{more}"
        )
