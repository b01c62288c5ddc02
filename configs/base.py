"""Pieces that run configs share. Sizes are the paper's (arXiv 2510.23052, tables 3 and 5)."""

import functools
from typing import Any, Callable, NamedTuple

from ml_collections.config_dict import ConfigDict

from kha_jax.attention import AttentionConfig
from kha_jax.attention.attention import SLOTS
from kha_jax.attention.mixers import (
    STREAM_MIXERS,
    HeadComposition,
    KnockingGate,
    KnockingLinear,
    KnockingMLP,
)
from kha_jax.attention.outputs import (
    OUTPUT_MIXERS,
    DifferentialOutput,
    ExclusiveOutput,
    GatedOutput,
    HeadGroupNorm,
    MixtureOfHeads,
)
from kha_jax.attention.projections import Collaborative, GroupedQuery, GroupedTied, Latent
from kha_jax.attention.scores import SCORE_MIXERS, TalkingHeads
from kha_jax.config import to_config_dict
from kha_jax.feed_forward import FeedForward, MoE, SwiGLU
from kha_jax.model import LossConfig, ModelConfig
from kha_jax.modules import Numerics
from kha_jax.training.run_config import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
)

PAPER_ATTENTION = AttentionConfig(projection=GroupedQuery(query_heads=32, kv_heads=4, head_dim=128))


def variants(attention: AttentionConfig) -> dict[str, dict[str, Any]]:
    """Variant name -> the fields that it changes: the rows of the paper's table 2, then other ways
    for heads to interact, then every other kind that its seam knows, under its own name."""
    heads, head_dim = attention.projection.output_shape()
    linear, compose, talking = KnockingLinear(), HeadComposition(), TalkingHeads()
    routed = MixtureOfHeads(shared_heads=heads // 4, top_k=max(1, 3 * heads // 8))
    named = {
        "baseline": {},
        "mlp": {"value": KnockingMLP()},
        "linear": {"query": linear, "key": linear, "value": linear},
        "gate": {"value": KnockingGate()},
        "talking": {"logits": talking, "probabilities": talking},
        "compose": {"key": compose, "value": compose},
        "mea": {"key": compose, "value": compose, "output": HeadGroupNorm()},
        "group_norm": {"output": HeadGroupNorm()},
        "interleaved": {"query": compose, "key": compose, "value": compose},
        "mixture": {"output": routed},
        "gated": {"output": GatedOutput()},
        "gated_elements": {"output": GatedOutput(per="element")},
        "differential": {"output": DifferentialOutput()},
        "exclusive": {"output": ExclusiveOutput()},
        "collaborative": {"projection": Collaborative(query_heads=heads, head_dim=head_dim)},
    }
    used = {type(mixer) for fields in named.values() for mixer in fields.values()}
    for table, slots in (
        (STREAM_MIXERS, SLOTS),
        (SCORE_MIXERS, ("logits",)),
        (OUTPUT_MIXERS, ("output",)),
    ):
        left = {kind: cls for kind, cls in table.items() if kind != "none" and cls not in used}
        named |= {kind: dict.fromkeys(slots, cls()) for kind, cls in left.items()}
    return named


def varied(attention: AttentionConfig, variant: str) -> AttentionConfig:
    """The attention as a named variant; an unknown name lists the known ones."""
    return attention.replace(**_known(variant, variants(attention)))


def _known(variant: str, among: dict[str, Any]) -> Any:
    if variant not in among:
        raise ValueError(f"config variant {variant!r} is not known; use one of {', '.join(among)}")
    return among[variant]


# Name -> the variant whose attention it has, and what it changes of optimizer.mixer: settings that
# were below the baseline by an interval without 0 in 100 steps, and not in 400 (docs/results.md).
TUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_tuned": ("linear", {"learning_rate_multiplier": 10.0}),
    "mlp_tuned": ("mlp", {"learning_rate_multiplier": 10.0, "decay": "none"}),
}


def with_variant(run: RunConfig, variant: str) -> RunConfig:
    """The run with its attention as a named variant, one of `variants` or of TUNED; an unknown name
    lists the known ones."""
    attention, optimizer = run.model.attention, run.optimizer
    plain = {name: (name, {}) for name in variants(attention)}
    name, training = _known(variant, plain | TUNED)
    return run.replace(
        model=run.model.replace(attention=varied(attention, name)),
        optimizer=optimizer.replace(mixer=optimizer.mixer.replace(**training)),
    )


# Sizes that are what these projections are.
KEPT = {"multi_head": ("kv_heads",), "multi_query": ("kv_heads",)}


def projections(attention: AttentionConfig) -> dict[str, Callable[[], AttentionConfig]]:
    """Name -> what makes the attention with another projection of as many heads, without mixers,
    and, where they have any, as many key/value heads; ConfigError where that cannot be."""
    given = attention.projection
    sizes = {"query_heads": given.query_heads, "head_dim": given.head_dim}
    sizes |= {"rope_theta": given.rope_theta, "rope_scaling": given.rope_scaling}
    own = ("rope_dim", "bias") if isinstance(given, GroupedQuery) else ()
    grouped = {field: getattr(given, field) for field in own}
    shared = isinstance(given, (GroupedQuery, GroupedTied))
    kv_heads = given.kv_heads if shared else given.query_heads
    known = {
        "grouped_query": (GroupedQuery, {"kv_heads": kv_heads, **grouped}),
        "multi_head": (GroupedQuery, {"kv_heads": given.query_heads, **grouped}),
        "multi_query": (GroupedQuery, {"kv_heads": 1, **grouped}),
        "grouped_tied": (GroupedTied, {"kv_heads": kv_heads}),
        "latent": (Latent, {}),
        "grouped_latent": (Latent, {"groups": 2}),
    }

    def made(kind, own):
        projection = kind(**sizes, **own)
        return AttentionConfig(projection=projection, output_bias=attention.output_bias)

    return {name: functools.partial(made, *of) for name, of in known.items()}


class Size(NamedTuple):
    """A model of the paper, with what section 4.1 gives to runs of its kind."""

    layers: int
    width: int
    feed_forward: FeedForward
    seq_len: int = 4096
    learning_rate: float = 7.5e-4


def experts(width: int) -> MoE:
    """4 of 64, as in the paper's exploration."""
    return MoE(experts=64, top_k=4, width=width, chunk_tokens=8192)


SIZES = {
    "dense_600m": Size(24, 1024, SwiGLU(width=3072)),
    "dense_2b": Size(24, 2048, SwiGLU(width=6144)),
    "dense_4b": Size(36, 2560, SwiGLU(width=9728)),
    "moe_2b": Size(12, 1152, experts(768)),
    "moe_7b": Size(18, 1536, experts(1152)),
    "moe_15b": Size(23, 2048, experts(1536)),
    "kha_moe_6b": Size(
        18,
        2048,
        MoE(experts=128, top_k=8, width=384, chunk_tokens=4096),
        seq_len=8192,
        learning_rate=4.78e-4,
    ),
}


def paper_run(
    size: str, tokens: int = 10**11, attention: AttentionConfig = PAPER_ATTENTION
) -> RunConfig:
    """A run of the paper (section 4.1) of a size in SIZES, with 512 sequences a step.

    Inferred, since its text does not say: the tied vocabulary of 157,184, that of Ling 2.0 of the
    same organisation, with which the parameters are those that the paper prints; init_std=0.006,
    that of the Ling 2.0 report.

    For accelerators: FSDP over all of them, full rematerialisation, bfloat16 over float32 AdamW.
    `data` names the embedded text until a corpus is given.
    """
    layers, width, feed_forward, seq_len, learning_rate = SIZES[size]
    batch_size = 512
    return RunConfig(
        steps=tokens // (batch_size * seq_len),
        batch_size=batch_size,
        seq_len=seq_len,
        model=ModelConfig(
            layers=layers,
            width=width,
            vocabulary_size=157184,
            attention=attention,
            feed_forward=feed_forward,
            numerics=Numerics(init_std=0.006),
            remat="full",
            loss=LossConfig(chunk_tokens=16384),
        ),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        evaluation=EvaluationConfig(every=2000, batches=4),
        checkpoint=CheckpointConfig(every=1000, keep=3),
    )


def pretraining(size: str, tokens: int = 10**11) -> Callable[..., ConfigDict]:
    """get_config(variant) of a `paper_run`; `variant` is a name that `with_variant` takes."""

    def get_config(variant: str = "mlp") -> ConfigDict:
        return to_config_dict(with_variant(paper_run(size, tokens), variant))

    return get_config
