"""What only an accelerator can show, in one script that takes a borrowed one for minutes: its fused
attention and its grouped products of experts against plain formulas, the share of its peak that a
training step of the paper's dense model reaches, and decoding.

On a CPU every part runs at toy size, where the figures say nothing.

Legend: B batch, T length, N query heads, K key/value heads, H head width.
"""

import functools
from typing import Any, Callable, Iterator, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from configs import base
from experiments.timing import turns
from experiments.timing.steps import TrainingStep, decoding_step
from kha_jax.hardware import chips
from kha_jax.ops.attention import Case, attention, best_kernel
from kha_jax.ops.experts import experts
from kha_jax.training.run_config import RunConfig

CLOSE = 0.02  # of the largest number, that bfloat16 may be off
VARIANTS = "baseline", "mlp"
REMAT = "none", "full"


class Sizes(NamedTuple):
    """What is measured. attention: B, T, N, K, H; experts: tokens, width, inner width, experts,
    active ones; run: whose step is timed; decoded: rows, prompt and new tokens of each case."""

    attention: tuple[int, int, int, int, int]
    experts: tuple[int, int, int, int, int]
    run: RunConfig
    decoded: tuple[tuple[int, int, int], ...]


class Agreement(NamedTuple):
    """A kernel beside a plain formula in float32. error: the largest difference of an output or a
    gradient, as a share of the largest number there; seconds: forward and backward."""

    kernel: str
    error: float
    seconds: float


def full() -> Sizes:
    """For an accelerator of 80 GB or more."""
    run = base.paper_run("dense_600m").replace(batch_size=8)
    return Sizes(
        (4, 4096, 16, 4, 128), (16384, 1024, 512, 64, 8), run, ((1, 512, 128), (32, 512, 128))
    )


def measured(sizes: Sizes, rounds: int, machine: str) -> tuple[Table, dict[str, Any]]:
    """All parts, one after another: what does not fit is left out with the reason."""
    table, out = Table(title=machine), {}
    for column in ("", "", "result"):
        table.add_column(column)
    parts: dict[str, Callable[..., Iterator[tuple[str, str, Any]]]] = {
        "attention": attentions,
        "experts": grouped,
        "training": training,
        "decoding": decoding,
    }
    for name, part in parts.items():
        for case, said, figures in part(sizes, rounds):
            table.add_row(name, case, said)
            out[f"{name}, {case}"] = figures
    return table, out


# ---------------------------------------------------------------- kernels
def attentions(sizes: Sizes, rounds: int) -> Iterator[tuple[str, str, Any]]:
    """The platform's kernel, without and with documents in a row."""
    B, T, N, K, H = sizes.attention
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (
        jax.random.normal(key, (B, T, heads, H), jnp.bfloat16)
        for key, heads in zip(keys, (N, K, K, N))
    )
    kernel = best_kernel(Case(jax.default_backend(), q.dtype, T, H, H))
    documents = jnp.arange(T)[None] * 3 // T + jnp.zeros((B, 1), jnp.int32)
    for case, segments in (("one document", None), ("three documents", documents)):
        own = functools.partial(attention, segment_ids_BS=segments)
        yield case, *_beside(own, kernel, "reference", (q, k, v), weight, rounds)


def grouped(sizes: Sizes, rounds: int) -> Iterator[tuple[str, str, Any]]:
    """jax.lax.ragged_dot beside a loop over all experts, and the time of one dense feed-forward."""
    tokens, D, F, E, active = sizes.experts
    draw = np.random.default_rng(0)
    chosen = jnp.asarray(np.argsort(draw.random((tokens, E)), axis=1)[:, :active])

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape) / shape[-2] ** 0.5, jnp.bfloat16)

    x, share, weight = normal(tokens, D), jnp.full((tokens, active), 1 / active), normal(tokens, D)
    weights = normal(E, D, F), normal(E, D, F), normal(E, F, D)

    def own(x, gate, up, down, kernel):
        return experts(x, chosen, share, gate, up, down, kernel=kernel)

    case = f"{E} experts, {active} active"
    yield case, *_beside(own, "ragged", "loop", (x, *weights), weight, rounds)


def _beside(function, kernel, plain, arguments, weight, rounds) -> tuple[str, Agreement]:
    """The function with one kernel in bfloat16, and with a plain one in float32: outputs, gradients
    of their sum under the weight, and the time of the first."""

    def gradients(kernel, weight, *arguments):
        def value(*arguments):
            out = function(*arguments, kernel=kernel)
            return jnp.sum((out * weight).astype(jnp.float32)), out

        every = tuple(range(len(arguments)))
        return jax.value_and_grad(value, argnums=every, has_aux=True)(*arguments)

    run = jax.jit(gradients, static_argnums=0)
    (_, out), found = run(kernel, weight, *arguments)
    exact = [z.astype(jnp.float32) for z in (weight, *arguments)]
    with jax.default_matmul_precision("highest"):
        (_, expected), others = run(plain, *exact)
    pairs = zip((out, *found), (expected, *others))
    error = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
    step = {"": lambda: jax.block_until_ready(run(kernel, weight, *arguments))}
    seconds = turns.here(step, rounds)[""]
    agrees = "agrees with" if error < CLOSE else f"IS MORE THAN {CLOSE:.0%} FROM"
    said = f"{kernel} {agrees} {plain} (to {error:.2%}), {seconds * 1e3:.2f} ms both ways"
    return said, Agreement(kernel, error, seconds)


# ---------------------------------------------------------------- models
def training(sizes: Sizes, rounds: int) -> Iterator[tuple[str, str, Any]]:
    """Steps, and the share of the data sheet's bfloat16 rate that their FLOPs reach, those of
    rematerialisation not counted."""
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    for variant in VARIANTS:
        mixed = base.varied(sizes.run.model.attention, variant)
        for remat in REMAT:
            run = sizes.run.replace(model=sizes.run.model.replace(attention=mixed, remat=remat))
            case = f"{variant}, remat {remat}"
            try:
                seconds = turns.here({"": TrainingStep(run)}, rounds)[""]
            except jax.errors.JaxRuntimeError as error:
                yield case, f"left out: {str(error).splitlines()[0][:80]}", None
                continue
            flops = run.cost().training_flops * run.tokens_per_step
            rate, share = run.tokens_per_step / seconds, flops / seconds / peak
            said = f"{rate:,.0f} tokens/s, {flops / seconds / 1e12:.3g} TFLOP/s, MFU {share:.1%}"
            yield case, said, {"seconds": seconds, "tokens_per_second": rate, "mfu": share}


def decoding(sizes: Sizes, rounds: int) -> Iterator[tuple[str, str, Any]]:
    """New tokens a second, the prompt's time counted."""
    for rows, prompt, new in sizes.decoded:
        step = decoding_step(sizes.run.model, rows, prompt, new)
        rate = rows * new / turns.here({"": step}, rounds)[""]
        case = f"{rows} rows, prompt {prompt}, {new} new"
        yield case, f"{rate:,.0f} new tokens/s", {"tokens_per_second": rate}
