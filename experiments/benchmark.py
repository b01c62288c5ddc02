"""Measures this machine.

    python -m experiments.benchmark --suite=dense
    python -m experiments.benchmark --suite=variants --json=figures.json

dense: one training step of the peer shape (4 layers, D 256, 8 query and 4 key/value heads of 64,
SwiGLU 768, vocabulary 4096, tied, float32, batch 8 x 256, AdamW) here and in transformers on
PyTorch (extra: interop), each in a process of its own, taking turns, so that a noisy machine is
noisy for all. PyTorch gets the settings of the C library that commands here give themselves;
torch.compile is also measured without them, as it starts elsewhere. moe: the same with 16 experts
of 192, 4 active, after 30 steps, then the expert computation alone against one dense feed-forward
on the same rows. decode: 128 greedy tokens after a prompt of 32, here and by transformers'
generate, then the cost of one token against the length of the cache for every projection. variants:
what each projection and mixer costs at the paper's 0.8B-6.6B attention, counted and not timed.
startup: seconds from the command to the first step of configs/kha_tiny.py, cold and with a warm
compilation cache. saving: how long training waits for a checkpoint of 100M parameters with AdamW's
moments, in the call and in the step after it, how long the save takes in all, and its checksums.
evaluate: requests of benchmarks and texts, answered here and by lm-eval's back end for transformers
(extras: eval, hf, interop) with one model of the peer shape, or with that of --stock; what is
padded and compiled, and the memory that requests take. scaling: step time and memory of ways for
heads to interact against the length of a row, with what the accounting predicts, and a figure
(extra: plots); the one suite that takes --config. convert: importing and exporting a stock folder
of 2 GB, beside a copy of it with a checksum, and `convert import` of 135M parameters from the
command to the run folder. data: reading shards, against their windows one at a time; making them of
--megabytes of text, against `tokenizers` alone (extras: hf, data); the memory of both; and how long
kha_tiny waits for batches. device: what only a GPU or TPU can show (its fused attention and
ragged_dot against plain formulas, MFU of the 0.6B model, decoding), in minutes.
Nothing here is a test; the figures go into docs/performance.md with the machine's name.
"""

import json
import os
import statistics
from typing import IO, Any

from absl import flags
from ml_collections import config_flags
from rich.table import Table

from experiments.cli import command_line, terminal
from experiments.cli.codes import UsageError
from experiments.run_folders import stored
from experiments.timing import peers, turns

command_line.define_config()
SUITE = flags.DEFINE_enum(
    "suite",
    "dense",
    "dense moe decode variants startup saving scaling evaluate convert data device".split(),
    "What to measure.",
)
ROUNDS = flags.DEFINE_integer("rounds", 12, "Turns of each implementation.", lower_bound=1)
TORCH_COMPILE = flags.DEFINE_bool(
    "torch_compile", True, "Also measure torch.compile (about 30 s to compile)."
)
SAVE_TO = flags.DEFINE_string(
    "save_to", None, "Folder on the disk that `saving`, `convert` and `data` measure."
)
MEGABYTES = flags.DEFINE_integer(
    "megabytes", 10, "Text that `data` tokenises; others of its rows take up to 40 times that.", 1
)
STOCK = flags.DEFINE_string(
    "stock", None, "Folder of Hugging Face's with a tokenizer, whose model `evaluate` asks."
)
LENGTHS = flags.DEFINE_list(
    "lengths", ["256", "512", "1024", "2048", "4096"], "Tokens of a row, in `scaling`."
)
OUT = flags.DEFINE_string("out", "figures", "Folder of the figure of `scaling`.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

# Flags that some suites take; the others refuse them.
TAKEN_BY = {
    "config": ("scaling",),
    "lengths": ("scaling",),
    "out": ("scaling",),
    "save_to": ("saving", "convert", "data"),
    "megabytes": ("data",),
    "torch_compile": ("dense", "moe"),
    "rounds": ("dense", "moe", "decode", "saving", "scaling", "evaluate", "data", "device"),
    "stock": ("evaluate",),
}
LEVELLED = 30  # steps after which a mixture's experts have nearly equal loads; 13% slower at first
VARIANTS = {"baseline": "baseline", "KHA-MLP on v": "mlp", "KHA-Linear on q, k, v": "linear"}


def dense(mixture: bool = False) -> dict[str, Any]:
    """See the module's docstring; its `moe` with `mixture`."""
    makers = {
        "matmul 2048^3": (peers.matmul_step,),
        **{name: (peers.training_step, v, mixture) for name, v in VARIANTS.items()},
        "transformers eager": (peers.transformers_step, False, mixture),
    }
    plain = "transformers torch.compile, its own malloc"
    if TORCH_COMPILE.value:
        compiled = (peers.transformers_step, True, mixture)
        makers |= {"transformers torch.compile": compiled, plain: compiled}
    settled = LEVELLED if mixture else turns.SETTLED
    results = turns.apart(makers, ROUNDS.value, plain=(plain,), settled=settled)
    matmul = results.pop("matmul 2048^3")
    rate = 2 * 2048**3 / matmul["median"]
    tokens = peers.BATCH * peers.LENGTH

    flops = {
        name: peers.peer_run(variant, mixture).cost().training_flops * tokens
        for name, variant in VARIANTS.items()
    }
    table = Table(
        title=f"training step, peer shape, {machine()}; matmul rate {rate / 1e9:.0f} GFLOP/s"
    )
    for column in (
        "",
        "median ms",
        "minimum ms",
        "CPU ms",
        "first step s",
        "GFLOP/s",
        "of matmul rate",
        "time / baseline",
    ):
        table.add_column(column, justify="right")
    for name, row in results.items():
        achieved = flops.get(name, flops["baseline"]) / row["median"]
        row.update(
            gflops=achieved / 1e9,
            matmul_share=achieved / rate,
            ratio=row["median"] / results["baseline"]["median"],
        )
        cells = [f"{row[key] * 1e3:.0f}" for key in ("median", "minimum", "cpu")]
        table.add_row(
            name,
            *cells,
            f"{row['first']:.1f}",
            f"{row['gflops']:.0f}",
            f"{row['matmul_share']:.0%}",
            f"{row['ratio']:.3f}",
        )
    terminal.show(table)
    return {"matmul_gflops": rate / 1e9, **results}


def expert_kernels() -> dict[str, Any]:
    """Median time of each kernel over that of one dense feed-forward on the same rows."""
    table = Table(
        title=(
            "experts, forward and backward, times one dense feed-forward on the same rows, "
            f"{machine()}"
        )
    )
    out: dict[str, Any] = {}
    for column in ("experts, active", "dense ms", "blocked ms", "blocked", "its minimum", "ragged"):
        table.add_column(column, justify="right")
    for E, K in ((16, 4), (64, 4), (128, 8)):
        makers = {kernel: (peers.expert_step, kernel, E, K) for kernel in ("dense", "blocked")}
        rows = turns.apart(makers, ROUNDS.value)
        # minutes at 128 experts: one turn says enough
        slow = turns.apart({"ragged": (peers.expert_step, "ragged", E, K)}, 1, settled=0)
        base = rows["dense"]
        ratios = [f"{rows['blocked'][key] / base[key]:.2f}" for key in ("median", "minimum")]
        times = [f"{rows[name]['median'] * 1e3:.0f}" for name in ("dense", "blocked")]
        table.add_row(
            f"{E}, {K}", *times, *ratios, f"{slow['ragged']['median'] / base['median']:.0f}"
        )
        out[f"{E}, {K}"] = {**rows, **slow}
    terminal.show(table)
    return out


def decode() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.timing import caches

    out: dict[str, Any] = {}
    for batch in (1, 8):
        makers = {
            **{name: (peers.generation, variant, batch) for name, variant in VARIANTS.items()},
            **{
                f"transformers, {c} cache": (peers.transformers_generation, c, batch)
                for c in ("dynamic", "static")
            },
        }
        results = turns.apart(makers, ROUNDS.value)
        theirs = [row["median"] for name, row in results.items() if name.startswith("transformers")]
        table = Table(
            title=(
                f"greedy decoding, prompt {peers.PROMPT}, {peers.NEW} new, batch {batch}, "
                f"{machine()}"
            )
        )
        for column in ("", "new tokens/s", "best tokens/s", "times the faster generate"):
            table.add_column(column, justify="right")
        for name, row in results.items():
            row["tokens_per_second"], best = (
                batch * peers.NEW / row["median"],
                batch * peers.NEW / row["minimum"],
            )
            ratio = f"{min(theirs) / row['median']:.2f}" if theirs else "?"
            table.add_row(name, f"{row['tokens_per_second']:.0f}", f"{best:.0f}", ratio)
        terminal.show(table)
        out[f"batch {batch}"] = results
    table, by_length = caches.measured(ROUNDS.value, machine())
    terminal.show(table)
    return {**out, "cache": by_length}


def machine() -> str:
    """Hardware and version that the figures belong to."""
    import jax

    from kha_jax.hardware import chips

    return f"{chips.hardware()}, jax {jax.__version__}"


def moe() -> dict[str, Any]:
    """See the module's docstring."""
    return {**dense(mixture=True), "experts": expert_kernels()}


def startup() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.timing import waits

    seconds = {}
    for run, seconds[run] in waits.first_steps():
        terminal.say(f"{run}: first step {seconds[run]:.1f} s after the command, {machine()}")
    return seconds


def saving() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.timing import waits

    out = waits.saves(ROUNDS.value, SAVE_TO.value)
    names = "call", "step", "total", "checksums"
    call, step, total, checksums = (statistics.median(out[name]) for name in names)
    terminal.say(
        f"a save of {out['bytes'] / 1e9:.1f} GB takes {total:.2f} s, median of {ROUNDS.value}, "
        f"{machine()}: training waits {call:.2f} s for the call ({call / total:.1%}) and "
        f"{step:.2f} s more in the step after it ({step / total:.1%}); checksums take "
        f"{checksums:.2f} s ({checksums / total:.1%})"
    )
    return out


def variants() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.timing import costs

    tables, out = costs.tables()
    for table in tables:
        terminal.show(table)
    return out


def scaling() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.timing import scaling
    from kha_jax.training.run_config import RunConfig

    out = stored.local_folder("out", OUT.value)
    return scaling.run(command_line.parse_config(RunConfig), LENGTHS.value, ROUNDS.value, out)


def evaluate() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.timing import asked

    def tell(what: Any) -> None:
        terminal.show(what) if isinstance(what, Table) else terminal.say(what)

    stock = None if STOCK.value is None else stored.local_folder("stock", STOCK.value)
    return asked.measured(stock, ROUNDS.value, machine(), tell)


def convert() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.timing import converting

    out = converting.measured(SAVE_TO.value)
    said = [
        f"{name} {out[name]:.1f} s ({out[copy] / out[name]:.2f} of the speed of that copy), "
        f"{out[f'{name}_memory'] / out['largest']:.2f} times the largest tensor beside the arrays"
        for name, copy in (("import", "copy"), ("export", "copy_to_disk"))
    ]
    terminal.say(
        f"a folder of {out['bytes'] / 1e9:.1f} GB, {machine()}: a copy with checksum "
        f"{out['copy']:.1f} s, on the disk {out['copy_to_disk']:.1f} s; {'; '.join(said)}; "
        f"convert import of 135M parameters {out['command']:.1f} s"
    )
    return out


def data() -> dict[str, Any]:
    """See the module's docstring."""
    from experiments.timing import loading

    matmul = turns.apart({"matmul": (peers.matmul_step,)}, ROUNDS.value)["matmul"]
    rate = 2 * 2048**3 / matmul["median"] / 1e9
    title = f"data, {machine()}; matmul rate {rate:.0f} GFLOP/s"
    table, out = loading.table(title, SAVE_TO.value, MEGABYTES.value, ROUNDS.value)
    terminal.show(table)
    return {"matmul_gflops": rate, **out}


def device() -> dict[str, Any]:
    """See the module's docstring."""
    import jax

    from experiments.timing import device

    if jax.default_backend() == "cpu":
        terminal.say(f"skipped: there is no GPU or TPU here, only {machine()}")
        return {}
    table, out = device.measured(device.full(), ROUNDS.value, machine())
    terminal.show(table)
    return out


SUITES = {
    "dense": dense,
    "moe": moe,
    "decode": decode,
    "variants": variants,
    "startup": startup,
    "saving": saving,
    "scaling": scaling,
    "evaluate": evaluate,
    "convert": convert,
    "data": data,
    "device": device,
}


def json_file(mode: str) -> IO[str]:
    """The file of --json."""
    try:
        return open(JSON.value or os.devnull, mode)
    except OSError as error:
        raise UsageError(f"--json={JSON.value} cannot be written: {error.strerror}") from None


def check_flags() -> None:
    """Flags that do nothing in this suite are refused."""
    config = flags.FLAGS["config"]
    given = {name for name in TAKEN_BY if flags.FLAGS[name].present}
    given |= {"config"} if config_flags.get_override_values(config) else set()
    for name in sorted(given):
        if SUITE.value not in TAKEN_BY[name]:
            owners = " and ".join(TAKEN_BY[name])
            problem = f"does nothing with --suite={SUITE.value}; it belongs to {owners}"
            raise UsageError(f"--{name}: {problem}")
    command_line.refuse_empty(JSON)
    if SAVE_TO.value is not None and not stored.local_folder("save_to", SAVE_TO.value).is_dir():
        raise UsageError(f"--save_to={SAVE_TO.value}: is no folder; name one that is there")


def main() -> None:
    """Runs one suite."""
    check_flags()
    json_file("a").close()  # before minutes of measuring
    figures = SUITES[SUITE.value]()
    with json_file("w") as file:
        json.dump(figures, file, indent=1)


if __name__ == "__main__":
    command_line.run(main)
