"""Data: sources of fixed-length windows, and the loader that turns them into batches by (seed,
step) alone."""

from kha_jax.data.loader import (
    DataConfig,
    DataError,
    Example,
    Source,
    StorageError,
    batch_hash,
    batches,
    check_length,
    each_once,
    window_order,
)
from kha_jax.data.python_source import PythonSource
from kha_jax.data.synthetic import MultiQueryAssociativeRecall

SOURCES = {"python_source": PythonSource, "mqar": MultiQueryAssociativeRecall}

__all__ = [
    "SOURCES",
    "DataConfig",
    "DataError",
    "Example",
    "MultiQueryAssociativeRecall",
    "PythonSource",
    "Source",
    "StorageError",
    "batch_hash",
    "batches",
    "check_length",
    "each_once",
    "window_order",
]
