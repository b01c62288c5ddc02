"""Keys and values from latents: MLA and GLA.

Legend: B batch, T query position, S key position, D model width, N query heads, g latent groups, n
heads of a group, C latent width, H unrotated query and key width, R rotary width, U value width.
"""

import functools

import jax.numpy as jnp

from kha_jax.attention.projections.base import Projection, ProjectionModule
from kha_jax.attention.projections.rotary import ROPE_SCALINGS, NoScaling, RopeScaling
from kha_jax.config import choice
from kha_jax.modules import RMSNorm
from kha_jax.ops.checkpoint_names import PROJECTED, checkpoint_name
from kha_jax.ops.linear import linear
from kha_jax.sharding import constrain


class Latent(Projection):
    """Keys and values expanded from cached latents: MLA (arXiv 2405.04434) with one group, GLA
    (arXiv 2505.21487) with more.

    c_g = RMSNorm(x W_D,g) of C for each of g equal blocks of heads; k = [c_g W_UK | RoPE(x W_R)] of
    H + R with one rotary key for all heads; v = c_g W_UV of U. Scale 1/sqrt(H + R). Cache: g C + R.
    The default widths are those of the papers.

    Mixers act on the unrotated part of q and k, and on v; only linear ones, since keys and values
    are never made when decoding from the latent.
    """

    stream_weights = {"query": "query", "key": "key_up", "value": "value_up"}
    cache_fields = ("kv_lora",)
    keys_only = ("rotary_key",)
    query_heads: int = 8
    """Heads, N."""
    head_dim: int = 64
    """Width of the unrotated part of a query and key, H."""
    value_dim: int | None = None
    """Width of a value head, U; H by default."""
    rope_dim: int | None = None
    """Width of the rotary part of a query and key, R, even; H / 2 by default."""
    kv_lora: int | None = None
    """Width of one latent, C; 4 H / g by default."""
    groups: int = 1
    """Latents, g, a divisor of N; each serves N / g heads."""
    q_lora: int | None = None
    """Rank that queries go through, with an RMS norm; None: straight from x."""
    norm_eps: float | None = None
    """Added to the mean square in the norms of the latents; None: numerics.norm_eps."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = choice(ROPE_SCALINGS, NoScaling())
    """What becomes of the frequencies in rows longer than those of training."""

    def validate(self):
        self.at_least(1, "query_heads", "head_dim", "groups")
        self.at_least(self.rope_scaling.smallest_theta, "rope_theta")
        self.at_least(1, "value_dim", "rope_dim", "kv_lora", "q_lora")
        eps = self.norm_eps
        self.require(eps is None or eps > 0, "norm_eps", f"must be positive, found {eps}")
        problem = f"must divide query_heads={self.query_heads}, found {self.groups}"
        self.require(self.query_heads % self.groups == 0, "groups", problem)
        problem = f"must be given where groups={self.groups} do not divide 4 * {self.head_dim}"
        whole = self.kv_lora is not None or 4 * self.head_dim % self.groups == 0
        self.require(whole, "kv_lora", problem)
        problem = f"must be even, found {self.rotary_width}"
        self.require(self.rotary_width % 2 == 0, "rope_dim", problem)

    @property
    def value_width(self) -> int:
        """Width of a value head, U."""
        return self.value_dim or self.head_dim

    @property
    def rotary_width(self) -> int:
        """Width of the rotary part of queries and keys, R."""
        return self.rope_dim or self.head_dim // 2

    @property
    def latent_width(self) -> int:
        """Width of one latent, C."""
        return self.kv_lora or 4 * self.head_dim // self.groups

    def streams(self, width):
        N, C = self.query_heads, self.latent_width
        return {
            "query": (N, self.head_dim, self.q_lora or width),
            "key": (N, self.head_dim, C),
            "value": (N, self.value_width, C),
        }

    def why_not(self, slot, mixer):
        if not mixer.linear or mixer.late(self.query_heads):
            reason = "keys and values are never made when decoding from the latent"
            return f"{reason}, so only what folds into it can; use linear"
        if mixer.by_head and slot != "query" and self.groups > 1:
            return f"heads read {self.groups} latents, and one cannot read another's"
        return None

    def output_shape(self):
        return self.query_heads, self.value_width

    def parameters(self, width):
        norms = self.groups * self.latent_width + (self.q_lora or 0)
        return self.flops(width) // 2 + norms

    def flops(self, width):
        query = self.query_heads * (self.head_dim + self.rotary_width)
        query_weights = width * query if self.q_lora is None else self.q_lora * (width + query)
        down = width * (self.groups * self.latent_width + self.rotary_width)
        up = self.latent_width * self.query_heads * (self.head_dim + self.value_width)
        return 2 * (query_weights + down + up)

    def key_width(self):
        return self.head_dim + self.rotary_width

    def scale(self):
        return super().scale() * self.rope_scaling.latent_factor()

    def cache_floats(self, mixers):
        return self.groups * self.latent_width + self.rotary_width

    @property
    def module(self):
        return LatentModule


class LatentModule(ProjectionModule):
    """See Latent. State: the normalised latents [B, S, groups, C] and the rotary key [B, S, 1, R],
    rotated.

    (c W_UK) . q = c . (q W_UK^T) and p (c W_UV) = (p c) W_UV: in decoding, queries go into the
    latent and come back from it, so that nothing is expanded per cached token. The mixers, which
    are linear, act on the up-projections.
    """

    config: Latent

    def setup(self):
        c, D = self.config, self.width
        norm = functools.partial(RMSNorm, numerics=self.numerics, axis="latent", eps=c.norm_eps)
        rank = {"latent": c.q_lora} if c.q_lora else {"embed": D}
        query, N = {**rank, "heads": c.query_heads}, c.query_heads // c.groups
        up = {"groups": c.groups, "latent": c.latent_width, "heads": N}
        if c.q_lora:
            self.query_down = self.weight("query_down", embed=D, latent=c.q_lora)
            self.query_norm = norm()
        self.query = self.weight("query", **query, head_dim=c.head_dim)
        self.query_rope = self.weight("query_rope", **query, head_dim=c.rotary_width)
        self.down = self.weight("latent_down", embed=D, groups=c.groups, latent=c.latent_width)
        self.latent_norms = [norm() for _ in range(c.groups)]
        self.rotary_key = self.weight("rotary_key", embed=D, head_dim=c.rotary_width)
        self.key_up = self.weight("key_up", **up, head_dim=c.head_dim)
        self.value_up = self.weight("value_up", **up, head_dim=c.value_width)

    def __call__(self, x_BTD, positions_BT, mixers):
        source = self.query_norm(linear(x_BTD, self.query_down)) if self.config.q_lora else x_BTD
        nope = mixers["query"].project(source, self.query)
        rotated = self.rotated(linear(source, self.query_rope), positions_BT)
        q_BTNH = jnp.concatenate([nope, rotated], axis=-1)
        latents = checkpoint_name(linear(x_BTD, self.down), PROJECTED)
        normed = [norm(latents[:, :, g]) for g, norm in enumerate(self.latent_norms)]
        rotary_key = self.rotated(linear(x_BTD, self.rotary_key)[:, :, None], positions_BT)
        state = {"latent": jnp.stack(normed, axis=2), "rotary_key": rotary_key}
        return constrain(q_BTNH, "batch", "length", "heads", None), state

    def keys_and_values(self, state, mixers):
        latent, groups = state["latent"], range(self.config.groups)

        def expand(mixer, up):
            return jnp.concatenate([mixer.project(latent[:, :, g], up[g]) for g in groups], axis=2)

        nope, v_BSNU = expand(mixers["key"], self.key_up), expand(mixers["value"], self.value_up)
        rotary = jnp.broadcast_to(state["rotary_key"], (*nope.shape[:3], self.config.rotary_width))
        k_BSNH = jnp.concatenate([nope, rotary], axis=-1)
        heads = ("batch", "length", "heads", None)
        return constrain(k_BSNH, *heads), constrain(v_BSNU, *heads)

    def read(self, q_B1NH, cache, mixers):
        H = self.config.head_dim
        nope_BTgnH = self._grouped(q_B1NH[..., :H])
        q_latent = jnp.einsum("BTgnH,gCnH->BTgnC", nope_BTgnH, mixers["key"](self.key_up))
        q_latent = q_latent.reshape(*q_B1NH.shape[:3], -1)
        latent = cache["latent"]
        rotary = q_B1NH[..., H:], cache["rotary_key"]
        return [(q_latent, latent.swapaxes(1, 2)), rotary], latent

    def finish(self, o_BTNC, mixers):
        value_up = mixers["value"](self.value_up)
        o_BTgnU = jnp.einsum("BTgnC,gCnU->BTgnU", self._grouped(o_BTNC), value_up)
        return o_BTgnU.reshape(*o_BTNC.shape[:3], -1)

    def _grouped(self, z_BTNH):
        B, T, _, H = z_BTNH.shape
        return z_BTNH.reshape(B, T, self.config.groups, -1, H)
