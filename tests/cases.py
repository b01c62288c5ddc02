"""The one table of attention variants that every table-driven test uses.

A row is a change to AttentionConfig, the projections that it is tried on, what it claims, and what
tests/reference.py is given for it. Sizes: width 16, 4 query heads of 8.
"""

import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import jax
import numpy as np

from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import (
    HeadComposition,
    KnockingGate,
    KnockingLinear,
    KnockingMLP,
    UnsharedLinear,
)
from kha_jax.attention.outputs import (
    DifferentialOutput,
    ExclusiveOutput,
    GatedOutput,
    HeadGroupNorm,
    MixtureOfHeads,
)
from kha_jax.attention.projections import Collaborative, GroupedQuery, GroupedTied, Latent
from kha_jax.attention.projections.rotary import (
    ROPE_SCALINGS,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)
from kha_jax.attention.scores import TalkingHeads
from kha_jax.comparing.properties import EXACT, Layer
from tests import reference

D = 16
SLOTS = ("query", "key", "value")
SCORES = ("logits", "probabilities")
LINEAR = LinearScaling(factor=2.0)
LLAMA3 = Llama3Scaling(factor=8.0, original_max_position_embeddings=16)
YARN = YarnScaling(
    factor=16.0, original_max_position_embeddings=64, beta_fast=8.0, mscale=0.7, mscale_all_dim=1.5
)
SCALINGS = {
    "linear": LINEAR,
    "llama3": LLAMA3,
    "llama3.1": Llama3Scaling(),
    "yarn": YARN,
    "yarn, whole": YarnScaling(truncate=False),
    "yarn, factor": YarnScaling(factor=40.0, attention_factor=0.8, mscale_all_dim=1.0),
}
PROJECTIONS = {
    "mha": GroupedQuery(query_heads=4, kv_heads=4, head_dim=8, rope_scaling=LLAMA3),
    "gqa": GroupedQuery(query_heads=4, kv_heads=2, head_dim=8),
    "mqa": GroupedQuery(
        query_heads=4, kv_heads=1, head_dim=8, rope_dim=6, rope_scaling=YARN, bias="qkv"
    ),
    "no_norm": GroupedQuery(
        query_heads=4, kv_heads=2, head_dim=8, qk_norm="none", rope_dim=0, bias="qkv"
    ),
    "gta": GroupedTied(query_heads=4, kv_heads=2, head_dim=8, rope_scaling=LINEAR),
    "mla": Latent(query_heads=4, head_dim=8, value_dim=6, rope_dim=4, kv_lora=12),
    "mla_q_lora": Latent(
        query_heads=4, head_dim=8, kv_lora=12, q_lora=10, rope_scaling=YARN, norm_eps=0.1
    ),
    "gla": Latent(query_heads=4, head_dim=8, kv_lora=12, groups=2),
    "shared": Collaborative(query_heads=4, head_dim=8, rope_scaling=LLAMA3),
    "narrow": Collaborative(query_heads=4, head_dim=8, shared_dim=16, mixing="uniform"),
}


def nothing(params: dict[str, Any]) -> dict[str, Any]:
    return {}


class Row(NamedTuple):
    """fields: of AttentionConfig. on: projections, the first of which stands for all where one is
    enough. starts: as its projection alone, `exact`ly, `close` to it (rounding apart), or None, as
    its `identity_at_start` says. meet: whether a permutation of the heads shows. stream: the
    reference's kind of every stream mixer. oracle: the layer's parameters -> what else the
    reference is given, functions on float64 arrays among it:

        {"mixers": {slot: (f, {})}}: z~ = f(z) of a stream, z [B, T, heads, H];
        {"scores": {slot: f}}: s~ = f(s) of `logits` or `probabilities`, s [B, N, T, S];
        {"outputs": (f, {})}: o~ = f(o, x, v), o [B, T, N, U], x [B, T, D], v [B, T, K, U].

    A projection's layer in NumPy is an entry of LAYERS."""

    fields: dict[str, Any]
    on: tuple[str, ...]
    starts: str | None = "exact"
    meet: bool = False
    stream: str = ""
    oracle: Callable[[dict[str, Any]], dict[str, Any]] = nothing


def everywhere(mixer: Any, *slots: str) -> dict[str, Any]:
    return dict.fromkeys(slots or SLOTS, mixer)


def scores(params: dict[str, Any]) -> dict[str, Any]:
    return {"scores": {s: params[f"{s}_mixer"]["kernel"] for s in SCORES if f"{s}_mixer" in params}}


def output(kind: str, **names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What the reference is given for an output mixer: its arrays under their names there."""

    def given(params):
        leaves = jax.tree.leaves_with_path(params.get("output_mixer", {}))
        ours = {path[-1].key: leaf for path, leaf in leaves}
        return {"outputs": (kind, {n: ours[v] if v in ours else v for n, v in names.items()})}

    return given


def each_head(params: dict[str, Any]) -> dict[str, Any]:
    """z_n T_n for every slot."""
    formula = functools.partial(np.einsum, "NHJ,...NH->...NJ")
    own = {slot: params[f"{slot}_mixer"]["kernel"] for slot in SLOTS}
    return {"mixers": {s: (functools.partial(formula, T_NHJ), {}) for s, T_NHJ in own.items()}}


COMPOSE = HeadComposition()
ROWS = {
    "plain": Row({}, tuple(PROJECTIONS)),
    "linear": Row(everywhere(KnockingLinear(apply="activations")), ("gqa", "gla"), stream="linear"),
    "weights": Row(
        everywhere(KnockingLinear(apply="weights")), ("no_norm", "mla"), stream="linear"
    ),
    "knocking": Row(
        {"query": KnockingGate(), "value": KnockingMLP()}, ("gqa", "gta"), stream="each"
    ),
    "mlp": Row(everywhere(KnockingMLP()), ("mqa",), stream="mlp"),
    "mlp_v": Row({"value": KnockingMLP()}, ("shared",), stream="mlp"),
    "talking_logits": Row({"logits": TalkingHeads()}, ("gqa",), "close", True, oracle=scores),
    "talking": Row(
        everywhere(TalkingHeads(), *SCORES), ("gta", "mla", "narrow"), "close", True, oracle=scores
    ),
    "compose": Row(
        everywhere(COMPOSE, "key", "value"), ("gqa", "mla"), meet=True, stream="heads"
    ),
    "interleaved": Row(everywhere(COMPOSE), ("gqa",), meet=True, stream="heads"),
    "after_norm": Row(
        everywhere(HeadComposition(before_norm=False)), ("gqa",), "close", True, "after_norm"
    ),
    "virtual": Row(
        everywhere(HeadComposition(heads_read=4), "key", "value"),
        ("gqa", "no_norm"), "close", True, "heads",
    ),
    "virtual_tied": Row(
        {"value": HeadComposition(heads_read=4)}, ("gta",), "close", True, "heads"
    ),
    "fewer": Row(
        everywhere(HeadComposition(heads_read=2), "key", "value"), ("mha",), None, True, "heads"
    ),
    "group_norm": Row(
        {"output": HeadGroupNorm()}, ("gqa",), None, oracle=output("group_norm", scale="scale")
    ),
    "mea": Row(
        {**everywhere(COMPOSE, "key", "value"), "output": HeadGroupNorm()},
        ("gqa",), None, True, "heads", output("group_norm", scale="scale"),
    ),
    "gated": Row(
        {"output": GatedOutput(), "output_bias": True}, ("gqa", "mla"), None,
        oracle=output("gate", kernel="gate"),
    ),
    "gated_elements": Row(
        {"output": GatedOutput(per="element", start="identity")},
        ("gqa",), oracle=output("gate", kernel="gate", doubled=True),
    ),
    "differential": Row(
        {"output": DifferentialOutput()}, ("gqa", "gta"), None,
        oracle=output("differential", kernel="gate"),
    ),
    "exclusive": Row(
        {"output": ExclusiveOutput()}, ("gqa", "gta"), None, oracle=output("exclusive")
    ),
    "mixture": Row(
        {"output": MixtureOfHeads(shared_heads=1, top_k=2)}, ("gqa", "gla"), None, True,
        oracle=output("mixture", routed="routed", shared="shared", alphas="kinds", top_k=2),
    ),
    "mixture_printed": Row(
        {"output": MixtureOfHeads(shared_heads=0, top_k=2, gates="paper_scale")}, ("gqa",), None,
        True, oracle=output("mixture", routed="routed", top_k=2, paper_scale=True),
    ),
    "unshared": Row(everywhere(UnsharedLinear()), ("gqa", "mla"), oracle=each_head),
    "all_at_once": Row(
        {
            "query": KnockingMLP(), **everywhere(HeadComposition(heads_read=4), "key", "value"),
            **everywhere(TalkingHeads(), *SCORES), "output": GatedOutput(),
        },
        ("gqa",), None, True, "each",
        lambda params: {**scores(params), **output("gate", kernel="gate")(params)},
    ),
}  # fmt: skip
CASES = [(name, projection) for name, row in ROWS.items() for projection in row.on]
FIRST = [(name, row.on[0]) for name, row in ROWS.items()]
CLAIMING = [case for case in CASES if ROWS[case[0]].fields and ROWS[case[0]].starts]
IDS = functools.partial(map, "-".join)


def config_of(name: str, projection: str) -> AttentionConfig:
    return AttentionConfig(projection=PROJECTIONS[projection], **ROWS[name].fields)


def layer_of(config: AttentionConfig) -> Layer:
    return Layer(config, D)


@functools.cache
def random(config: AttentionConfig) -> dict[str, Any]:
    """Parameters of order one, so that nothing is small enough to hide."""
    return layer_of(config).random()


def for_reference(name: str, projection: str, params: dict[str, Any]) -> tuple:
    """(layer, parameters, settings) of the reference for a layer's parameters."""
    row, config, ours = ROWS[name], config_of(name, projection).projection, params["projection"]
    out = {n: params[n] for n in ("output", "output_bias") if n in params} | row.oracle(params)
    own = {slot: params[f"{slot}_mixer"] for slot in SLOTS if f"{slot}_mixer" in params}
    kinds = {KnockingGate: "gate", KnockingMLP: "mlp", HeadComposition: "heads"}
    if row.stream == "after_norm":
        out["after_norm"] = own
    elif row.stream:
        kind = {
            s: kinds.get(type(row.fields[s])) if row.stream == "each" else row.stream for s in own
        }
        out["mixers"] = {slot: (kind[slot], matrices) for slot, matrices in own.items()}
    layer, given, settings = LAYERS[type(config)](config, ours)
    return layer, {**out, **given}, settings


def scaling(config: RopeScaling) -> dict[str, Any]:
    """What the reference is given for it."""
    kind = next(kind for kind, cls in ROPE_SCALINGS.items() if cls is type(config))
    return {"scaling": {"kind": kind, **dataclasses.asdict(config)}}


def grouped_query(config: GroupedQuery, ours: dict[str, Any]) -> tuple:
    norms = ("query_norm", "key_norm") if config.qk_norm == "rms" else ()
    streams = [n for slot in SLOTS for n in (slot, f"{slot}_bias") if n in ours]
    given = {**{n: ours[n] for n in streams}, **{n: ours[n]["scale"] for n in norms}}
    settings = {"qk_norm": config.qk_norm == "rms", "rope_dim": config.rope_dim}
    return reference.grouped_query, given, {**settings, **scaling(config.rope_scaling)}


def grouped_tied(config: GroupedTied, ours: dict[str, Any]) -> tuple:
    given = {n: ours[n] for n in ("query", "state", "rotary_key")}
    return reference.grouped_tied, given, scaling(config.rope_scaling)


def collaborative(config: Collaborative, ours: dict[str, Any]) -> tuple:
    shared = {n: ours[n] for n in (*SLOTS, "mixing")}
    settings = {"head_dim": config.head_dim, **scaling(config.rope_scaling)}
    return reference.collaborative, shared, settings


def latent(config: Latent, ours: dict[str, Any]) -> tuple:
    given = {n: ours[n] for n in ("latent_down", "rotary_key", "key_up", "value_up")}
    norms = [ours[f"latent_norms_{g}"]["scale"] for g in range(config.groups)]
    given["latent_norm"] = np.stack(norms)
    query = np.concatenate([ours["query"], ours["query_rope"]], axis=-1)
    if config.q_lora:
        norm = ours["query_norm"]["scale"]
        given |= {"query_down": ours["query_down"], "query_latent_norm": norm, "query_up": query}
    else:
        given["query"] = query
    layer = reference.latent if config.groups == 1 else reference.grouped_latent
    settings = scaling(config.rope_scaling) | {"eps": config.norm_eps or EXACT.norm_eps}
    return layer, given, settings


# A projection's config -> function (config, the projection's parameters) -> (layer in NumPy, its
# parameters but for mixers and output, its settings).
LAYERS = {
    GroupedQuery: grouped_query,
    GroupedTied: grouped_tied,
    Collaborative: collaborative,
    Latent: latent,
}
