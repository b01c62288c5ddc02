"""Which documents have the text of an earlier one, in 24 bytes of memory a document: the key of
each, and its place in their order."""

import os
from pathlib import Path
from typing import Sequence

import numpy as np

from experiments.preparing.texts import KEY_BYTES

DTYPE = np.dtype([("first", "<u8"), ("second", "<u8")])
COMPARED = 2**20  # keys at once


def later_ones(paths: Sequence[Path]) -> list[bytes]:
    """For each file of keys one bit a document, set where the same key stands before: in the file,
    or in one before it."""
    counts = [os.path.getsize(path) // KEY_BYTES for path in paths]
    keys = np.empty(sum(counts), DTYPE)
    begins = np.cumsum([0, *counts])
    for path, begin, end in zip(paths, begins, begins[1:]):
        keys[begin:end] = np.fromfile(path, DTYPE)
    later = _later(keys)
    return [np.packbits(later[a:b]).tobytes() for a, b in zip(begins, begins[1:])]


def _later(keys: np.ndarray) -> np.ndarray:
    """Where a key has occurred before."""
    order = np.lexsort((keys["second"], keys["first"]))  # stable: the first one stays first
    later = np.zeros(len(keys), bool)
    for begin in range(1, len(keys), COMPARED):
        these = order[begin : begin + COMPARED]
        before = order[begin - 1 : begin - 1 + len(these)]
        later[these] = keys[these] == keys[before]
    return later
