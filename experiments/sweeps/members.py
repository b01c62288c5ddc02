"""What experiments.zoo compares: every way for heads to interact on one config, brought to one
budget, with what its table says of each."""

import logging
from typing import Iterator, NamedTuple, Sequence

from absl import flags
from ml_collections import config_flags

from configs import base
from experiments.cli import command_line, config_files
from experiments.cli.codes import UsageError
from experiments.run_folders import identity
from experiments.sweeps.planned import Wanted
from kha_jax.accounting import Accounting, account, cache_bytes
from kha_jax.attention import AttentionConfig
from kha_jax.comparing.budget import MEASURES, Fit, fit, folds, fused_kernel
from kha_jax.comparing.properties import Layer, collectives_of
from kha_jax.config import ConfigError, near, under
from kha_jax.model import ModelConfig
from kha_jax.training.run_config import RunConfig

log = logging.getLogger("kha_jax")
WAYS = 2  # devices that split the heads where collectives are counted
FAR = 4  # times the baseline's feed-forward, or a share of it, from which on the table says so


class Member(NamedTuple):
    """A run to compare, the cache fields that make it what it is, and the arguments of
    experiments.train that it is a change of, with their config."""

    run: RunConfig
    keep: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    of: RunConfig | None = None

    def line(self) -> list[str]:
        """The arguments of experiments.train that make the run."""
        return [*self.arguments, *identity.settings(self.of, self.run)]


def plain(attention: AttentionConfig) -> AttentionConfig:
    """The projection alone."""
    return AttentionConfig(projection=attention.projection)


def all_members(
    config: RunConfig, add: Sequence[str]
) -> Iterator[tuple[str, Member | ConfigError]]:
    """Every way by name, the baseline first; what the config's projection refuses, with the
    reason. What is added brings its model and how its mixers are trained."""
    named = flags.FLAGS["config"]
    typed = config_flags.get_override_values(named)
    given = (f"--config={named.config_filename}", *(f"--config.{k}={v}" for k, v in typed.items()))
    baseline = config.model.with_attention(plain)
    with under("config"):
        yield "baseline", Member(config.replace(model=baseline), (), given, config)
    attention = baseline.attention

    def varied(name, a):
        others = base.projections(a)
        return others[name]() if name in others else base.varied(a, name)

    for name in (*base.projections(attention), *list(base.variants(attention))[1:]):
        try:
            model = baseline.with_attention(lambda a, name=name: varied(name, a))
        except ConfigError as error:
            yield name, error
        else:
            if model != baseline:
                run = config.replace(model=model)
                yield name, Member(run, base.KEPT.get(name, ()), given, config)
    for named in add:
        path, _, variant = named.partition(":")
        own = command_line.load_variant(RunConfig, path, variant, "--add")
        optimizer = config.optimizer.replace(mixer=own.optimizer.mixer)
        try:
            run = config.replace(model=own.model, optimizer=optimizer)
        except ConfigError as error:
            raise UsageError(f"--add={named}: beside config, {error}") from None
        yield config_files.stem(named), Member(run, (), (f"--config={named}",), own)


def members(config: RunConfig, add: Sequence[str], only: Sequence[str]) -> dict[str, Member]:
    """`all_members`, or those of `only`, the baseline and what is added; the refused ones are
    logged.

    Raises:
        UsageError: a name of `only` is not known, or is added twice.
    """
    found: dict[str, Member] = {}
    known, always = [], {"baseline", *map(config_files.stem, add)}
    for name, member in all_members(config, add):
        if name in known:
            raise UsageError(f"--add: there is a {name} already; rename the file")
        known.append(name)
        if only and name not in always.union(only):
            continue
        if isinstance(member, ConfigError):
            log.info("left out %s: %s", name, member)
        else:
            found[name] = member
    for name in only:
        if name not in known:
            raise UsageError(f"--only={name}: is not known; {near(name, known)}")
    return found


class Row(NamedTuple):
    """A line of the table. identity: whether mixers promise to start as their projection alone,
    None without any. collectives: of a layer's forward pass whose heads are split over WAYS, None
    where they cannot be. loss, difference: of validation, with the half width of their 95%
    intervals over seeds; the difference is that to the baseline, seed by seed."""

    sizes: dict[str, int]
    errors: dict[str, float]
    parameters: int
    active: int
    training_flops: float
    cache_bytes: int
    collectives: dict[str, int] | None
    tpu: str | None
    gpu: str | None
    folds: bool | None
    identity: bool | None
    step_seconds: float | None = None
    decode_seconds: float | None = None
    loss: tuple[float, float | None] | None = None
    difference: tuple[float, float | None] | None = None


def row(run: RunConfig, fitted: Fit, cost: Accounting) -> Row:
    """What a fitted model has."""
    attentions = list(run.model.attentions().values())

    def fused(platform):
        found = {fused_kernel(a, platform, "bfloat16", run.seq_len) for a in attentions}
        return None if None in found else " ".join(sorted(found))

    keeps = all(attention.identity_at_start for attention in attentions)
    can_fold = {folds(attention) for attention in attentions}
    return Row(
        sizes=fitted.sizes,
        errors=fitted.errors,
        parameters=cost.parameters,
        active=cost.active,
        training_flops=cost.training_flops,
        cache_bytes=cache_bytes(run.model),
        collectives=collectives(attentions[-1], run.model.width),
        tpu=fused("tpu"),
        gpu=fused("gpu"),
        folds=False if False in can_fold else True if True in can_fold else None,
        identity=None if all(plain(a) == a for a in attentions) else keeps,
    )


def collectives(attention: AttentionConfig, width: int) -> dict[str, int] | None:
    """See Row."""
    try:
        return dict(collectives_of(Layer(attention, width), WAYS))
    except ConfigError:
        return None


def far_off(width: int, own: int, measures: Sequence[str]) -> str:
    """What to say of a feed-forward that is no longer like the baseline's."""
    matched, what = " and ".join(measures), "wider" if width > own else "narrower"
    return (
        f"is brought to the same {matched} by a feed-forward of {width}, the baseline has {own}: "
        f"more than {FAR} times {what}, which no longer compares attention"
    )


def check_match(measures: Sequence[str]) -> None:
    """Raises UsageError where --match names what cannot be met, or not together."""
    for name in measures:
        if name not in MEASURES:
            raise UsageError(f"--match={name}: is not known; {near(name, MEASURES)}")
    if {"params", "flops"} <= set(measures):
        raise UsageError(
            f"--match={','.join(measures)}: parameters and FLOPs are met by one width; name one "
            "of params, flops, cache, or cache and one of the others"
        )


def brought(
    model: ModelConfig,
    baseline: RunConfig,
    measures: Sequence[str],
    keep: Sequence[str] = (),
    multiple: int = 1,
) -> tuple[Fit, Accounting]:
    """A model brought to what the model of a run costs in that run, with its own cost then; see
    `fit` for the arguments and errors."""

    def count(model: ModelConfig) -> Accounting:
        return account(model, baseline.seq_len, tokens=baseline.tokens_per_step)

    found = fit(model, count(baseline.model), measures, count, keep, multiple)
    return found, count(found.model)


def matched(rows: Sequence[Wanted], measures: Sequence[str]) -> list[Wanted]:
    """The rows of a sweep, each brought to the cost of its baseline by settings behind its own.

    Raises:
        UsageError: a row cannot be brought there.
    """
    runs = {row.name: command_line.config_of(RunConfig, row.arguments) for row in rows}
    out = []
    for row in rows:
        own, baseline = runs[row.name], runs[row.baseline]
        try:
            found, _ = brought(own.model, baseline, measures)
        except ConfigError as error:
            why = f"{row.name} cannot be brought to {row.baseline}: {error.under('config.model')}"
            raise UsageError(f"--match={','.join(measures)}: {why}") from None
        settings = identity.settings(own, own.replace(model=found.model))
        out.append(row._replace(arguments=(*row.arguments, *settings)))
    return out


def fitted(
    found: dict[str, Member], measures: Sequence[str], multiple: int
) -> tuple[Accounting, dict[str, Member], dict[str, Row]]:
    """The baseline's costs, and all members that can be brought to them, with their rows.

    Raises:
        UsageError: the baseline cannot, since widths are multiples of too large a number.
    """
    config, lines, rows = found["baseline"].run, {}, {}
    budget = account(config.model, config.seq_len, tokens=config.tokens_per_step)
    for name, member in found.items():
        try:
            result, cost = brought(member.run.model, config, measures, member.keep, multiple)
        except ConfigError as error:
            if name == "baseline":
                raise UsageError(f"--multiple={multiple}: {error.under('config.model')}") from None
            log.info("left out %s: %s", name, error.under("config.model"))
            continue
        width, own = (m.feed_forward.width for m in (result.model, config.model))
        if not 1 / FAR <= width / own <= FAR:
            log.info("%s: %s", name, far_off(width, own, measures))
        run = config.replace(model=result.model)
        lines[name] = member._replace(run=run)
        rows[name] = row(run, result, cost)
    return budget, lines, rows
