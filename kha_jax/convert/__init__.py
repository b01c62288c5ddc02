"""Stock checkpoints in and out: folders of Hugging Face's of the families in `families.FAMILIES`.

model, leaves = kha_jax.convert.read("Qwen3-0.6B")
kha_jax.convert.write(folder, model, variables)
"""

from kha_jax.convert.placing import Leaf, nested
from kha_jax.convert.saving import kind_for, write
from kha_jax.convert.stock import Record, Stock, keep, open_stock, read, read_record

__all__ = [
    "Leaf",
    "Record",
    "Stock",
    "keep",
    "kind_for",
    "nested",
    "open_stock",
    "read",
    "read_record",
    "write",
]
