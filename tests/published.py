"""Training runs on TPUs that others measured and published, as runs of this repository: facts
against which plans are held. None was measured here.

All are of MaxText (github.com/AI-Hypercomputer/maxtext): `tokens_per_second` a chip from its table
of optimised models (docs/reference/models/tiering.md) and from the logs in
github.com/AI-Hypercomputer/tpu-recipes (training/), or from the TFLOP/s a chip in its README of
2024, divided by the FLOPs a token that MaxText counts: 6 for each weight but the input embedding,
and 12 T N H a layer. Sequences and rematerialisation are those of the same recipes, the latter as
the nearest policy here: MaxText keeps queries, keys and values where this says `projections`, on
v6e in the host's memory.
"""

from typing import NamedTuple

from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.model import LossConfig, ModelConfig
from kha_jax.modules import Numerics
from kha_jax.training.run_config import RunConfig


def _model(layers, width, heads, kv_heads, feed_forward, vocabulary, embeddings="untied"):
    projection = GroupedQuery(query_heads=heads, kv_heads=kv_heads, head_dim=128, qk_norm="none")
    return ModelConfig(
        layers=layers,
        width=width,
        vocabulary_size=vocabulary,
        embeddings=embeddings,
        attention=AttentionConfig(projection=projection),
        feed_forward=feed_forward,
        numerics=Numerics(dtype="bfloat16"),
        loss=LossConfig(chunk_tokens=16384),
    )


LLAMA2_70B = _model(80, 8192, 64, 8, SwiGLU(width=28672), 32000)
LLAMA31_70B = _model(80, 8192, 64, 8, SwiGLU(width=28672), 128256)
LLAMA31_8B = _model(32, 4096, 32, 8, SwiGLU(width=14336), 128256)
MIXTRAL_8X7B = _model(
    32, 4096, 32, 8, MoE(experts=8, top_k=2, width=14336, scores="softmax"), 32000
)
# MaxText's own decoder at global_parameter_scale 16 and 32
DENSE_16B = _model(32, 4096, 64, 64, SwiGLU(width=28672), 32000)
DENSE_32B = _model(32, 8192, 64, 64, SwiGLU(width=28672), 32000)


class Published(NamedTuple):
    """tokens_per_second: of a chip. same: it computes what the plan counts."""

    name: str
    model: ModelConfig
    where: str
    seq_len: int
    sequences: int
    remat: str
    tokens_per_second: float
    same: bool = True

    def run(self, chips: int) -> RunConfig:
        return RunConfig(
            model=self.model.replace(remat=self.remat),
            seq_len=self.seq_len,
            batch_size=self.sequences * chips,
        )


def _counted(tflops: float, model: ModelConfig, seq_len: int) -> float:
    """Tokens a second and chip of so many TFLOP/s as MaxText counts them."""
    projection = model.attention.projection
    weights = model.layers * (
        model.width * (2 * projection.query_heads + 2 * projection.kv_heads) * 128
        + 3 * model.width * model.feed_forward.width
    )
    weights += model.vocabulary_size * model.width
    scores = 12 * model.layers * seq_len * projection.query_heads * 128
    return tflops * 1e12 / (6 * weights + scores)


RUNS = [
    Published("Llama 2 70B", LLAMA2_70B, "v5p:4x8x8", 4096, 4, "projections", 692),
    Published("Mixtral 8x7B", MIXTRAL_8X7B, "v5p:4x4x8", 4096, 36, "full", 2909),
    Published("dense 16B", DENSE_16B, "v5e-256", 2048, 6, "full", _counted(120, DENSE_16B, 2048)),
    Published("dense 32B", DENSE_32B, "v5e-256", 2048, 4, "full", _counted(132, DENSE_32B, 2048)),
    Published("dense 32B", DENSE_32B, "2*v5e-256", 2048, 4, "full", _counted(128, DENSE_32B, 2048)),
    Published("Llama 2 70B", LLAMA2_70B, "v6e-256", 4096, 2, "projections", 905),
    Published("Llama 3.1 70B", LLAMA31_70B, "v6e-256", 8192, 4, "projections", 960),
    Published("Llama 3.1 8B", LLAMA31_8B, "v6e-256", 8192, 4, "projections", 7207),
    # a quarter more rows than there are, dispatched by products with one-hot matrices
    Published(
        "Mixtral 8x7B, capacity 1.25", MIXTRAL_8X7B, "v6e-256", 4096, 12, "projections", 3645, False
    ),
]


def main() -> None:
    """The table of docs/pods.md: published and expected tokens a second and chip."""
    from kha_jax.planning import placed, plan, topology

    print("| run | chips | sequences x tokens | published | expected | off by | bound |")
    print("|---|---|---|---|---|---|---|")
    for run in RUNS:
        slice_ = topology(run.where)
        placed_run = placed(run.run(slice_.chips), slice_, run.sequences)
        found, tokens = plan(placed_run, slice_, compiled=False), placed_run.tokens_per_step
        expected, bound = (
            tokens / seconds / slice_.chips
            for seconds in (found.expected_step_seconds, found.step_seconds)
        )
        print(
            f"| {run.name}{'' if run.same else ' (*)'} | {slice_.chips}, `{run.where}` "
            f"| {run.sequences} x {run.seq_len}, `{run.remat}` | {run.tokens_per_second:,.0f} | "
            f"{expected:,.0f} | {expected / run.tokens_per_second - 1:+.0%} | {bound:,.0f} |"
        )


if __name__ == "__main__":
    main()
