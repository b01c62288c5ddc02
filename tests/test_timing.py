"""What benchmark measures, at toy size: that it runs, and that it tells right from wrong."""

import jax.numpy as jnp
import pytest

from experiments.timing import asked, device
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.feed_forward import SwiGLU
from kha_jax.inference.rows import PROGRAMS
from kha_jax.model import ModelConfig
from kha_jax.training.run_config import RunConfig
from tests.commands import run_all

MODEL = ModelConfig(
    layers=1,
    width=16,
    vocabulary_size=264,
    attention=AttentionConfig(projection=GroupedQuery(query_heads=2, kv_heads=1, head_dim=8)),
    feed_forward=SwiGLU(width=24),
)
RUN = RunConfig(steps=3, batch_size=2, seq_len=16, model=MODEL)
TOY = device.Sizes((1, 24, 2, 1, 8), (16, 8, 8, 4, 2), RUN, ((2, 5, 3),))


def test_where_there_is_no_device_the_suite_says_so(tmp_path):
    (done,) = run_all([("benchmark", ["--suite=device"])], tmp_path)
    assert done.code == 0 and done.out.startswith("skipped: there is no GPU or TPU here"), done


@pytest.mark.parametrize(
    "part", [device.attentions, device.grouped], ids=lambda part: part.__name__
)
def test_kernels_of_the_platform_agree_with_plain_formulas(part):
    for case, said, found in part(TOY, 1):
        assert 0 < found.error < device.CLOSE and "agrees with" in said, (case, said)


@pytest.mark.parametrize("wrong", ["out", "gradient"])
def test_a_kernel_that_does_not_agree_is_told(wrong):
    """By its output, or by a gradient alone."""

    def function(x, y, kernel):
        plain = x * x + y
        if kernel == "plain":
            return plain
        return plain * 1.1 if wrong == "out" else plain + 0.1 * (y - y0)

    y0 = jnp.linspace(1, 2, 8)
    arguments = jnp.linspace(1, 3, 8), y0
    said, found = device._beside(function, "fast", "plain", arguments, jnp.ones(8), 1)
    assert found.error > 0.05 and "fast IS MORE THAN 2% FROM plain" in said


@pytest.mark.slow
def test_models_are_trained_and_decoded():
    table, found = device.measured(TOY, 1, "a toy")
    assert len(found) == table.row_count == 2 + 1 + 4 + 1
    assert all(found[f"training, mlp, remat {r}"]["tokens_per_second"] > 0 for r in device.REMAT)
    assert found["decoding, 2 rows, prompt 5, 3 new"]["tokens_per_second"] > 0


def test_requests_are_the_same_every_time_and_share_contexts():
    kind = asked.Kind(3, 20, 40, 4)
    once = asked.requests(kind, 100)
    assert once == asked.requests(kind, 100) and len(once) == 12
    assert len({tuple(context) for context, _ in once}) == 3
    own, padded, shapes = asked.counted(asked.VARIED)[1:]
    assert own / padded > 0.88 and shapes <= PROGRAMS
