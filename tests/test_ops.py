"""Numerics on arrays against float64 NumPy written from the formulas, and hand-written gradients
against autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kha_jax.ops import rope
from kha_jax.ops.attention import Case, ScoreMaps, attention, best_kernel, why_not
from kha_jax.ops.attention_splash import LARGE, Blocks, splash, splash_blocks
from kha_jax.ops.gating import sigmoid_gate, swiglu
from kha_jax.ops.linear import linear
from kha_jax.ops.norm import rms_norm
from tests import cases, reference_parts


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_rms_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


PLAIN = {
    "rms_norm": (rms_norm, plain_rms_norm, (normal(0, 2, 3, 8), normal(1, 8))),
    "swiglu": (swiglu, lambda g, u: g / (1 + jnp.exp(-g)) * u, (normal(0, 4, 5), normal(1, 4, 5))),
    "sigmoid_gate": (
        sigmoid_gate,
        lambda g, v: 2 * v / (1 + jnp.exp(-g)),
        (normal(0, 4, 5), normal(1, 4, 5)),
    ),
    "linear": (
        linear,
        lambda x, w: jnp.einsum("btd,dnh->btnh", x, w),
        (normal(0, 2, 3, 4), normal(1, 4, 5, 6)),
    ),
    "linear_2": (
        functools.partial(linear, contract=2),
        lambda x, w: jnp.einsum("btnh,nhd->btd", x, w),
        (normal(0, 2, 3, 4, 5), normal(1, 4, 5, 6)),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_written_out_gradients_are_those_of_the_plain_formula(name):
    ours, plain, arguments = PLAIN[name]
    cotangent = normal(9, *plain(*arguments).shape)
    (value, back), (expected, expected_back) = (jax.vjp(f, *arguments) for f in (ours, plain))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(back(cotangent), expected_back(cotangent)):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_norms_are_float32_inside():
    x = jnp.asarray(300 * normal(0, 4, 64), jnp.bfloat16)
    expected = reference_parts.rms_norm(np.asarray(x, np.float64), np.ones(64), 1e-6)
    assert rms_norm(x, jnp.ones(64)).dtype == jnp.bfloat16
    ours = np.asarray(rms_norm(x, jnp.ones(64)), np.float64)
    np.testing.assert_allclose(ours, expected, rtol=2**-8)  # a mean in bfloat16 is twice as far off


def test_rotary_is_the_reference_and_relative():
    x = normal(0, 2, 7, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 900]])
    frequencies = rope.frequencies(10_000.0, 8)
    ours = rope.rotate(jnp.asarray(x), jnp.asarray(positions), frequencies)
    np.testing.assert_allclose(
        ours, reference_parts.rotate(x.astype(np.float64), positions, 10_000.0), atol=1e-4
    )
    np.testing.assert_allclose(ours[:, 0], x[:, 0], atol=1e-7)

    def dot(shift):
        return np.einsum(
            "btnr,bsnr->bnts",
            *(
                rope.rotate(jnp.asarray(x), jnp.asarray(positions + shift), frequencies)
                for _ in range(2)
            ),
        )

    np.testing.assert_allclose(dot(0), dot(37), atol=2e-3)


@pytest.mark.parametrize("name", cases.SCALINGS)
def test_scaled_frequencies_are_the_references(name):
    scaling = cases.SCALINGS[name]
    given = cases.scaling(scaling)["scaling"]
    for theta, width in ((10_000.0, 64), (5e5, 128), (2.0, 2)):
        ours = scaling.frequencies(theta, width)
        expected = [reference_parts.frequency(theta, i, width, given) for i in range(width // 2)]
        np.testing.assert_allclose(ours, expected, rtol=1e-12)
        assert ours.dtype == np.float64
    assert len(scaling.frequencies(10_000.0, 0)) == 0  # no positions


def case(T, N, K, H, U, packed, seed=0):
    """Random q, k, v and, when packed, segment ids with documents of uneven lengths."""
    q, k, v = normal(seed, 2, T, N, H), normal(seed + 1, 2, T, K, H), normal(seed + 2, 2, T, K, U)
    segments = np.stack(
        [np.searchsorted([T // 5, T // 2], np.arange(T), side="right"), np.arange(T) // 37]
    ).astype(np.int32)
    return (q, k, v), segments if packed else None


def expected_attention(q, k, v, segments, scale):
    """float64, one head of one row at a time."""
    B, T, N, _ = q.shape
    out = np.zeros((B, T, N, v.shape[-1]))
    for b in range(B):
        mask = np.tril(np.ones((T, T), bool))
        if segments is not None:
            mask &= segments[b][:, None] == segments[b][None, :]
        for n in range(N):
            m = n // (N // k.shape[2])
            s = np.where(
                mask,
                scale * q[b, :, n].astype(np.float64) @ k[b, :, m].T.astype(np.float64),
                -np.inf,
            )
            p = np.exp(s - s.max(axis=-1, keepdims=True))
            out[b, :, n] = p / p.sum(axis=-1, keepdims=True) @ v[b, :, m]
    return out


# below, at and across the chunk of 128
SHAPES = [
    (40, 4, 2, 8, 8),
    (128, 2, 2, 8, 8),
    (300, 4, 1, 16, 16),
]


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"T{s[0]}")
@pytest.mark.parametrize("kernel", ["reference", "chunked", "xla"])
def test_kernels_are_the_formula(kernel, shape, packed):
    qkv, segments = case(*shape, packed)
    ours = jax.jit(lambda q, k, v, s: attention(q, k, v, s, kernel=kernel, scale=0.3))(
        *qkv, segments
    )
    np.testing.assert_allclose(ours, expected_attention(*qkv, segments, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("kernel", ["chunked", "xla"])
def test_gradients_of_kernels_agree(kernel, packed):
    qkv, segments = case(300, 4, 2, 8, 8, packed)
    cotangent = normal(7, 2, 300, 4, 8)

    def pull(name):
        return jax.jit(
            lambda *z: jax.vjp(lambda *x: attention(*x, segments, kernel=name), *z)[1](cotangent)
        )

    grads = [pull(name)(*qkv) for name in (kernel, "reference")]
    for ours, expected in zip(*grads):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("key_width", "value_width"), [(128, 128), (192, 128)])
def test_the_tpu_kernel_in_interpret_mode(key_width, value_width):
    qkv, segments = case(128, 2, 1, key_width, value_width, True)
    ours = splash(*qkv, segments, key_width**-0.5, interpret=True)
    np.testing.assert_allclose(
        ours, expected_attention(*qkv, segments, key_width**-0.5), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_the_tpu_kernel_in_several_blocks_has_the_gradients_of_the_formula(fused):
    limits = {192: Blocks(256, 256, 128, fused)}
    (q, k, v), segments = case(512, 2, 1, 128, 128, True)
    cotangent = normal(7, 2, 512, 2, 128)

    def pull(run):
        return jax.vjp(lambda *qkv: run(*qkv, segments), q, k, v)[1](cotangent)

    ours = pull(functools.partial(splash, scale=128**-0.5, limits=limits, interpret=True))
    for found, expected in zip(ours, pull(functools.partial(attention, kernel="reference"))):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_splash_blocks_divide_the_rows():
    assert splash_blocks(8192, 128) == (1024, 1024, 512, False)
    assert splash_blocks(8192, 256) == (512, 512, 512, False)
    for length in (128, 640, 1280, 8192):
        q, kv, compute, _ = splash_blocks(length, 192)
        assert length % q == length % kv == kv % compute == 0 and min(q, kv, compute) >= 128


def test_parts_of_the_queries_gradient_stay_few():
    """One for every block of keys: a row of 131,072 would have 64 of them."""
    assert splash_blocks(8192, 128, LARGE).fused and not splash_blocks(2**17, 128, LARGE).fused


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_values_may_be_wider_than_keys(kernel):
    qkv, segments = case(150, 4, 2, 8, 24, True)
    np.testing.assert_allclose(
        attention(*qkv, segments, kernel=kernel),
        expected_attention(*qkv, segments, 8**-0.5),
        rtol=1e-4,
        atol=1e-5,
    )


def test_bfloat16_stays_close():
    qkv, segments = case(200, 4, 2, 16, 16, True)
    ours = attention(*(jnp.asarray(z, jnp.bfloat16) for z in qkv), segments, kernel="chunked")
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), expected_attention(*qkv, segments, 0.25), atol=5e-2
    )


TPU = Case("tpu", jnp.bfloat16, 256, 128, 128)
GPU = Case("gpu", jnp.bfloat16, 256, 64, 64)


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        (TPU, "splash"),
        (TPU._replace(key_width=64, value_width=64), "splash"),
        (TPU._replace(dtype="float32", key_width=192), "splash"),
        (TPU._replace(key_width=32, value_width=32), "chunked"),
        (TPU._replace(length=200), "chunked"),
        (TPU._replace(mixes_scores=True), "chunked"),
        (GPU, "cudnn"),
        (GPU._replace(dtype="float32"), "chunked"),
        (GPU._replace(platform="cpu"), "chunked"),
    ],
)
def test_auto_takes_the_fused_kernel_where_it_fits(case, kernel):
    assert best_kernel(case) == kernel and why_not(kernel, case) is None


@pytest.mark.parametrize(
    ("kernel", "case", "problem"),
    [
        ("cudnn", TPU, "'cudnn' runs on a gpu, found tpu; use 'auto'"),
        ("splash", TPU._replace(length=100), "needs rows divisible by 128, found seq_len=100"),
        ("splash", TPU._replace(mixes_scores=True), "never holds the scores of all heads"),
        ("xla", GPU._replace(value_width=32), "needs values as wide as keys, found 32 and 64"),
        ("cudnn", GPU._replace(dtype="float32"), "needs bfloat16, found float32"),
    ],
)
def test_a_kernel_that_cannot_says_why_before_and_when_it_runs(kernel, case, problem):
    assert problem in why_not(kernel, case) and why_not("auto", case) is None
    qkv = (jnp.zeros((1, case.length, 2, width)) for width in case[3:4] * 2 + case[4:5])
    maps = (
        ScoreMaps(logits=jax.tree_util.Partial(jnp.negative)) if case.mixes_scores else ScoreMaps()
    )
    with pytest.raises(ValueError, match="attention kernel '" + kernel):
        attention(*qkv, kernel=kernel, platform=case.platform, maps=maps)


@pytest.mark.parametrize("length", [100, 700])
def test_scores_of_all_heads_exist_for_a_few_queries_at_a_time(length):
    """Chunks agree with the formula in values and gradients, also for the queries of a part of the
    rows, and hold far less."""
    (q, k, v), segments = case(length, 4, 2, 8, 8, True)
    mixing = normal(5, 4, 4)

    def run(q, k, v, mixing, kernel, start=0):
        over = jax.tree_util.Partial(lambda P, s: jnp.einsum("bn...,nm->bm...", s, P), mixing)
        return attention(q, k, v, segments, maps=ScoreMaps(over, over), kernel=kernel, start=start)

    def gradient(kernel):
        return jax.jit(jax.grad(lambda *z: jnp.sum(run(*z, kernel) ** 2), argnums=(0, 1, 2, 3)))

    programs = [gradient(kernel).lower(q, k, v, mixing) for kernel in ("chunked", "reference")]
    ours, expected = (program.compile() for program in programs)
    for found, wanted in zip(ours(q, k, v, mixing), expected(q, k, v, mixing)):
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
    if length > 512:
        sizes = [p.memory_analysis().temp_size_in_bytes for p in (ours, expected)]
        assert sizes[0] < 0.35 * sizes[1]
    last = run(q[:, 50:], k, v, mixing, "chunked", start=jnp.int32(50))
    whole = run(q, k, v, mixing, "reference")[:, 50:]
    np.testing.assert_allclose(last, whole, rtol=1e-4, atol=1e-4)


def test_the_chunked_kernel_keeps_no_square():
    """What lives between forward and backward grows with T, not T^2."""
    T = 2048
    q = jax.ShapeDtypeStruct((1, T, 8, 16), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, T, 4, 16), jnp.float32)
    sizes = {}
    for kernel in ("chunked", "reference"):
        gradient = jax.grad(
            lambda *z: jnp.sum(attention(*z, kernel=kernel) ** 2), argnums=(0, 1, 2)
        )
        sizes[kernel] = (
            jax.jit(gradient).lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes
        )
    assert sizes["chunked"] < 0.35 * sizes["reference"]
