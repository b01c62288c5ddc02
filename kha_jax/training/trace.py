"""What is traced of the mixers' matrices while a run trains."""

from typing import Any

import jax
import jax.numpy as jnp

from kha_jax.ops import matrices

TRACE = "knocking/"  # what the names of the trace's metrics begin with


def trace(params: Any, role: Any) -> dict[str, jax.Array]:
    """How far every matrix of a mixer has come, one number a layer: `identity_distance` (of T - I;
    a gate starts at 0 and so at 1), `diagonal_mean`, `off_diagonal_share` and `spectral_norm` under
    `knocking/SEGMENT/PLACE/MATRIX/`, such as `knocking/layers/value/kernel/diagonal_mean`.

    A `residual` D is measured as the I + D that it stands for; where each head has a matrix of its
    own, the numbers are their means. See `ops.matrices`.
    """
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), name in zip(leaves, jax.tree.leaves(role), strict=True):
        keys = [str(key.key) for key in path]
        if name != "mixer" or not keys[-2].endswith("_mixer"):
            continue
        parts = [key.removesuffix("_mixer") for key in keys]
        T = leaf.astype(jnp.float32)
        T = T + jnp.eye(*T.shape[-2:]) if parts[-1] == "residual" else T
        where = TRACE + "/".join(part for part in parts if part != "attention")
        for measure in (
            matrices.identity_distance,
            matrices.diagonal_mean,
            matrices.off_diagonal_share,
            matrices.spectral_norm,
        ):
            found[f"{where}/{measure.__name__}"] = measure(T).reshape(len(T), -1).mean(-1)
    return found
