"""Controls of the paper's claims, in the run of table 2: what of knocking comes from where its
matrices start, how they are decayed and trained, and that heads share them.

    python -m experiments.train --config=configs/controls.py:linear_random.tiny --workdir=runs/T
    python -m experiments.sweep --table=controls --scale=tiny --seeds=3 --out=runs/controls

Rows, baseline, which is also the twin into which linear folds at the start, and with three and ten
times the learning rate of its value projection; linear (on queries, keys and values); its T without
decay, decayed towards I, with a tenth and with ten times the learning rate; T random (the paper
says that it fails, section 3.3); T zero; T stored as I + D; a matrix for each head instead of one
for all; mlp (on values), and its own without decay and with ten times the learning rate.
"""

from typing import Any

from configs import base, tables
from kha_jax.attention.mixers import KnockingLinear, KnockingMLP, StreamMixer, UnsharedLinear


def row(mixers: dict[str, StreamMixer], loss: float | None = None, **training: Any) -> tables.Row:
    """A run with these mixers, whose matrices are trained in this way."""
    run = base.paper_run("moe_7b", tables.EXPLORED_TOKENS, base.PAPER_ATTENTION.replace(**mixers))
    rule = run.optimizer.mixer.replace(**training)
    return tables.Row(run.replace(optimizer=run.optimizer.replace(mixer=rule)), loss=loss)


def values_at(factor: float) -> tables.Row:
    """The baseline with so many times the learning rate of its value projection."""
    run = row({}).run
    optimizer = run.optimizer.replace(value_learning_rate_multiplier=factor)
    return tables.Row(run.replace(optimizer=optimizer))


def everywhere(mixer: StreamMixer) -> dict[str, StreamMixer]:
    """On queries, keys and values."""
    return dict.fromkeys(("query", "key", "value"), mixer)


LINEAR, MLP = everywhere(KnockingLinear()), {"value": KnockingMLP()}
TABLE = tables.Table(
    "Controls: start, decay, learning rate and sharing of the knocking matrices",
    {
        "baseline": row({}, 1.856),
        "values_three_times": values_at(3.0),
        "values_fast": values_at(10.0),
        "linear": row(LINEAR, 1.838),
        "linear_no_decay": row(LINEAR, decay="none"),
        "linear_to_identity": row(LINEAR, decay="to_identity"),
        "linear_slow": row(LINEAR, learning_rate_multiplier=0.1),
        "linear_fast": row(LINEAR, learning_rate_multiplier=10.0),
        "linear_no_decay_fast": row(LINEAR, decay="none", learning_rate_multiplier=10.0),
        "linear_random": row(everywhere(KnockingLinear(init="normal"))),
        "linear_zero": row(everywhere(KnockingLinear(diag_init=0.0))),
        "linear_residual": row(everywhere(KnockingLinear(parameterization="residual"))),
        "unshared": row(everywhere(UnsharedLinear())),
        "mlp": row(MLP, 1.832),
        "mlp_no_decay": row(MLP, decay="none"),
        "mlp_fast": row(MLP, learning_rate_multiplier=10.0),
        "mlp_no_decay_fast": row(MLP, decay="none", learning_rate_multiplier=10.0),
    },
)
get_config = TABLE.get_config
