"""What the benchmark times, here and in the peers: each function makes a step that is called again
and again.

The peer shape is the small transformer of LAYERS, WIDTH, ... below in float32; its figures are in
docs/performance.md.
"""

import os
from typing import Any

import numpy as np

from experiments.timing.turns import Step

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, VOCABULARY = 4, 256, 8, 4, 64, 768, 4096
EXPERTS, TOP_K, EXPERT_WIDTH = 16, 4, 192
BATCH, LENGTH = 8, 256
PROMPT, NEW = 32, 128  # of what is decoded


def peer_run(variant: str, mixture: bool = False) -> Any:
    """The peer shape as a RunConfig; `variant` is a name of configs.base.variants. mixture: 16
    experts of 192, 4 active."""
    from configs import base
    from kha_jax.attention import AttentionConfig
    from kha_jax.attention.projections import GroupedQuery
    from kha_jax.feed_forward import MoE, SwiGLU
    from kha_jax.model import LossConfig, ModelConfig
    from kha_jax.modules import Numerics
    from kha_jax.training.run_config import RunConfig

    attention = AttentionConfig(
        projection=GroupedQuery(query_heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    )
    model = ModelConfig(
        layers=LAYERS,
        width=WIDTH,
        vocabulary_size=VOCABULARY,
        stack="unroll",
        attention=base.varied(attention, variant),
        feed_forward=MoE(experts=EXPERTS, top_k=TOP_K, width=EXPERT_WIDTH)
        if mixture
        else SwiGLU(width=FEED_FORWARD),
        numerics=Numerics(dtype="float32"),
        loss=LossConfig(chunk_tokens=512),
    )
    return RunConfig(batch_size=BATCH, seq_len=LENGTH, model=model)


def training_step(variant: str, mixture: bool = False) -> Step:
    """The trainer's own step."""
    from experiments.timing.steps import TrainingStep

    return TrainingStep(peer_run(variant, mixture))


def generation(variant: str, batch: int) -> Step:
    """NEW greedy tokens after a prompt by kha_jax.inference, linear mixers folded."""
    from experiments.timing.steps import decoding_step

    return decoding_step(peer_run(variant).model, batch, PROMPT, NEW)


def random_ids(seed: int, rows: int, length: int) -> np.ndarray:
    """Those that `timing.steps` has with this seed, [rows, length]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length))


def transformers_model(mixture: bool = False) -> Any:
    """Qwen3 of the peer shape in transformers, or Qwen3-MoE with grouped_mm experts, on all
    cores."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
        use_cache=False,
        eos_token_id=None,
    )
    if not mixture:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)).float()
    experts = dict(
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=EXPERT_WIDTH,
        norm_topk_prob=True,
    )
    config = transformers.Qwen3MoeConfig(**shape, **experts, experts_implementation="grouped_mm")
    return transformers.Qwen3MoeForCausalLM(config).float()


def transformers_step(compiled: bool, mixture: bool = False) -> Step:
    """The same in transformers: loss, backward, clipping and AdamW, as its Trainer does them."""
    import torch

    model = transformers_model(mixture)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=7.5e-4, betas=(0.9, 0.95), weight_decay=0.1
    )
    ids = torch.from_numpy(random_ids(0, BATCH, LENGTH + 1)[:, :-1].copy())

    def step():
        forward(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matmul_step(size: int = 2048) -> Step:
    """One square float32 product in JAX, for the machine's matmul rate."""
    import jax
    import jax.numpy as jnp

    x, product = jnp.ones((size, size)), jax.jit(jnp.matmul)
    return lambda: product(x, x).block_until_ready()


def expert_step(kernel: str, E: int, K: int) -> Step:
    """Forward and backward of `ops.experts` on 2048 tokens with an even random choice, in float32;
    `dense` is one feed-forward of an expert's width on as many rows."""
    import jax
    import jax.numpy as jnp

    from kha_jax.ops.experts import experts
    from kha_jax.ops.gating import swiglu

    N, D, F = BATCH * LENGTH, WIDTH, EXPERT_WIDTH
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape) * 0.05, jnp.float32)

    chosen = jnp.asarray(np.argsort(draw.random((N, E)), axis=1)[:, :K])
    if kernel == "dense":
        arguments = normal(N * K, D), normal(D, F), normal(D, F), normal(F, D)

        def value(x, gate, up, down, chosen):
            return jnp.sum(swiglu(x @ gate, x @ up) @ down)
    else:
        arguments = normal(N, D), normal(N, K), normal(E, D, F), normal(E, D, F), normal(E, F, D)

        def value(x, weights, gate, up, down, chosen):
            return jnp.sum(experts(x, chosen, weights, gate, up, down, kernel=kernel))

    step = jax.jit(jax.value_and_grad(value, argnums=tuple(range(len(arguments)))))
    return lambda: jax.block_until_ready(step(*arguments, chosen))


def transformers_generation(cache: str, batch: int) -> Step:
    """The same by transformers' generate with one of its caches."""
    import torch

    model = transformers_model().eval()
    ids = torch.from_numpy(random_ids(1, batch, PROMPT))
    settings = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "cache_implementation": cache,
        "use_cache": True,
    }
    return lambda: model.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings
    )


def one_more_token(projection: Any, slots: int, batch: int) -> Step:
    """One decoding step of the peer shape with this projection, whose cache of `slots` is full but
    for one."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from kha_jax.inference import decoding, layers

    model = peer_run("baseline").model
    model = model.replace(
        attention=model.attention.replace(projection=projection, kernel="chunked")
    )
    variables = nn.unbox(jax.jit(model.build().init)(jax.random.key(0), np.zeros((1, 8), np.int32)))
    weights, pad = layers.unstack(model, variables), jnp.zeros((batch,), jnp.int32)
    ids = jax.ShapeDtypeStruct((batch, 8), jnp.int32)
    _, shapes = jax.eval_shape(
        lambda w, t, p: decoding.prefill(model, w, t, p, slots), weights, ids, pad
    )
    box = [jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)]
    extend = jax.jit(
        lambda w, cache, t, slot, p: decoding.extend(model, w, cache, t, slot, p), donate_argnums=1
    )

    def step():
        logits, cache = extend(weights, box.pop(), pad[:, None], jnp.int32(slots - 1), pad)
        box.append(cache)
        logits.block_until_ready()

    return step
