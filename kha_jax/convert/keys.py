"""The keys of a config.json, each of them understood or refused.

Two dialects are read: that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and that
of 5 (`rope_parameters`, `dtype`). Both are written, since either version takes its own defaults,
without a word, for keys that it does not find.
"""

import math
from typing import Any

from kha_jax.errors import DataError

# What decides nothing that the logits depend on.
IGNORED = set(
    "architectures auto_map bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id "
    "decoder_start_token_id dtype torch_dtype transformers_version use_cache initializer_range "
    "_name_or_path name_or_path _attn_implementation _attn_implementation_autoset "
    "output_attentions output_hidden_states output_router_logits return_dict use_return_dict "
    "router_aux_loss_coef aux_loss_alpha seq_aux pretraining_tp max_window_layers ep_size "
    "mtp_loss_scaling_factor "
    "is_llama_config is_encoder_decoder is_decoder id2label label2id problem_type "
    "tokenizer_class torchscript task_specific_params transformers.js_config unsloth_fixed "
    "chunk_size_feed_forward".split()
)
# What decides something, with the values for which our models compute the same.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "embd_pdrop": (0, None),
    "embedding_dropout": (0, None),
    "hidden_act": ("silu", "swish"),
    "hidden_dropout": (0, None),
    "mlp_bias": (False, None),
    "norm_head": (False, None),
    "norm_softmax": (False, None),
    "output_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "resid_pdrop": (0, None),
    "rope_interleaved": (False, None),
    "router_dtype": ("fp32", "float32", None),
    "router_jitter_noise": (0, None),
    "use_rmsnorm": (True, None),
    "use_sliding_window": (False, None),
}


class Keys:
    """The keys of one config.json. Whoever takes one has understood it; `finish` refuses the rest.

    Raises:
        DataError: by every method, with the key, its value and what would work.
    """

    def __init__(self, where: Any, values: dict[str, Any]):
        self.where, self.values, self.taken = where, values, set()
        self.turned = 1.0  # share of a head that is rotated, where somebody has asked

    def refuse(self, name: str, problem: str) -> DataError:
        """The error of a key."""
        value = repr(self.values[name]) if name in self.values else "not there"
        return DataError(f"{self.where}: {name} is {value}; {problem}")

    def take(self, *names: str, default: Any = None, null: bool = True) -> Any:
        """The value of the first of these names that is there. null: whether null means that it is
        not."""
        self.taken |= set(names)
        for name in names:
            if name in self.values and not (null and self.values[name] is None):
                return self.values[name]
        return default

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` on, which must be there without a default."""
        value = self.take(*names, default=default)
        if type(value) is not int or not least <= value < 2**40:
            raise self.refuse(names[0], f"expected a whole number from {least} on")
        return value

    def longest(self) -> int:
        """The longest text that the model is meant for; 0: not said."""
        return self.count("max_position_embeddings", default=0, least=0)

    def items(self, name: str, default: list[Any]) -> list[Any]:
        """A list."""
        value = self.take(name, default=default)
        if not isinstance(value, list):
            raise self.refuse(name, "expected a list")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A number above zero, which must be there without a default."""
        return self._positive(names[0], self.take(*names, default=default))

    def _positive(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refuse(name, "expected a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.take(name, default=default)
        if not isinstance(value, bool):
            raise self.refuse(name, "expected true or false")
        return value

    def only(self, name: str, *values: Any, default: Any = None, why: str) -> None:
        """Takes a key that may have these values alone."""
        if self.take(name, default=default) not in values:
            raise self.refuse(name, why)

    def rotary(self, theta: float) -> tuple[float, dict[str, Any]]:
        """(base, scaling): the base of the rotary frequencies, `theta` where none is named, and the
        scaling's own keys with its `rope_type`; empty without one."""
        old = self.take("rope_scaling", default={})
        new = self.take("rope_parameters", default={})
        for name, value in (("rope_scaling", old), ("rope_parameters", new)):
            if not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()):
                raise self.refuse(name, "one set of values for all layers is expected")
        both = [_scaling(values) for values in (old, new) if values]
        if len(both) == 2 and both[0] != both[1]:
            raise self.refuse("rope_scaling", f"rope_parameters says otherwise: {new!r}")
        bases = {
            name: self._positive(name, value)
            for name, value in (
                ("rope_theta", self.take("rope_theta")),
                ("rope_parameters", new.get("rope_theta")),
            )
            if value is not None
        }
        if len(set(bases.values())) > 1:
            raise self.refuse("rope_theta", f"rope_parameters says otherwise: {new!r}")
        return next(iter(bases.values()), theta), both[0] if both else {}

    def rotated(self, default: float) -> float:
        """The share of a head's features that is rotated."""
        share = self.take("partial_rotary_factor", default=self._rotated_inside() or default)
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise self.refuse("partial_rotary_factor", "expected a share above 0, at most 1")
        self.turned = share
        return share

    def _rotated_inside(self) -> Any:
        new = self.values.get("rope_parameters")
        return new.get("partial_rotary_factor") if isinstance(new, dict) else None

    def finish(self) -> None:
        """Refuses what nobody has taken and what is not known to change nothing."""
        if self._rotated_inside() not in (None, self.turned):
            problem = f"its partial_rotary_factor can only be {self.turned} here"
            raise self.refuse("rope_parameters", problem)
        for name in sorted(self.values.keys() - self.taken - IGNORED):
            if name not in NEUTRAL:
                raise self.refuse(name, "what it does is not known here; remove it if nothing")
            if self.values[name] not in NEUTRAL[name]:
                raise self.refuse(name, f"only {NEUTRAL[name][0]!r} can be computed here")


def _scaling(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a rotary scaling alone."""
    kind = values.get("rope_type", values.get("type", "default"))
    others = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    own = {k: v for k, v in values.items() if k not in others}
    return {} if kind == "default" else {"rope_type": kind, **own}
