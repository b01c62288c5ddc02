"""Output mixers: maps (o, x, v) -> o~ of what attention returns, before the output projection.

Legend: B batch, T position, D model width, N heads, K key/value heads, U value width.
"""

from typing import Any, ClassVar, Literal, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from kha_jax.modules import Aux, Module, ModuleConfig, RMSNorm, no_aux
from kha_jax.ops.linear import linear


class OutputMixer(ModuleConfig):
    """A member of the family; sizes are those of one layer of width D with N heads of U."""

    mixes_heads: ClassVar[bool] = False
    """Whether what leaves a head depends on others."""
    reads_values: ClassVar[bool] = False
    """Whether it needs the tokens' own values, which a decoder otherwise does not make."""

    @property
    def module(self):
        return OutputMixerModule

    def heads(self, heads: int) -> int:
        """Heads that the output projection reads."""
        return heads

    def identity_at_start(self) -> bool:
        """Whether it starts as the identity."""
        return False

    def why_not(self, heads: int, shared: int) -> str | None:
        """Why it cannot stand behind `heads` heads, of which `shared` each read one key/value head;
        or None."""
        return None

    def effective(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """See StreamMixer.effective. None by default: what mixes outputs reads the layer's input,
        so its weights map no heads or features to themselves."""
        return {}

    def parameters(self, width: int, heads: int, value_dim: int) -> int:
        """Parameters per layer."""
        return 0

    def flops(self, width: int, heads: int, value_dim: int) -> int:
        """Forward FLOPs per token of its matrix products."""
        return 2 * self.parameters(width, heads, value_dim)


class NoOutputMixer(OutputMixer):
    """o: the baseline."""

    def identity_at_start(self):
        return True


class HeadGroupNorm(OutputMixer):
    """An RMS norm of each head over U (MEA, arXiv 2601.19611). One weight [U] for all heads and eps
    are inferred: the paper's text does not give them."""

    eps: float = 1e-5
    """Added to the mean square."""

    @property
    def module(self):
        return HeadGroupNormModule

    def validate(self):
        self.require(self.eps > 0, "eps", f"must be positive, found {self.eps}")

    def parameters(self, width, heads, value_dim):
        return value_dim

    def flops(self, width, heads, value_dim):
        return 0


class GatedOutput(OutputMixer):
    """o * sigmoid(x W_g) (gated attention, arXiv 2505.06708), x the layer's normalised input."""

    per: Literal["head", "element"] = "head"
    """One gate a head, W_g [D, N], or one an element of its output, W_g [D, N, U]."""
    start: Literal["half", "identity"] = "half"
    """W_g drawn as any weight, so gates near 1/2; or W_g = 0 in o * 2 sigmoid(x W_g)."""

    @property
    def module(self):
        return GatedOutputModule

    def identity_at_start(self):
        return self.start == "identity"

    def parameters(self, width, heads, value_dim):
        return width * heads * (value_dim if self.per == "element" else 1)


class ExclusiveOutput(OutputMixer):
    """o - (o . v^) v^, v^ = v / |v| the token's own value (exclusive self-attention, arXiv
    2603.09078). Heads do not mix and there are no parameters."""

    reads_values = True

    @property
    def module(self):
        return ExclusiveOutputModule


class DifferentialOutput(OutputMixer):
    """o_n = a_2n - sigmoid(x w_n) a_2n+1 for pairs of query heads a that share a key/value head
    (differential attention V2): half as many heads leave as attend."""

    @property
    def module(self):
        return DifferentialOutputModule

    def heads(self, heads):
        return heads // 2

    def why_not(self, heads, shared):
        return None if shared % 2 == 0 else f"pairs of query heads share a key head, found {shared}"

    def parameters(self, width, heads, value_dim):
        return width * heads // 2


class MixtureOfHeads(OutputMixer):
    """g_n o_n: the first `shared_heads` are always on, of the others `top_k` a token (mixture of
    heads, arXiv 2410.11842).

    g = a_1 softmax(x W_s) for shared heads and a_2 softmax(x W_r) for the chosen ones, a =
    softmax(x W_a); without shared heads there is no a. Gates are `renormalised` in the authors'
    code: the chosen ones are divided by their sum, each kind is multiplied by its number of heads
    and a by 2. balance_rate * R^2 mean_i(P_i f_i) is added to the loss of each token, R the routed
    heads, P their mean softmax, f the share of tokens that chose them, summed over layers; the
    authors' code takes the mean, so that their rate is this one times the number of layers.
    Metrics, per layer: head_max_violation, the largest share over the mean one less 1, and
    head_gate_entropy, of P over log R.
    """

    mixes_heads = True
    shared_heads: int = 2
    """Heads that are always on, the first ones."""
    top_k: int = 3
    """Heads that a token chooses of the others."""
    gates: Literal["renormalised", "paper_scale"] = "renormalised"
    """Scaled so that equal scores leave every head as it is, or the formula as printed."""
    balance_rate: float = 0.01
    """Weight of the balance loss R^2 mean_i(P_i f_i)."""

    @property
    def module(self):
        return MixtureOfHeadsModule

    def validate(self):
        self.at_least(0, "shared_heads", "top_k", "balance_rate")
        self.require(self.shared_heads + self.top_k > 0, "top_k", "must be at least 1, found 0")

    def why_not(self, heads, shared):
        routed = heads - self.shared_heads
        if routed < 0 or self.top_k > routed or (routed > 0 and self.top_k == 0):
            return (
                f"of {heads} heads {self.shared_heads} are shared, which leaves {max(routed, 0)} "
                f"to choose top_k={self.top_k} from"
            )
        return None

    def parameters(self, width, heads, value_dim):
        kinds = 2 if 0 < self.shared_heads < heads else 0
        return width * (heads + kinds)


OUTPUT_MIXERS = {
    "none": NoOutputMixer,
    "group_norm": HeadGroupNorm,
    "gate": GatedOutput,
    "exclusive": ExclusiveOutput,
    "differential": DifferentialOutput,
    "mixture": MixtureOfHeads,
}


class OutputMixerModule(Module):
    """Base of the output mixers' modules, and the identity."""

    config: OutputMixer
    width: int
    heads: int
    value_dim: int

    def __call__(self, o_BTNU: jax.Array, x_BTD: jax.Array, v_BTKU: jax.Array):
        """(o~, Aux) from what attention returns, the layer's input and the tokens' own values; the
        last only for a config that `reads_values`."""
        return o_BTNU, no_aux()


class HeadGroupNormModule(OutputMixerModule):
    """See HeadGroupNorm."""

    @nn.compact
    def __call__(self, o_BTNU: jax.Array, x_BTD: jax.Array, v_BTKU: jax.Array):
        norm = RMSNorm(numerics=self.numerics, axis="head_dim", eps=self.config.eps, name="norm")
        return norm(o_BTNU), no_aux()


class GatedOutputModule(OutputMixerModule):
    """See GatedOutput."""

    @nn.compact
    def __call__(self, o_BTNU: jax.Array, x_BTD: jax.Array, v_BTKU: jax.Array):
        shape = {"embed": self.width, "heads": self.heads}
        if self.config.per == "element":
            shape["head_dim"] = self.value_dim
        identity = self.config.start == "identity"
        init = nn.initializers.zeros if identity else None
        gate = jax.nn.sigmoid(linear(x_BTD, self.weight("gate", init, **shape)))
        gate = 2 * gate if identity else gate
        return o_BTNU * gate.reshape(*o_BTNU.shape[:3], -1), no_aux()


class ExclusiveOutputModule(OutputMixerModule):
    """See ExclusiveOutput."""

    def __call__(self, o_BTNU: jax.Array, x_BTD: jax.Array, v_BTKU: jax.Array):
        v_BTNU = jnp.repeat(v_BTKU, self.heads // v_BTKU.shape[2], axis=2).astype(jnp.float32)
        along = jnp.sum(o_BTNU.astype(jnp.float32) * v_BTNU, axis=-1, keepdims=True)
        size = jnp.maximum(jnp.sum(jnp.square(v_BTNU), axis=-1, keepdims=True), 1e-12)
        return (o_BTNU - along / size * v_BTNU).astype(o_BTNU.dtype), no_aux()


class DifferentialOutputModule(OutputMixerModule):
    """See DifferentialOutput."""

    @nn.compact
    def __call__(self, o_BTNU: jax.Array, x_BTD: jax.Array, v_BTKU: jax.Array):
        weight = self.weight("gate", embed=self.width, heads=self.heads // 2)
        share = jax.nn.sigmoid(linear(x_BTD, weight))[..., None]
        return o_BTNU[:, :, 0::2] - share * o_BTNU[:, :, 1::2], no_aux()


class MixtureOfHeadsModule(OutputMixerModule):
    """See MixtureOfHeads. The routers work in float32."""

    @nn.compact
    def __call__(self, o_BTNU: jax.Array, x_BTD: jax.Array, v_BTKU: jax.Array):
        c, gates, aux = self.config, [], no_aux()
        S, R = c.shared_heads, self.heads - c.shared_heads
        renormalised = c.gates == "renormalised"
        # shared heads
        if S:
            gates.append(self._softmax("shared", x_BTD, S) * (S if renormalised else 1))
        # routed heads: the top_k of each token
        if R:
            p_BTR = self._softmax("routed", x_BTD, R)
            chosen_BTk = jax.lax.top_k(jax.lax.stop_gradient(p_BTR), c.top_k)[1]
            chosen_BTR = jnp.sum(jax.nn.one_hot(chosen_BTk, R, dtype=jnp.float32), axis=-2)
            gate_BTR = p_BTR * chosen_BTR
            if renormalised:
                gate_BTR *= c.top_k / jnp.sum(gate_BTR, axis=-1, keepdims=True)
            gates.append(gate_BTR)
            aux = routing(p_BTR, chosen_BTR, c.balance_rate)
        # the weight of either kind
        if S and R:
            kinds_BT2 = self._softmax("kinds", x_BTD, 2) * (2 if renormalised else 1)
            gates = [gate * kinds_BT2[..., i : i + 1] for i, gate in enumerate(gates)]
        g_BTN = jnp.concatenate(gates, axis=-1).astype(o_BTNU.dtype)
        return o_BTNU * g_BTN[..., None], aux

    def _softmax(self, name, x_BTD, size):
        weight = self.weight(name, dtype="float32", embed=self.width, router=size)
        return jax.nn.softmax(linear(x_BTD.astype(jnp.float32), weight), axis=-1)


def routing(p_BTR: jax.Array, chosen_BTR: jax.Array, balance_rate: float) -> Aux:
    """The balance loss of a router of heads and its metrics; see MixtureOfHeads."""
    R = p_BTR.shape[-1]
    p_R, f_R = jnp.mean(p_BTR, axis=(0, 1)), jnp.mean(chosen_BTR, axis=(0, 1))
    loss = balance_rate * R**2 * jnp.mean(p_R * f_R)
    entropy = -jnp.sum(p_R * jnp.log(jnp.maximum(p_R, 1e-30))) / jnp.log(jnp.maximum(R, 2))
    metrics = {
        "head_max_violation": jnp.max(f_R) / jnp.mean(f_R) - 1,
        "head_gate_entropy": entropy,
    }
    return Aux(loss, {}, jax.lax.stop_gradient(metrics))
