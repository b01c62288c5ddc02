"""What a run would cost on a TPU pod: the real train step compiled ahead of time for chips that are
not there, a roofline, and the step to expect.

Memory is XLA's own analysis of the compiled step. FLOPs come from the accounting, since XLA counts
a loop's body once. Times are of `kha_jax.planning.times`.
"""

from kha_jax.planning.memory import has_libtpu
from kha_jax.planning.plans import Plan, placed, plan
from kha_jax.planning.search import Setting, faster, fastest, remedies
from kha_jax.planning.slices import SliceError, Topology, topology
from kha_jax.planning.times import EFFICIENCY

__all__ = [
    "EFFICIENCY",
    "Plan",
    "Setting",
    "SliceError",
    "Topology",
    "faster",
    "fastest",
    "has_libtpu",
    "placed",
    "plan",
    "remedies",
    "topology",
]
