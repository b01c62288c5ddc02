"""What the heads learnt: from a run folder to arrays (`leaves`, `reading`, `models`), numbers
(`measures`) and figures (`figures` of matrices, `heads`, `curves` of runs, all in one `style`); and
from a sweep folder to what it says (`sweeps`, `comparisons`)."""

from kha_jax.analysis import comparisons, costs, curves, figures, heads, measures, style, sweeps
from kha_jax.analysis.leaves import Checkpoint
from kha_jax.analysis.models import streams, variants
from kha_jax.analysis.reading import Run, read_metrics, trace

__all__ = [
    "Checkpoint",
    "Run",
    "comparisons",
    "costs",
    "curves",
    "figures",
    "heads",
    "measures",
    "read_metrics",
    "streams",
    "style",
    "sweeps",
    "trace",
    "variants",
]
