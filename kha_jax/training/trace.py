"""What is traced of the mixers' matrices while a run trains."""

from typing import Any

import jax
import jax.numpy as jnp

from kha_jax.model import ModelConfig
from kha_jax.ops import matrices

TRACE = "knocking/"  # what the names of the trace's metrics begin with
MEASURES = (
    matrices.identity_distance,
    matrices.diagonal_mean,
    matrices.off_diagonal_share,
    matrices.spectral_norm,
)


def trace(model: ModelConfig, params: Any) -> dict[str, jax.Array]:
    """How far every matrix of a mixer has come, one number a layer: `identity_distance` (of T - I;
    a gate starts at 0 and so at 1), `diagonal_mean`, `off_diagonal_share` and `spectral_norm` under
    `knocking/SEGMENT/SLOT/MATRIX/`, such as `knocking/layers/value/kernel/diagonal_mean`.

    Measured is what the parameters stand for (`effective` of each mixer); where each head has a
    matrix of its own, the numbers are their means. What is no matrix is not traced. See
    `ops.matrices`.
    """
    found = {}
    for segment in model.segments():
        mixers = segment.attention.effective(params[segment.name]["attention"])
        for slot, (_, effective) in mixers.items():
            for name, T in effective.items():
                if T.ndim < 3:
                    continue
                where = f"{TRACE}{segment.name}/{slot}/{name}"
                for measure in MEASURES:
                    value = measure(T.astype(jnp.float32)).reshape(len(T), -1).mean(-1)
                    found[f"{where}/{measure.__name__}"] = value
    return found
