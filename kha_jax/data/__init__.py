"""Data: sources of fixed-length windows, and the loader that turns them into batches by (seed,
step) alone."""

from kha_jax.data.loader import (
    DataConfig,
    Draws,
    Example,
    Source,
    batch_hash,
    batches,
    check_length,
    each_once,
    rows_of,
    window_order,
)
from kha_jax.data.python_source import PythonSource
from kha_jax.data.shards import Shards
from kha_jax.data.synthetic import (
    CompositionalRecall,
    KHopInduction,
    MultiQueryAssociativeRecall,
    NeedleRetrieval,
    RelationalGraph,
    SelectiveCopy,
)

TASKS = {
    "mqar": MultiQueryAssociativeRecall,
    "compositional_recall": CompositionalRecall,
    "k_hop": KHopInduction,
    "selective_copy": SelectiveCopy,
    "needle": NeedleRetrieval,
    "relational_graph": RelationalGraph,
}
SOURCES = {"python_source": PythonSource, "shards": Shards, **TASKS}

__all__ = [
    "SOURCES",
    "TASKS",
    "CompositionalRecall",
    "DataConfig",
    "Draws",
    "Example",
    "KHopInduction",
    "MultiQueryAssociativeRecall",
    "NeedleRetrieval",
    "PythonSource",
    "RelationalGraph",
    "SelectiveCopy",
    "Shards",
    "Source",
    "batch_hash",
    "batches",
    "check_length",
    "each_once",
    "rows_of",
    "window_order",
]
