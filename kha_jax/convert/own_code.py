"""What no stock weights stand for: mixers that are not linear, for which a folder holds a file of
ours, `modeling_kha.py`, that subclasses the stock model.
"""

from pathlib import Path
from typing import Any

from kha_jax.attention import AttentionConfig
from kha_jax.attention.attention import SLOTS
from kha_jax.attention.mixers import KnockingGate, KnockingMLP, NoMixer
from kha_jax.convert.rows import Row
from kha_jax.convert.tables import LAYER
from kha_jax.errors import DataError
from kha_jax.inference.folding import fold_model
from kha_jax.model import ModelConfig

FILE, PREFIX, MIXERS = "modeling_kha.py", "kha_", "kha_mixers"
KINDS = {"mlp": KnockingMLP, "gate": KnockingGate}
PARAMETERS = {"mlp": ("gate", "up", "down"), "gate": ("gate",)}
SHORT = {slot: slot[0] for slot in SLOTS}
Variables = dict[str, Any]


def kept(attention: AttentionConfig) -> dict[str, str]:
    """The kinds of the mixers that the file computes, by q, k and v."""
    kinds = {cls: kind for kind, cls in KINDS.items()}
    found = {SHORT[slot]: kinds.get(type(mixer)) for slot, mixer in attention.mixers().items()}
    return {short: kind for short, kind in found.items() if kind}


def slots(attention: AttentionConfig) -> list[str]:
    """The slots of those mixers."""
    return [slot for slot, short in SHORT.items() if short in kept(attention)]


def with_kept(attention: AttentionConfig, kinds: dict[str, str]) -> AttentionConfig:
    """The attention with these mixers."""
    return attention.replace(
        **{slot: KINDS[kinds[short]]() for slot, short in SHORT.items() if short in kinds}
    )


def without_kept(attention: AttentionConfig) -> AttentionConfig:
    """The attention without them."""
    found = kept(attention)
    return attention.replace(**{slot: NoMixer() for slot, short in SHORT.items() if short in found})


def checked(where: Any, kinds: Any) -> dict[str, str]:
    """The mixers that a config.json names.

    Raises:
        DataError: they are not such.
    """
    usable = isinstance(kinds, dict) and set(kinds) <= set(SHORT.values())
    if not usable or not all(kind in KINDS for kind in kinds.values()):
        known = f"of {', '.join(SHORT.values())} to {' or '.join(KINDS)}"
        raise DataError(f"{where}: {MIXERS} is {kinds!r}; expected a map {known}")
    return kinds


def rows(attention: AttentionConfig) -> list[Row]:
    """Of the tensors that the file reads besides."""
    slots = {short: slot for slot, short in SHORT.items()}
    return [
        Row(
            f"attention/{slots[short]}_mixer/{name}",
            f"{LAYER}self_attn.{short}_proj.knocking_{name}",
        )
        for short, kind in kept(attention).items()
        for name in PARAMETERS[kind]
    ]


def fold(model: ModelConfig, variables: Variables) -> tuple[ModelConfig, Variables]:
    """The model whose linear mixers are folded, with those that the file computes.

    Raises:
        ConfigError: another mixer does not fold.
    """
    mixers, params = {}, dict(variables["params"])
    for segment in model.segments():
        names = [
            f"{slot}_mixer" for slot, short in SHORT.items() if short in kept(segment.attention)
        ]
        attention = dict(params[segment.name]["attention"])
        mixers[segment.name] = {name: attention.pop(name) for name in names}
        params[segment.name] = {**params[segment.name], "attention": attention}
    bare = model.with_attention(without_kept)
    folded, result = fold_model(bare, {**variables, "params": params})
    for name, own in mixers.items():
        layer = result["params"][name]
        result["params"][name] = {**layer, "attention": {**layer["attention"], **own}}
    kinds = kept(model.attention)
    return folded.with_attention(lambda attention: with_kept(attention, kinds)), result


def why(attention: AttentionConfig) -> str:
    """Why the folder needs the file, in words."""
    slots = {short: slot for slot, short in SHORT.items()}
    mixers = (f"{slots[short]}.kind={kind}" for short, kind in kept(attention).items())
    return f"{' and '.join(mixers)} is not linear, so no stock weights stand for it"


def write(folder: Path, architecture: str, kind: str) -> None:
    """Writes the file, for this class of transformers."""
    stock = architecture.removesuffix("ForCausalLM")
    text = (Path(__file__).parent / "files" / FILE).read_text()
    text = text.replace("LlamaConfig", f"{stock}Config").replace(
        "LlamaForCausalLM", f"{stock}ForCausalLM"
    )
    text = text.replace('"kha_llama"', f'"{PREFIX}{kind}"').replace(
        '"""Llama with', f'"""{stock} with'
    )
    (folder / FILE).write_text(text)


def keys(kind: str, attention: AttentionConfig) -> dict[str, Any]:
    """What config.json says besides."""
    names = {"AutoConfig": "KhaConfig", "AutoModelForCausalLM": "KhaForCausalLM"}
    return {
        "architectures": ["KhaForCausalLM"],
        "model_type": PREFIX + kind,
        "auto_map": {auto: f"modeling_kha.{name}" for auto, name in names.items()},
        MIXERS: kept(attention),
    }
