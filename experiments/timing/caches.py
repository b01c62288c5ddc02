"""What one more token costs as the cache fills, by projection."""

from rich.table import Table

from experiments.timing import peers, turns
from kha_jax.attention import AttentionConfig
from kha_jax.attention.projections import GroupedQuery, GroupedTied, Latent

LENGTHS, ROWS = (256, 1024, 4096, 16384), 8
H, N = peers.HEAD_DIM, peers.HEADS
LATENT = {"query_heads": N, "head_dim": H, "value_dim": H, "rope_dim": H // 2}
PROJECTIONS = {
    "MHA 8/8": GroupedQuery(query_heads=N, kv_heads=N, head_dim=H),
    "GQA 8/4": GroupedQuery(query_heads=N, kv_heads=4, head_dim=H),
    "MQA 8/1": GroupedQuery(query_heads=N, kv_heads=1, head_dim=H),
    "GTA 8/4": GroupedTied(query_heads=N, kv_heads=4, head_dim=H),
    "MLA 4H": Latent(**LATENT, kv_lora=4 * H),
    "GLA 2 x 2H": Latent(**LATENT, kv_lora=2 * H, groups=2),
}


def measured(rounds: int, machine: str) -> tuple[Table, dict[str, list[float]]]:
    """Milliseconds of one token in every row, by projection, for each of LENGTHS."""
    title = (
        f"ms for one token in each of {ROWS} rows, float32, against the cached tokens, {machine}"
    )
    table = Table(title=title)
    for column in ("", "floats cached per token and layer", *map(str, LENGTHS)):
        table.add_column(column, justify="right")
    out: dict[str, list[float]] = {name: [] for name in PROJECTIONS}
    for length in LENGTHS:
        steps = {
            name: peers.one_more_token(projection, length, ROWS)
            for name, projection in PROJECTIONS.items()
        }
        for name, seconds in turns.here(steps, rounds).items():
            out[name].append(seconds * 1e3)
    for name, projection in PROJECTIONS.items():
        floats = AttentionConfig(projection=projection).cache_floats()
        table.add_row(name, str(floats), *[f"{ms:.2f}" for ms in out[name]])
    return table, out
