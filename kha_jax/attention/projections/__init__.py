"""Projections: x -> queries and the state that keys and values are read from."""

from kha_jax.attention.projections.base import (
    Projection,
    State,
    cache_slots,
    from_cache,
    slots_axis,
    to_cache,
)
from kha_jax.attention.projections.collaborative import Collaborative
from kha_jax.attention.projections.grouped import GroupedQuery, GroupedTied
from kha_jax.attention.projections.latent import Latent

PROJECTIONS = {
    "grouped_query": GroupedQuery,
    "grouped_tied": GroupedTied,
    "latent": Latent,
    "collaborative": Collaborative,
}

__all__ = [
    "PROJECTIONS",
    "Collaborative",
    "GroupedQuery",
    "GroupedTied",
    "Latent",
    "Projection",
    "State",
    "cache_slots",
    "from_cache",
    "slots_axis",
    "to_cache",
]
