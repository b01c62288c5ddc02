"""The families of stock checkpoints: of each `model_type` how its config.json is a model of ours,
and back, and how its tensors are called.
"""

from typing import Any, Callable, NamedTuple

from kha_jax.attention.projections import GroupedQuery, Latent, Projection
from kha_jax.config import ConfigError, differences
from kha_jax.convert import own_code, reading, writing
from kha_jax.convert.keys import Keys
from kha_jax.convert.tables import Names
from kha_jax.errors import DataError
from kha_jax.feed_forward import FeedForward, MoE, SwiGLU
from kha_jax.model import AttentionFrom, LossConfig, ModelConfig, SameAttention
from kha_jax.modules import Numerics

Values = dict[str, Any]
NO_BIASES = False, False
HOW = (
    "balancing_rate",
    "router_z_loss",
    "kernel",
    "chunk_tokens",
)  # a mixture is trained, computed


class Family(NamedTuple):
    """architecture: class of transformers. read: a model from its keys. write: the keys of a model.
    feed_forward, projection: what the model has to have. names: of its tensors."""

    architecture: str
    read: Callable[[Keys], ModelConfig]
    write: Callable[[ModelConfig], Values]
    feed_forward: type[FeedForward] = SwiGLU
    projection: type[Projection] = GroupedQuery
    names: Names = Names()


# The first one that can stand for a model is written where there was no stock folder.
FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        "Qwen3ForCausalLM",
        lambda keys: reading.model(
            keys, reading.grouped(keys, "rms", head_dim=128), reading.swiglu(keys)
        ),
        writing.unwindowed,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        lambda keys: reading.model(keys, reading.grouped(keys), reading.swiglu(keys)),
        writing.dense,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda keys: reading.model(
            keys, reading.grouped(keys, biases=(True, False)), reading.swiglu(keys)
        ),
        writing.qwen2,
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        lambda keys: reading.model(keys, reading.seed_oss(keys), reading.swiglu(keys)),
        writing.seed_oss,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        lambda keys: reading.model(
            keys, reading.grouped(keys, window=4096, biases=NO_BIASES), reading.swiglu(keys)
        ),
        writing.mistral,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        lambda keys: reading.model(keys, reading.grouped(keys, "rms"), reading.qwen3_mixture(keys)),
        writing.qwen3_moe,
        MoE,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        lambda keys: reading.model(
            keys, reading.grouped(keys, theta=1e6, biases=NO_BIASES), reading.mixtral_mixture(keys)
        ),
        writing.mixtral,
        MoE,
        names=Names(mixture="block_sparse_moe", experts=("w1", "w3", "w2")),
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        lambda keys: reading.model(
            keys, reading.glm(keys), reading.sigmoid_mixture(keys, dense=1, normalise=True), 1e-5
        ),
        writing.glm4_moe,
        MoE,
        names=Names(bias="gate.e_score_correction_bias"),
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        lambda keys: reading.model(
            keys,
            reading.grouped(keys, "rms", window=4096),
            reading.sigmoid_mixture(keys, dense=0, normalise=False),
        ),
        writing.dots1,
        MoE,
        names=Names(bias="gate.e_score_correction_bias"),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        lambda keys: reading.model(
            keys, reading.latent(keys), reading.sigmoid_mixture(keys, dense=3, normalise=True)
        ),
        writing.deepseek_v3,
        MoE,
        Latent,
        names=Names(bias="gate.e_score_correction_bias"),
    ),
    "bailing_moe": Family(
        "BailingMoeV2ForCausalLM",
        lambda keys: reading.model(
            keys, reading.bailing(keys), reading.bailing_mixture(keys), 1e-5
        ),
        writing.bailing,
        MoE,
        names=Names(
            bias="gate.expert_bias",
            merged="attention.query_key_value",
            norms=("attention.query_layernorm", "attention.key_layernorm"),
            output="attention.dense",
            embedding="model.word_embeddings.weight",
        ),
    ),
}
FAMILIES["kimi_k2"] = FAMILIES["deepseek_v3"]  # another name, which chooses a tool-call parser
# Known, and what they have that our models do not.
REFUSED = {
    "olmo2": "norms after the layer and over all heads",
    "olmo3": "norms after the layer and over all heads, and windows",
    "smollm3": "layers without positions among others",
    "gemma": "norms with 1 + w and scaled embeddings",
    "gemma2": "soft caps and norms around the layer",
    "gemma3": "norms around the layer and windows",
    "gemma3_text": "norms around the layer and windows",
    "gpt_oss": "sinks, biases of experts and clamped activations",
    "qwen3_next": "linear attention",
    "bailing_hybrid": "linear attention",
}


def function_of(model: ModelConfig) -> ModelConfig:
    """The model with everything at its default that does not decide which function it is."""
    mixture = model.feed_forward
    if isinstance(mixture, MoE):
        fields = {name: MoE.__dataclass_fields__[name].default for name in HOW}
        mixture = mixture.replace(**fields, balancing="none")
    eps = model.numerics.norm_eps
    plain = model.with_attention(
        lambda a: a.replace(kernel="auto", projection=explicit(a.projection, eps))
    )
    if isinstance(plain.later, AttentionFrom) and plain.later.attention == plain.attention:
        plain = plain.replace(later=SameAttention())
    numerics = Numerics(norm_eps=eps)
    loss = LossConfig()
    return plain.replace(
        stack="scan", remat="none", loss=loss, numerics=numerics, feed_forward=mixture
    )


def explicit(projection: Projection, norm_eps: float) -> Projection:
    """The projection with every width that a None stands for."""
    if isinstance(projection, Latent):
        return projection.replace(
            value_dim=projection.value_width,
            rope_dim=projection.rotary_width,
            kv_lora=projection.latent_width,
            norm_eps=projection.norm_eps or norm_eps,
        )
    if isinstance(projection, GroupedQuery) and projection.rope_dim == projection.head_dim:
        return projection.replace(rope_dim=None)
    return projection


def why_not(kind: str, model: ModelConfig) -> str | None:
    """Why a config.json of this family cannot describe the model, or None."""
    family, function = FAMILIES[kind], function_of(model)
    slots = {"projection": type(function.attention.projection) is family.projection}
    slots["feed_forward"] = type(function.feed_forward) is family.feed_forward
    for name, fits in slots.items():
        if not fits:
            held = function.attention.projection if name == "projection" else function.feed_forward
            return f"{kind} has no {type(held).__name__}"
    try:
        written = {**family.write(function), "model_type": kind, "max_position_embeddings": 1}
        back = function_of(read_config(kind, written))
    except DataError as error:
        return str(error)
    for field, (was, now) in differences(function, back, "config.model").items():
        return f"{field} is {was!r}, and {kind} has {now!r}"
    return None


def family_of(where: Any, config: Values) -> tuple[str, Family]:
    """The model_type and the family that a config.json names, without the mixers of our own file.

    Raises:
        DataError: there is none here.
    """
    kind = str(config.get("model_type")).removeprefix(own_code.PREFIX)
    if kind in REFUSED:
        raise DataError(f"{where}: model_type is {kind!r}, which has {REFUSED[kind]}")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise DataError(f"{where}: model_type is {kind!r}, which is not known; use one of {known}")
    return kind, FAMILIES[kind]


def read_config(where: Any, config: Values) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
        DataError: names the key that cannot be computed here, its value and what would work.
    """
    keys = Keys(where, config)
    kind, family = family_of(where, config)
    try:
        model = family.read(keys)
        if config["model_type"] != kind:
            kinds = own_code.checked(where, keys.take(own_code.MIXERS))
            model = model.with_attention(lambda a: own_code.with_kept(a, kinds))
    except ConfigError as error:
        raise DataError(f"{where}: the model that it describes cannot be: {error}") from None
    keys.finish()
    return model
