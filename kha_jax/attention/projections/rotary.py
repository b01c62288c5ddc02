"""What becomes of the rotary frequencies in rows longer than those of training.

Frequencies are float64 on the host: they depend on the config alone, not on the row.

Legend: R rotary width.
"""

import math
from typing import ClassVar

import numpy as np

from kha_jax.config import Config
from kha_jax.ops import rope


class RopeScaling(Config):
    """A member of the family; fields are named as in Hugging Face's `rope_parameters`."""

    smallest_theta: ClassVar[int] = 1
    """Of rope_theta."""

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        """Those of the R/2 pairs, in float64."""
        return rope.frequencies(theta, width)

    def rotation_factor(self) -> float:
        """Factor on cos and sin."""
        return 1.0

    def latent_factor(self) -> float:
        """Factor on the logits of latent attention, whose unrotated features the one on cos and sin
        does not reach."""
        return 1.0


class NoScaling(RopeScaling):
    """theta^(-2i/R) as it is."""


class LinearScaling(RopeScaling):
    """f / factor: positions are interpolated (Chen et al., arXiv 2306.15595)."""

    factor: float = 1.0
    """How many times as long rows may be."""

    def validate(self):
        self.at_least(1, "factor")

    def frequencies(self, theta, width):
        return rope.frequencies(theta, width) / self.factor


class Llama3Scaling(RopeScaling):
    """f / factor for waves longer than a share of the rows of training, f for short ones, and
    between the two in proportion to the turns in such a row (Llama 3.1).

    f (s + (1 - s) / factor), s = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    within [0, 1], turns = original_max_position_embeddings f / 2 pi.
    """

    factor: float = 8.0
    """How many times as long rows may be."""
    low_freq_factor: float = 1.0
    """Turns in a row of training below which a frequency is divided by `factor`."""
    high_freq_factor: float = 4.0
    """Turns above which it stays."""
    original_max_position_embeddings: int = 8192
    """Length of the rows of training."""

    def validate(self):
        self.at_least(1, "factor", "original_max_position_embeddings")
        self.at_least(0, "low_freq_factor")
        low, high = self.low_freq_factor, self.high_freq_factor
        self.require(low < high, "high_freq_factor", f"must exceed low_freq_factor={low}: {high}")

    def frequencies(self, theta, width):
        plain = rope.frequencies(theta, width)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        stays = np.clip((turns - low) / (high - low), 0, 1)
        return plain * (stays + (1 - stays) / self.factor)


class YarnScaling(RopeScaling):
    """f for pairs that turn often in a row of training, f / factor for those that turn seldom, a
    ramp over the pairs between, and larger logits (YaRN, arXiv 2309.00071).

    cos and sin are multiplied by attention_factor, by default m(1), or m(mscale) /
    m(mscale_all_dim) where both are given, m(a) = 1 + 0.1 a log(factor). Latent attention
    multiplies its logits by m(mscale_all_dim)^2 besides (DeepSeek-V3, arXiv 2412.19437).
    """

    smallest_theta = 2
    factor: float = 4.0
    """How many times as long rows may be."""
    original_max_position_embeddings: int = 4096
    """Length of the rows of training."""
    beta_fast: float = 32.0
    """Turns in a row of training from which on a frequency stays."""
    beta_slow: float = 1.0
    """Turns up to which it is divided by `factor`."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole pairs."""
    attention_factor: float | None = None
    """Factor on cos and sin; None: from `factor`."""
    mscale: float | None = None
    """Part of that factor, where mscale_all_dim is given."""
    mscale_all_dim: float | None = None
    """Its divisor, and what multiplies the logits of latent attention."""

    def validate(self):
        self.at_least(1, "factor", "original_max_position_embeddings")
        for field in ("beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, field)
            positive = value is None or value > 0
            self.require(positive, field, f"must be positive, found {value}")
        slow, fast = self.beta_slow, self.beta_fast
        problem = f"must be beta_slow={slow} or more, found {fast}"
        self.require(slow <= fast, "beta_fast", problem)
        used = self.mscale_all_dim is not None and self.attention_factor is None
        problem = f"needs mscale_all_dim, and no attention_factor; found {self.mscale}"
        self.require(self.mscale is None or used, "mscale", problem)

    def frequencies(self, theta, width):
        plain = rope.frequencies(theta, width)
        low, high = self._ramp(theta, width)
        divided = np.clip((np.arange(len(plain)) - low) / (high - low), 0, 1)
        return plain * (1 - divided + divided / self.factor)

    def _ramp(self, theta: float, width: int) -> tuple[float, float]:
        """The pairs between which frequencies pass from f to f / factor."""

        def pair(turns):
            wave = self.original_max_position_embeddings / (2 * math.pi * turns)
            return width * math.log(wave) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        return low, high + 0.001 if low == high else high

    def rotation_factor(self):
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None:
            return self._m(1.0)
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    def latent_factor(self):
        return self._m(self.mscale_all_dim or 0.0) ** 2

    def _m(self, share: float) -> float:
        return 1 + 0.1 * share * math.log(self.factor)


ROPE_SCALINGS = {
    "none": NoScaling,
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}
