"""What one attention layer of the paper's 0.8B-6.6B shape costs by the accounting, and what it lets
one do: projections, and variants on one of them. Nothing here is timed."""

from typing import Any

from rich.table import Table

from configs import base
from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import STREAM_MIXERS
from kha_jax.attention.projections import Collaborative, GroupedQuery, GroupedTied, Latent
from kha_jax.comparing.budget import folds, fused_kernel

WIDTH, LAYERS, LENGTH, STEP = 1536, 18, 4096, 32768  # the paper's 0.8B-6.6B attention
PROJECTIONS = {
    "MHA 16/16": GroupedQuery(query_heads=16, kv_heads=16, head_dim=128),
    "GQA 32/4": GroupedQuery(query_heads=32, kv_heads=4, head_dim=128),
    "MQA 32/1": GroupedQuery(query_heads=32, kv_heads=1, head_dim=128),
    "GTA 32/4": GroupedTied(query_heads=32, kv_heads=4, head_dim=128),
    "MLA 512": Latent(query_heads=32, head_dim=128, q_lora=1024),
    "GLA 2 x 256": Latent(query_heads=32, head_dim=128, q_lora=1024, groups=2),
    "collaborative 16": Collaborative(query_heads=16, head_dim=128),
}


def cost_of(config: AttentionConfig) -> dict[str, Any]:
    """What one attention layer of that shape costs, and what it lets one do."""
    can = folds(config)
    return {
        "parameters": config.parameters(WIDTH),
        "flops": config.flops(WIDTH, (LENGTH + 1) / 2, STEP),
        "cache_bytes": 2 * LAYERS * config.cache_floats(),
        "folds": {None: "", True: "yes", False: "no"}[can],
        "tpu": fused_kernel(config, "tpu", "bfloat16", LENGTH) or "-",
        "gpu": fused_kernel(config, "gpu", "bfloat16", LENGTH) or "-",
    }


def tables() -> tuple[list[Table], dict[str, dict[str, Any]]]:
    """(projections and variants as tables, the figures of each by name)."""
    shown, of_projections = projection_table()
    others, of_variants = variant_table()
    return [shown, others], {**of_projections, **of_variants}


def projection_table() -> tuple[Table, dict[str, dict[str, Any]]]:
    """A row for each projection."""
    title = f"one attention layer of width {WIDTH}, {LENGTH} visible tokens at most"
    table = Table(title=f"{title}; {LAYERS} layers of cache in bf16")
    columns = ("", "parameters, M", "forward MFLOP per token", "cache, bytes per token")
    for column in (*columns, "takes on v", "fused on TPU", "on GPU"):
        table.add_column(column, justify="right")
    out = {}
    for name, projection in PROJECTIONS.items():
        cost = cost_of(AttentionConfig(projection=projection))
        fits = [k for k, m in STREAM_MIXERS.items() if projection.why_not("value", m()) is None]
        figures = f"{cost['parameters'] / 1e6:.2f}", f"{cost['flops'] / 1e6:.1f}"
        cache, takes = f"{cost['cache_bytes']:,}", ", ".join(k for k in fits if k != "none")
        table.add_row(name, *figures, cache, takes, cost["tpu"], cost["gpu"])
        out[name] = cost
    return table, out


def variant_table() -> tuple[Table, dict[str, dict[str, Any]]]:
    """A row for each variant: what it adds to GQA 32/4."""
    plain = AttentionConfig(projection=PROJECTIONS["GQA 32/4"])
    baseline = cost_of(plain)
    table = Table(
        title=f"variants on GQA 32/4, a step of {STEP:,} tokens: added to the layer above"
    )
    columns = ("", "parameters", "of the attention's training FLOPs", "cache", "folds")
    for column in (*columns, "fused on TPU", "on GPU"):
        table.add_column(column, justify="right")
    out = {}
    for name in base.variants(plain):
        cost = cost_of(base.varied(plain, name))
        added = f"{cost['parameters'] - baseline['parameters']:+,}"
        share = f"{cost['flops'] / baseline['flops'] - 1:+.3%}"
        cache = f"x {cost['cache_bytes'] / baseline['cache_bytes']:.3g}"
        table.add_row(name, added, share, cache, cost["folds"], cost["tpu"], cost["gpu"])
        out[name] = cost
    return table, out
