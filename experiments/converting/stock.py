"""Stock checkpoints become runs, and runs become stock checkpoints."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any, Iterator

import jax
import numpy as np

from experiments.cli import settings
from experiments.cli.codes import UsageError
from experiments.converting.written import being_written, new_folder, write_run
from experiments.run_folders import stored
from kha_jax import convert
from kha_jax.config import ConfigError, differences
from kha_jax.convert import agreement, own_code
from kha_jax.convert.families import function_of
from kha_jax.convert.folders import BESIDE
from kha_jax.convert.stock import Record, Stock
from kha_jax.data import Shards, tokenizer_files, tokenizers
from kha_jax.errors import DataError
from kha_jax.feed_forward.moe import BIAS_RULES
from kha_jax.inference.dialect import STOCK
from kha_jax.mesh import make_mesh
from kha_jax.model import AttentionFrom, ModelConfig, SameAttention
from kha_jax.runs.arrays import leaves as by_path
from kha_jax.storage import write_json
from kha_jax.training.run_config import OptimizerConfig, RunConfig
from kha_jax.training.run_folder import IDENTITY, config_hash, read_run
from kha_jax.training.step import abstract_variables, initial_leaves

LENGTH = 2048  # tokens of a row, at most, that an imported run is trained on by default
RATE = 1e-4  # learning rate of an imported run by default: its weights are trained already
SIZES = {"MB": 10**6, "GB": 10**9}

log = logging.getLogger("kha_jax")


SLOTS = ("query", "key", "value", "logits", "probabilities", "output")


# ------------------------------------------------------------------ in


def import_run(model: str | None, out: str | None, changes: list[str], verify: bool) -> None:
    """See `experiments.convert`."""
    target = new_folder(out)
    stock = convert.open_stock(stored.local_folder("model", model))
    config = settings.with_settings(run_config(stock), changes, "set")
    check_inserted(stock, config.model, verify)
    tell(stock)
    tokenizer = tokenizer_of(stock.folder.path, stock.folder.config)
    leaves = placed(stock, config, make_mesh(config.mesh))
    if verify and can_verify():
        check_import(stock, config.model, leaves := list(leaves), tokenizer)
    elif not starts_as_stock(config.model):
        tell_change(stock, config.model, leaves := list(leaves), tokenizer)
    own = tokenizer and tokenizer.fingerprint
    unread = dict.fromkeys(IDENTITY) | {"config": config_hash(config), "tokenizer": own}
    with being_written(target) as made:
        convert.keep(stock, made / STOCK)
        if tokenizer is not None:
            tokenizer_files.keep(made, tokenizer)
        write_json(made / "lineage.json", [{**unread, "from_step": 0, "changes": {}}])
        write_run(made, config, 0, leaves, {**unread, "converted_from": str(stock.folder.path)})
    print(
        f"{target} is {stock.kind} with {len(stock.folder.tensors):,} tensors at step 0"
        f"{inserted(config.model)}; train it with python -m experiments.train --workdir={target}"
    )


def tell(stock: Stock) -> None:
    """What of the folder is not taken."""
    if stock.skipped:
        names = ", ".join(stock.skipped[:5])
        log.info(
            "not read: %d tensors that the model has no use for, as %s", len(stock.skipped), names
        )
    if unknown := stock.folder.unknown():
        log.info("not copied: %s", ", ".join(unknown))
    if "auto_map" in stock.folder.config:
        log.warning("config.json: auto_map names code, which is not run")


def tokenizer_of(path: Path, config: dict[str, Any]) -> Any | None:
    """That of a stock folder; None, with the reason logged, where there is none that is read."""
    if not (path / tokenizers.FILE).is_file():
        log.info("%s: holds no %s, so that the run has no text", path, tokenizers.FILE)
        return None
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    try:
        return tokenizers.load(path, end=end if type(end) is int else None)
    except (ConfigError, DataError) as error:
        log.warning("%s: is not read: %s", path / tokenizers.FILE, error)
        return None


def run_config(stock: Stock) -> RunConfig:
    """The config of a run that goes on from a stock model."""
    longest = stock.folder.config.get("max_position_embeddings") or LENGTH
    return RunConfig(
        model=stock.model,
        seq_len=min(LENGTH, longest),
        data=Shards(),
        optimizer=OptimizerConfig(learning_rate=RATE),
    )


def check_inserted(stock: Stock, model: ModelConfig, verify: bool) -> None:
    """Raises UsageError where --set makes another model of it, or one that does not start as it."""
    if has_bias(stock.model) and not has_bias(model):
        raise UsageError(
            "--set=config.model.feed_forward.balancing: the stock model's routers have biases, "
            f"which only {', '.join(BIAS_RULES)} keep"
        )
    bare = function_of(model.with_attention(without_mixers))
    bare = bare.replace(later=SameAttention())
    for field, (was, now) in differences(function_of(stock.model), bare, "config.model").items():
        raise UsageError(f"--set={field}={now}: the stock model has {was!r}, which is given")
    if isinstance(model.later, AttentionFrom):
        other = differences(
            stock.model.attention, without_mixers(model.later.attention), "config.model.later"
        )
        if other := [field for field in other if not field.endswith("kernel")]:
            raise UsageError(f"--set={other[0]}: the stock model has it otherwise")
    for name, attention in model.attentions().items():
        if verify and not attention.identity_at_start:
            slots = [s for s in SLOTS if not starts_as_identity(attention, s)]
            raise UsageError(
                f"--set=config.model.{name}.{slots[0]}: does not start as the identity, so the "
                "stock model is changed; add --noverify where that is meant"
            )


def has_bias(model: ModelConfig) -> bool:
    """Whether its routers have one."""
    return getattr(model.feed_forward, "balancing", "none") in BIAS_RULES


def starts_as_stock(model: ModelConfig) -> bool:
    """Whether all mixers start as the identity."""
    return all(attention.identity_at_start for attention in model.attentions().values())


def starts_as_identity(attention: Any, slot: str) -> bool:
    """Whether one mixer of an attention does."""
    return without_mixers(attention).replace(**{slot: getattr(attention, slot)}).identity_at_start


def without_mixers(attention: Any) -> Any:
    """The attention as its projection alone makes it."""
    fields = type(attention).__dataclass_fields__
    return attention.replace(**{slot: fields[slot].default for slot in SLOTS})


def inserted(model: ModelConfig) -> str:
    """The mixers of a model, in words."""
    bare = model.with_attention(without_mixers)
    found = differences(bare, model, "config.model").items()
    kinds = [f"{f.removeprefix('config.model.')}={now}" for f, (_, now) in found if ".kind" in f]
    return f" with {', '.join(kinds)}" if kinds else ""


def placed(stock: Stock, config: RunConfig, mesh: Any) -> Iterator[tuple[str, jax.Array]]:
    """Every leaf of the model on the mesh: those of the folder, then those of what was inserted."""
    like = by_path(abstract_variables(config.model, mesh))
    for leaf in stock.leaves(config.model):
        yield leaf.path, leaf.on(like.pop(leaf.path))
    if like:
        yield from initial_leaves(config.model, config.seed, like).items()


# ------------------------------------------------------------------ out


def export_run(
    workdir: str | None,
    out: str | None,
    step: int | None,
    dtype: str | None,
    shard_size: str | None,
    experts: str | None,
    tokenizer: str | None,
    verify: bool,
) -> None:
    """See `experiments.convert`."""
    target, size = new_folder(out), shard_bytes(shard_size)
    run = stored.run_folder("workdir", workdir)
    config, step, variables = read_run(run, step)
    record = convert.read_record(run / STOCK)
    beside = stored.local_folder("tokenizer", tokenizer) if tokenizer else record and record.path
    try:
        model, folded = own_code.fold(config.model, variables)
        kind = convert.kind_for(model, record)
    except ConfigError as error:
        raise UsageError(f"--workdir={workdir}: {error.under('config.model')}") from None
    compared, slots = verify and can_verify(), folded_slots(config.model, model)
    length = longest_of(record, config)
    fused = None if experts is None else experts == "fused"
    how = {"dtype": dtype, "shard_bytes": size, "fused": fused, "length": length}
    with being_written(target) as folder:
        convert.write(folder, model, folded, record, **how)
        if not beside or not copy_beside(beside, folder):
            log.info("no tokenizer files are written; name them with --tokenizer=DIR")
        if compared:
            tokenizer = tokenizer_of(record.path, record.config) if record else None
            before, after = (config.model, variables), (model, folded)
            check_export(folder, before, after if slots else before, length, tokenizer)
    said = f", {', '.join(slots)} folded" if slots else ""
    print(f"{target} is {kind} of step {step}{said}")
    if own_code.kept(model.attention):
        read = f"transformers runs {own_code.FILE} beside them, with trust_remote_code=True"
        print(f"{own_code.why(model.attention)}; {read}")


def folded_slots(before: ModelConfig, after: ModelConfig) -> list[str]:
    """The slots whose mixers are gone."""
    pairs = zip(before.attentions().values(), after.attentions().values())
    gone = {slot for a, b in pairs for slot in SLOTS if getattr(a, slot) != getattr(b, slot)}
    return [slot for slot in SLOTS if slot in gone]


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copies tokenizer files and what else is kept as it is; their names."""
    names = [name for name in BESIDE if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def shard_bytes(size: str | None) -> int | None:
    """What --shard_size says."""
    if size is None:
        return None
    found = re.fullmatch(r"(\d+)(MB|GB)", size)
    if not found or not int(found[1]):
        raise UsageError(f"--shard_size={size}: write a number with MB or GB, such as 5GB")
    return int(found[1]) * SIZES[found[2]]


def longest_of(record: Record | None, config: RunConfig) -> int:
    """The longest text that the model was trained on."""
    known = record.config.get("max_position_embeddings") if record else None
    return known or config.seq_len


# ------------------------------------------------------------------ compared


def can_verify() -> bool:
    """Whether the comparison can be made; says what it needs where it cannot.

    Raises:
        UsageError: it cannot, and --noverify was not said.
    """
    if agreement.can_compare():
        return True
    raise UsageError(f"--verify: {agreement.NEEDS}; go on without by --noverify")


def check_import(
    stock: Stock, model: ModelConfig, leaves: list[tuple[str, jax.Array]], tokenizer: Any
) -> None:
    """Compares the folder, as transformers reads it, with the model that is made of it."""
    if own_code.kept(stock.model.attention):
        raise UsageError("--verify: code of a folder is not run; add --noverify")
    longest = stock.folder.config.get("max_position_embeddings") or LENGTH
    ids = samples(model, longest, tokenizer)
    theirs = agreement.their_logits(stock.folder.path, ids)
    ours = model, convert.nested(leaves)
    compare(theirs, ours, ids, str(stock.folder.path), tokenizer is not None)


def tell_change(
    stock: Stock, model: ModelConfig, leaves: list[tuple[str, jax.Array]], tokenizer: Any
) -> None:
    """Prints how far the model with its mixers is from the one without them."""
    own = [(leaf.path, leaf.array()) for leaf in stock.leaves()]
    ids = samples(model, agreement.SHORT, tokenizer)[0]
    before = agreement.our_logits(stock.model, convert.nested(own), ids)
    after = agreement.our_logits(model, convert.nested(leaves), ids)
    found = agreement.agreement(before, after, tokenizer is not None)
    print(f"the stock model and this run: {found}")


def check_export(folder: Path, before: tuple, folded: tuple, longest: int, tokenizer: Any) -> None:
    """Compares the written folder, as transformers reads it, with what our reader makes of it; says
    what folding and the dtype have changed."""
    ids, text = samples(before[0], longest, tokenizer), tokenizer is not None
    written = convert.open_stock(folder)
    stored_leaves = [(leaf.path, leaf.array()) for leaf in written.leaves()]
    ours = agreement.our_logits(*before, ids[0])
    if folded is not before:
        print(f"folding: {agreement.agreement(ours, agreement.our_logits(*folded, ids[0]), text)}")
    again = written.model, convert.nested(stored_leaves)
    print(f"as stored: {agreement.agreement(ours, agreement.our_logits(*again, ids[0]), text)}")
    own = bool(own_code.kept(written.model.attention))
    theirs = agreement.their_logits(folder, ids, own)
    compare(theirs, again, ids, str(folder), text)


def samples(model: ModelConfig, longest: int, tokenizer: Any) -> list[np.ndarray]:
    """The tokens of both lengths."""
    return [
        agreement.sample(model.vocabulary_size, length, tokenizer)
        for length in agreement.lengths(model, longest)
    ]


def compare(
    theirs: list[np.ndarray], ours: tuple, ids: list[np.ndarray], where: str, text: bool
) -> None:
    """Prints how far apart they are; raises DataError beyond the limit. text: the ids are one."""
    for logits, tokens in zip(theirs, ids):
        found = agreement.agreement(logits, agreement.our_logits(*ours, tokens), text)
        print(f"transformers and this run: {found}; limit {found.limit:g} of the spread")
        if not found.within:
            raise DataError(
                f"{where}: logits differ by {found.share if text else found.most:.2g} of their "
                f"spread, more than {found.limit:g}; nothing written"
            )
