"""Models of one budget: as many parameters, FLOPs or cached numbers as a baseline, by the one size
that is free.

Parameters and FLOPs are met by the width of the feed-forward (of each expert, in a mixture), the
cache by what the projection makes it of (`Projection.cache_fields`).
"""

import operator
from typing import Any, Callable, NamedTuple, Sequence

from kha_jax.accounting import Accounting
from kha_jax.attention import AttentionConfig
from kha_jax.config import ConfigError
from kha_jax.inference.folding import foldable
from kha_jax.model import ModelConfig
from kha_jax.ops.attention import best_kernel

# What may be matched, as figures of the accounting.
MEASURES: dict[str, Callable[[Accounting], float]] = {
    "params": operator.attrgetter("parameters"),
    "flops": operator.attrgetter("training_flops"),
    "cache": operator.attrgetter("cache_floats"),
}
TOLERANCE = 0.005  # relative: what is further from the budget does not meet it
LARGEST = 4096  # size of a cache field
Count = Callable[[ModelConfig], Accounting]


class Fit(NamedTuple):
    """A model brought to a budget.

    sizes: the fields that were solved, below config.model, with their values. errors: by measure,
    (what it has - the budget) / the budget.
    """

    model: ModelConfig
    sizes: dict[str, int]
    errors: dict[str, float]


def fit(
    model: ModelConfig,
    budget: Accounting,
    measures: Sequence[str],
    count: Count,
    keep: Sequence[str] = (),
    multiple: int = 1,
) -> Fit:
    """The model whose free sizes bring it nearest to the budget.

    Args:
        measures: of MEASURES, the cache before others: what is cached decides what is left for the
            feed-forward. `params` and `flops` exclude each other.
        count: the accounting of a model.
        keep: cache fields that are what makes the model what it is.
        multiple: of which feed-forward widths are.

    Raises:
        ConfigError: no size of the free field comes near; the field and the budget are named.
    """
    sizes: dict[str, int] = {}
    for measure in sorted(measures, key=list(MEASURES).index, reverse=True):
        amount = MEASURES[measure]
        target = amount(budget)

        def error(model, amount=amount, target=target):
            return amount(count(model)) / target - 1

        solve = _cache if measure == "cache" else _feed_forward
        model, changed = solve(model, error, keep if measure == "cache" else multiple)
        sizes |= changed
    have = count(model)
    errors = {name: MEASURES[name](have) / MEASURES[name](budget) - 1 for name in measures}
    return Fit(model, sizes, errors)


def _feed_forward(model, error, multiple) -> tuple[ModelConfig, dict[str, int]]:
    """Bisects the width, of which parameters and FLOPs are increasing functions."""

    def at(units):
        return model.replace(feed_forward=model.feed_forward.replace(width=units * multiple))

    smallest = error(at(1))
    if smallest > TOLERANCE:
        raise ConfigError(
            "feed_forward.width",
            f"cannot be small enough: {multiple} leaves the model {smallest:.1%} above the budget",
        )
    low, high = 1, 2
    while error(at(high)) < 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error(at(middle)) < 0 else (low, middle)
    best = min((low, high), key=lambda units: abs(error(at(units))))
    return at(best), {"feed_forward.width": best * multiple}


def _cache(model, error, keep) -> tuple[ModelConfig, dict[str, int]]:
    """The first cache field that meets the budget, or the one that comes nearest."""
    if abs(error(model)) <= TOLERANCE:
        return model, {}
    found = []
    for field in model.attention.projection.cache_fields:
        options = [] if field in keep else _variations(model, field, error)
        found += [min(options, key=operator.itemgetter(0))] if options else []
    if not found:
        raise ConfigError(
            "attention.projection", "has no size that is free to change what is cached"
        )
    meets = [option for option in found if option[0] <= TOLERANCE]
    _, field, value, fitted = (meets or sorted(found, key=operator.itemgetter(0)))[0]
    return fitted, {f"attention.projection.{field}": value}


def _variations(model: ModelConfig, field: str, error) -> list[tuple[float, str, int, ModelConfig]]:
    """(how far from the budget, field, value, model) for every value of a projection's field that
    makes a model, in all layers, up to the first that is beyond the budget."""
    out = []
    for value in range(1, LARGEST + 1):

        def change(attention: AttentionConfig, value: int = value) -> AttentionConfig:
            return attention.replace(projection=attention.projection.replace(**{field: value}))

        try:
            changed = model.with_attention(change)
        except ConfigError:
            continue
        off = error(changed)
        out.append((abs(off), field, value, changed))
        if off >= 0:
            break
    return out


def fused_kernel(attention: AttentionConfig, platform: str, dtype: Any, length: int) -> str | None:
    """The fused kernel that `auto` takes there, or None."""
    kernel = best_kernel(attention.case(platform, dtype, length))
    return None if kernel == "chunked" else kernel


def folds(attention: AttentionConfig) -> bool | None:
    """Whether its stream mixers fold into the weights; None where it has none."""
    try:
        return True if foldable(attention) else None
    except ConfigError:
        return False
