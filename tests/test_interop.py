"""The transformer against stock Qwen3 of transformers on PyTorch (extra: interop)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kha_jax.attention import AttentionConfig
from kha_jax.attention.mixers import KnockingLinear, KnockingMLP
from kha_jax.attention.projections import GroupedQuery
from kha_jax.feed_forward import MoE, SwiGLU
from kha_jax.feed_forward.moe import route
from kha_jax.model import ModelConfig
from kha_jax.modules import Numerics
from tests import cases

torch = pytest.importorskip("torch", reason="needs the extra: pip install -e '.[interop]'")
transformers = pytest.importorskip(
    "transformers", reason="needs the extra: pip install -e '.[interop]'"
)
modeling_rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
modeling_qwen3_moe = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
modeling_deepseek_v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")

D, N, K, H, F, V, LAYERS = 48, 6, 2, 16, 80, 97, 2


@functools.cache
def stock():
    """A small random Qwen3, with norm weights moved away from one."""
    config = transformers.Qwen3Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(**mixers):
    attention = AttentionConfig(
        projection=GroupedQuery(query_heads=N, kv_heads=K, head_dim=H), **mixers
    )
    numerics = Numerics(dtype="float32")
    return ModelConfig(
        layers=LAYERS,
        width=D,
        vocabulary_size=V,
        attention=attention,
        feed_forward=SwiGLU(width=F),
        numerics=numerics,
    ).build()


def params_from(model):
    """Qwen3's weights under our names: kernels are transposed, heads split, layers stacked."""
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}

    def stack(name, *shape):
        return np.stack(
            [weights[f"model.layers.{i}.{name}.weight"].T.reshape(*shape) for i in range(LAYERS)]
        )

    def norm(name):
        return {"scale": stack(name, -1)}

    layers = {
        "attention_norm": norm("input_layernorm"),
        "feed_forward_norm": norm("post_attention_layernorm"),
        "attention": {
            "projection": {
                "query": stack("self_attn.q_proj", D, N, H),
                "key": stack("self_attn.k_proj", D, K, H),
                "value": stack("self_attn.v_proj", D, K, H),
                "query_norm": norm("self_attn.q_norm"),
                "key_norm": norm("self_attn.k_norm"),
            },
            "output": stack("self_attn.o_proj", N, H, D),
        },
        "feed_forward": {
            "gate": stack("mlp.gate_proj", D, F),
            "up": stack("mlp.up_proj", D, F),
            "down": stack("mlp.down_proj", F, D),
        },
    }
    final = {"scale": weights["model.norm.weight"]}
    return {
        "embedding": weights["model.embed_tokens.weight"],
        "layers": layers,
        "final_norm": final,
    }


@pytest.mark.parametrize("name", cases.SCALINGS)
def test_scaled_rotary_is_that_of_transformers(name):
    """Frequencies, the factor on cos and sin, and the one on latent attention's logits."""
    scaling = cases.SCALINGS[name]
    given = cases.scaling(scaling)["scaling"]
    rope = {"rope_type": given.pop("kind"), "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    rope |= {name: number for name, number in given.items() if number is not None}
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=rope)
    theirs, factor = modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    np.testing.assert_allclose(scaling.frequencies(5e5, 64), theirs.numpy(), rtol=2e-6)
    assert math.isclose(scaling.rotation_factor(), factor)
    latent = modeling_deepseek_v3.yarn_apply_mscale(rope, 1.0)
    assert math.isclose(scaling.latent_factor(), latent)


ROUTERS = {
    "groups": MoE(experts=8, top_k=3, groups=4, groups_used=2, routed_scaling=2.5),
    "sums kept": MoE(experts=8, top_k=2, normalise=False),
    "softmax": MoE(experts=8, top_k=2, normalise=False, scores="softmax", balancing="none"),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_those_of_transformers(name):
    """DeepSeek-V3's, with negative biased scores too, and Qwen3-MoE's."""
    config, draw = ROUTERS[name], np.random.default_rng(0)
    x_BTD, router_DE = (np.float32(draw.normal(size=size)) for size in ((2, 50, D), (D, 8)))
    bias_E = np.float32(draw.normal(size=8)) if config.scores == "sigmoid" else np.zeros(8)
    sizes = {"hidden_size": D, "num_experts_per_tok": config.top_k}
    sizes |= {"norm_topk_prob": config.normalise}
    if config.scores == "sigmoid":
        sizes |= {"n_group": config.groups, "topk_group": config.groups_used}
        sizes |= {"n_routed_experts": 8, "routed_scaling_factor": config.routed_scaling}
        module = modeling_deepseek_v3.DeepseekV3TopkRouter(transformers.DeepseekV3Config(**sizes))
        module.e_score_correction_bias = torch.from_numpy(bias_E)
    else:
        theirs = transformers.Qwen3MoeConfig(num_experts=8, **sizes)
        module = modeling_qwen3_moe.Qwen3MoeTopKRouter(theirs)
    module.weight.data = torch.from_numpy(router_DE.T.copy())
    _, weights, chosen = module(torch.from_numpy(x_BTD))
    _, ours, ours_weights = route(config, x_BTD @ router_DE, bias_E)
    found, expected = np.zeros((2, 100, 8))
    np.put_along_axis(found, np.reshape(ours, (100, -1)), np.reshape(ours_weights, (100, -1)), 1)
    np.put_along_axis(expected, chosen.numpy(), weights.detach().numpy(), 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


TOKENS = np.random.default_rng(0).integers(0, V, (3, 150))


def test_the_baseline_is_qwen3():
    with torch.no_grad():
        expected = stock()(input_ids=torch.from_numpy(TOKENS)).logits.numpy()
    logits = jax.jit(ours().apply)({"params": params_from(stock())}, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=2e-4)


def test_gradients_are_qwen3s():
    model = stock()
    model.zero_grad()
    ids = torch.from_numpy(TOKENS)
    logits = model(input_ids=ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), ids[:, 1:].reshape(-1), reduction="sum"
    ).backward()
    batch = {
        "tokens": TOKENS[:, :-1],
        "targets": TOKENS[:, 1:],
        "weights": np.ones((3, 149), np.float32),
        "positions": np.tile(np.arange(149), (3, 1)),
        "segment_ids": np.zeros((3, 149), np.int32),
    }
    grads = jax.jit(jax.grad(lambda p: ours().apply({"params": p}, batch, method="loss")[0]))(
        params_from(model)
    )
    for name, ours_grad in {
        "model.embed_tokens.weight": grads["embedding"],
        "model.layers.1.self_attn.k_proj.weight": grads["layers"]["attention"]["projection"]["key"][
            1
        ]
        .reshape(D, -1)
        .T,
        "model.layers.0.self_attn.q_norm.weight": grads["layers"]["attention"]["projection"][
            "query_norm"
        ]["scale"][0],
        "model.layers.0.mlp.down_proj.weight": grads["layers"]["feed_forward"]["down"][0].T,
    }.items():
        theirs = dict(model.named_parameters())[name].grad.numpy()
        np.testing.assert_allclose(ours_grad, theirs, rtol=2e-3, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "mixers", [{"value": KnockingMLP()}, {"query": KnockingLinear(), "key": KnockingLinear()}]
)
def test_a_fresh_mixer_in_a_stock_model_changes_nothing(mixers):
    params = params_from(stock())
    fresh = jax.jit(ours(**mixers).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    fresh = jax.tree.map(
        lambda box: getattr(box, "value", box), fresh, is_leaf=lambda box: hasattr(box, "names")
    )
    added = {
        name: leaf for name, leaf in fresh["layers"]["attention"].items() if name.endswith("_mixer")
    }
    assert len(added) == len(mixers)
    with_mixers = {
        **params,
        "layers": {**params["layers"], "attention": {**params["layers"]["attention"], **added}},
    }
    base, knocking = (
        jax.jit(ours().apply)({"params": params}, TOKENS),
        jax.jit(ours(**mixers).apply)({"params": with_mixers}, TOKENS),
    )
    np.testing.assert_array_equal(base, knocking)
