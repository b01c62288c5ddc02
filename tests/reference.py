"""An independent reference in float64 NumPy: every knocking mixer, four attention projections and a
tiny transformer.

Written from the formulas of the papers alone; it imports neither the package nor jax, and prefers
loops over heads to speed. Vectors are rows, as in the papers: z T is `z @ T`. Parameters are plain
dicts of arrays; whatever float type they have is promoted to float64. One order holds in every
layer: W -> T (knocking) -> q/k RMS-norm -> rotary -> scaled dot product -> W_O.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value heads,
G = N/K query heads a key/value head, H query/key head width, R rotary width, P = H - R non-rotary
width, U value width of a head, C latent width, L query latent width, J latent groups, M = N/J heads
a latent group, F feed-forward width, V vocabulary.

`parameters` of a layer may hold `mixers`: {slot: (kind, matrices)}, slot among query, key, value; a
slot left out is `none`. `segment_ids_BT` may be None (one document a row). Settings that a layer
does not read are refused.
"""

import numpy as np


def float64(tree):
    """The same nest of dicts, lists and tuples with float64 arrays; strings and None stay."""
    if isinstance(tree, dict):
        return {name: float64(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(float64(value) for value in tree)
    return tree if tree is None or isinstance(tree, str) else np.asarray(tree, dtype=np.float64)


def complete(settings, **defaults):
    """Defaults overridden by `settings`; an unknown name is an error, not silence."""
    unknown = set(settings) - set(defaults)
    if unknown:
        raise ValueError(f"settings {sorted(unknown)} are not among {sorted(defaults)}")
    return {**defaults, **settings}


def sigmoid(x):
    """1 / (1 + exp(-x)), written with tanh so that nothing overflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def softmax(x):
    """exp(x_i) / sum_j exp(x_j) over the last axis; -inf gives exactly 0."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def rms_norm(x, scale, eps):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; `scale` is the weight itself (starts at
    1, not at 0)."""
    x, scale = float64((x, scale))
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x_BTNR, positions_BT, theta):
    """Rotary embedding, half-split: coordinate i pairs with i + R/2 and turns by position *
    theta^(-2i/R), i < R/2.

    [a | b] -> [a cos - b sin | b cos + a sin]
    """
    x_BTNR = float64(x_BTNR)
    half, odd = divmod(x_BTNR.shape[-1], 2)
    if odd:
        raise ValueError(f"rotary width {x_BTNR.shape[-1]} is odd")
    frequencies = float(theta) ** (-np.arange(half) / half)
    angles = np.asarray(positions_BT)[:, :, None, None] * frequencies  # [B, T, 1, R/2]
    a, b = x_BTNR[..., :half], x_BTNR[..., half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1
    )


def rotate_tail(z_BTNH, width, positions_BT, theta):
    """[z_nope | z_rope] -> [z_nope | RoPE(z_rope)], z_nope the first `width` coordinates."""
    return np.concatenate(
        [z_BTNH[..., :width], rotate(z_BTNH[..., width:], positions_BT, theta)], axis=-1
    )


def causal_mask(batch, length, segment_ids_BT=None):
    """mask[b, t, s]: s <= t by place in the row (never by rotary position) and both in the same
    segment."""
    place_T = np.arange(length)
    segments_BT = (
        np.zeros((batch, length)) if segment_ids_BT is None else np.asarray(segment_ids_BT)
    )
    return (place_T[None, None, :] <= place_T[None, :, None]) & (
        segments_BT[:, None, :] == segments_BT[:, :, None]
    )


def attend(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT):
    """o_n = softmax(q_n k_j^T / sqrt(H), masked) v_j with j = n // G: query head n reads key/value
    head n // G."""
    q_BTNH, k_BSKH, v_BSKU = float64((q_BTNH, k_BSKH, v_BSKU))
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    if N % K or v_BSKU.shape[2] != K:
        raise ValueError(
            f"{N} query heads, {K} key heads and {v_BSKU.shape[2]} value heads do not match"
        )
    mask_BTS = causal_mask(B, T, segment_ids_BT)
    o_BTNU = np.zeros((B, T, N, v_BSKU.shape[-1]))
    for b in range(B):
        for n in range(N):
            j = n // (N // K)
            logits_TS = q_BTNH[b, :, n] @ k_BSKH[b, :, j].T / np.sqrt(H)
            o_BTNU[b, :, n] = softmax(np.where(mask_BTS[b], logits_TS, -np.inf)) @ v_BSKU[b, :, j]
    return o_BTNU


def heads(x_BTD, W_DNH):
    """z_n = x W_n for each head n."""
    return np.stack([x_BTD @ W_DNH[:, n] for n in range(W_DNH.shape[1])], axis=2)


def combine(o_BTNU, W_NUD):
    """sum_n o_n W_O_n, which is Concat(o_1, ..., o_N) W_O."""
    return sum(o_BTNU[:, :, n] @ W_NUD[n] for n in range(W_NUD.shape[0]))


# Knocking mixers on z [..., H]: one H x H matrix shared by all heads, and no sum over heads.
def linear(z, T):
    """z T (equations 5 to 7)."""
    return z @ T


def gate(z, W_gate):
    """z * 2 sigmoid(z W_gate)."""
    return z * 2.0 * sigmoid(z @ W_gate)


def mlp(z, W_up, W_gate, W_down):
    """2 ((z W_up) * sigmoid(z W_gate)) W_down (equation 9)."""
    return 2.0 * ((z @ W_up) * sigmoid(z @ W_gate)) @ W_down


MIXERS = {
    "none": (lambda z: z, ()),
    "linear": (linear, ("kernel",)),
    "gate": (gate, ("gate",)),
    "mlp": (mlp, ("up", "gate", "down")),
}
SLOTS, LINEAR = ("query", "key", "value"), ("none", "linear")


def mix(z, kind, parameters):
    """Apply one mixer to z [..., H], head by head with the same matrices; `parameters` holds
    exactly those of the kind."""
    function, names = MIXERS[kind]
    if set(parameters) != set(names):
        raise ValueError(f"mixer {kind} takes {names}, got {sorted(parameters)}")
    return function(float64(z), *(float64(parameters[name]) for name in names))


def mix_slot(z, slot, parameters, slots, kinds=tuple(MIXERS)):
    """The mixer of `slot`, or z itself; mixers outside `slots` or of a kind outside `kinds` are
    refused."""
    mixers = parameters.get("mixers", {})
    for name, (kind, _) in mixers.items():
        if name not in slots or kind not in kinds:
            raise ValueError(
                f"mixer {kind} of {name} is refused: this layer takes {kinds} of {slots}"
            )
    return mix(z, *mixers.get(slot, ("none", {})))


def normalise(q_BTNH, k_BSKH, p, settings):
    """The q/k RMS-norm, per head over all of H; qk_norm is True (both), False (neither) or a tuple
    of "query", "key"."""
    qk_norm = settings["qk_norm"]
    streams = {True: ("query", "key"), False: ()}[qk_norm] if isinstance(qk_norm, bool) else qk_norm
    if isinstance(streams, str) or not set(streams) <= {"query", "key"}:
        raise ValueError(f"qk_norm must be a bool or a tuple of query, key; got {streams!r}")
    q_BTNH = rms_norm(q_BTNH, p["query_norm"], settings["eps"]) if "query" in streams else q_BTNH
    k_BSKH = rms_norm(k_BSKH, p["key_norm"], settings["eps"]) if "key" in streams else k_BSKH
    return q_BTNH, k_BSKH


def grouped_query(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """GQA; MHA is K = N, MQA is K = 1.

    q = RoPE(norm(T_q(x W_Q))), k = RoPE(norm(T_k(x W_K))), v = T_v(x W_V), scale 1/sqrt(H); mixers
    act on the K heads. parameters: query [D,N,H], key [D,K,H], value [D,K,U], output [N,U,D]; with
    the norm query_norm [H], key_norm [H]. settings: theta 10 000, eps 1e-6, qk_norm True.
    """
    settings = complete(settings, theta=10_000.0, eps=1e-6, qk_norm=True)
    x_BTD, p = float64(x_BTD), float64(parameters)
    q_BTNH, k_BSKH, v_BSKU = (mix_slot(heads(x_BTD, p[slot]), slot, p, SLOTS) for slot in SLOTS)
    q_BTNH, k_BSKH = normalise(q_BTNH, k_BSKH, p, settings)
    q_BTNH, k_BSKH = (rotate(z, positions_BT, settings["theta"]) for z in (q_BTNH, k_BSKH))
    return combine(attend(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT), p["output"])


def grouped_tied(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """GTA, with R = P = H/2.

    KV = T_v(x W_KV), v = KV, k_j = [KV_j[:H/2] | RoPE(x W_R)] with one rotary key for all heads,
    [q_nope | q_rope] = T_q(x W_Q), q = [q_nope | RoPE(q_rope)], scale 1/sqrt(H). There is no key
    mixer: the mixer of `value` acts on the tied state, before it is split into k and v. parameters:
    query [D,N,H], state [D,K,H], rotary_key [D,H/2], output [N,H,D]; where normalised query_norm
    [H], key_norm [H]. settings: theta 10 000, eps 1e-6, qk_norm False (or True, or any of "query",
    "key"). The query norm spans the whole query head; the key norm spans the whole assembled key
    [KV_j[:H/2] | x W_R] of head j; both come before rotation. The value is never normalised. So
    normalised, the rotary half differs between heads by a factor, but follows from the same cache.
    """
    settings = complete(settings, theta=10_000.0, eps=1e-6, qk_norm=False)
    x_BTD, p = float64(x_BTD), float64(parameters)
    q_BTNH = mix_slot(heads(x_BTD, p["query"]), "query", p, ("query", "value"))
    state_BSKH = mix_slot(heads(x_BTD, p["state"]), "value", p, ("query", "value"))
    half = state_BSKH.shape[-1] // 2
    rotary_key_BSR = x_BTD @ p["rotary_key"]
    k_BSKH = np.stack(
        [
            np.concatenate([state_BSKH[:, :, j, :half], rotary_key_BSR], -1)
            for j in range(state_BSKH.shape[2])
        ],
        2,
    )
    q_BTNH, k_BSKH = normalise(q_BTNH, k_BSKH, p, settings)
    q_BTNH, k_BSKH = (
        rotate_tail(z, half, positions_BT, settings["theta"]) for z in (q_BTNH, k_BSKH)
    )
    return combine(attend(q_BTNH, k_BSKH, state_BSKH, segment_ids_BT), p["output"])


def latent_query(x_BTD, p, width, positions_BT, settings):
    """q = x W_Q, or RMSNorm(x W_DQ) W_UQ; then [T_q(q_nope) | RoPE(q_rope)]."""
    if "query" in p:
        q_BTNH = heads(x_BTD, p["query"])
    else:
        q_BTNH = heads(
            rms_norm(x_BTD @ p["query_down"], p["query_latent_norm"], settings["eps"]),
            p["query_up"],
        )
    nope = mix_slot(q_BTNH[..., :width], "query", p, SLOTS, LINEAR)
    return rotate_tail(
        np.concatenate([nope, q_BTNH[..., width:]], axis=-1), width, positions_BT, settings["theta"]
    )


def latent(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """MLA, expanded: keys and values of all N heads are made from one latent.

    c = RMSNorm(x W_DKV), k_n = [T_k(c W_UK_n) | RoPE(x W_KR)], v_n = T_v(c W_UV_n), q_n =
    [T_q(q_nope) | RoPE(q_rope)], scale 1/sqrt(P + R). Mixers are linear only and never touch a
    rotary part; the only norms are those of the latents. parameters: query [D,N,P+R], or query_down
    [D,L], query_latent_norm [L], query_up [L,N,P+R]; latent_down [D,1,C], latent_norm [1,C],
    rotary_key [D,R], key_up [1,C,N,P], value_up [1,C,N,U], output [N,U,D]. settings: theta, eps.
    """
    settings = complete(settings, theta=10_000.0, eps=1e-6)
    x_BTD, p = float64(x_BTD), float64(parameters)
    if p["latent_down"].shape[1] != 1:
        raise ValueError(
            f"multi-head latent attention has one latent, got {p['latent_down'].shape[1]}: use "
            "grouped_latent"
        )
    c_BSC = rms_norm(x_BTD @ p["latent_down"][:, 0], p["latent_norm"][0], settings["eps"])
    nope_BSNP = mix_slot(np.einsum("bsc,cnp->bsnp", c_BSC, p["key_up"][0]), "key", p, SLOTS, LINEAR)
    v_BSNU = mix_slot(
        np.einsum("bsc,cnu->bsnu", c_BSC, p["value_up"][0]), "value", p, SLOTS, LINEAR
    )
    rope_BS1R = rotate((x_BTD @ p["rotary_key"])[:, :, None], positions_BT, settings["theta"])
    k_BSNH = np.concatenate(
        [nope_BSNP, np.broadcast_to(rope_BS1R, nope_BSNP.shape[:3] + rope_BS1R.shape[3:])], axis=-1
    )
    q_BTNH = latent_query(x_BTD, p, nope_BSNP.shape[-1], positions_BT, settings)
    return combine(attend(q_BTNH, k_BSNH, v_BSNU, segment_ids_BT), p["output"])


def grouped_latent(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """GLA: head n = g M + m reads latent g, c_g = RMSNorm_g(x W_DKV_g), each with a norm weight and
    a mean square of its own.

    k_n = [T_k(c_g W_UK_gm) | RoPE(x W_KR)], v_n = T_v(c_g W_UV_gm); one rotary key and one T per
    slot for all groups; the rest as MLA, which is J = 1. parameters: as for MLA with latent_down
    [D,J,C], latent_norm [J,C], key_up [J,C,M,P], value_up [J,C,M,U]. settings: theta, eps.
    """
    settings = complete(settings, theta=10_000.0, eps=1e-6)
    x_BTD, p = float64(x_BTD), float64(parameters)
    J, _, M, P = p["key_up"].shape
    q_BTNH = latent_query(x_BTD, p, P, positions_BT, settings)
    if q_BTNH.shape[2] != J * M:
        raise ValueError(f"{q_BTNH.shape[2]} query heads are not {J} groups of {M}")
    rope_BS1R = rotate((x_BTD @ p["rotary_key"])[:, :, None], positions_BT, settings["theta"])
    outputs = []
    for n in range(J * M):
        g, m = n // M, n % M
        c_BSC = rms_norm(x_BTD @ p["latent_down"][:, g], p["latent_norm"][g], settings["eps"])
        nope_BSP = mix_slot(c_BSC @ p["key_up"][g, :, m], "key", p, SLOTS, LINEAR)
        v_BSU = mix_slot(c_BSC @ p["value_up"][g, :, m], "value", p, SLOTS, LINEAR)
        k_BS1H = np.concatenate([nope_BSP[:, :, None], rope_BS1R], axis=-1)
        outputs.append(attend(q_BTNH[:, :, n : n + 1], k_BS1H, v_BSU[:, :, None], segment_ids_BT))
    return combine(np.concatenate(outputs, axis=2), p["output"])


ATTENTION = {f.__name__: f for f in (grouped_query, grouped_tied, latent, grouped_latent)}


def swiglu(x_BTD, parameters):
    """(silu(x W_gate) * (x W_up)) W_down with silu(a) = a sigmoid(a); gate [D,F], up [D,F], down
    [F,D]."""
    x_BTD, p = float64(x_BTD), float64(parameters)
    gate_BTF = x_BTD @ p["gate"]
    return (gate_BTF * sigmoid(gate_BTF) * (x_BTD @ p["up"])) @ p["down"]


def block(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """Pre-norm: x = x + attention(norm(x)), then x = x + swiglu(norm(x)).

    parameters: attention_norm [D], attention {...}, feed_forward_norm [D], feed_forward {gate, up,
    down}. settings: `attention`, a name in ATTENTION; the rest goes to that layer, and its `eps`
    (1e-6) serves the block's norms too.
    """
    settings = dict(settings)
    attention, eps = ATTENTION[settings.pop("attention")], settings.get("eps", 1e-6)
    x_BTD, p = float64(x_BTD), float64(parameters)
    normed_BTD = rms_norm(x_BTD, p["attention_norm"], eps)
    x_BTD = x_BTD + attention(normed_BTD, p["attention"], positions_BT, segment_ids_BT, settings)
    return x_BTD + swiglu(rms_norm(x_BTD, p["feed_forward_norm"], eps), p["feed_forward"])


def transformer(tokens_BT, parameters, positions_BT, segment_ids_BT, settings):
    """logits = norm(blocks(E[tokens])) E^T: tied embedding, no scaling of it, no biases, no cap on
    the logits.

    parameters: embedding [V,D], layers: a list of block parameters, final_norm [D]. settings: as
    for `block`, for all layers.
    """
    p = float64(parameters)
    x_BTD = p["embedding"][np.asarray(tokens_BT)]
    for layer in p["layers"]:
        x_BTD = block(x_BTD, layer, positions_BT, segment_ids_BT, settings)
    return rms_norm(x_BTD, p["final_norm"], settings.get("eps", 1e-6)) @ p["embedding"].T


def mixture(x, parameters, bias, settings):
    """(output, assignments of each expert) of a mixture of SwiGLU experts, token by token and
    choice by choice."""
    logits = x @ parameters["router"]
    scores = 1 / (1 + np.exp(-logits)) if settings["scores"] == "sigmoid" else softmax(logits)
    y, counts = np.zeros_like(x), np.zeros(logits.shape[-1])

    def swiglu(z, gate, up, down):
        return ((z @ gate) / (1 + np.exp(-(z @ gate))) * (z @ up)) @ down

    for token in np.ndindex(x.shape[:-1]):
        chosen = np.argsort(-(scores[token] + bias))[: settings["top_k"]]
        for e in chosen:
            weight = settings["scaling"] * scores[token][e] / scores[token][chosen].sum()
            y[token] += weight * swiglu(
                x[token], *(parameters[name][e] for name in ("gate", "up", "down"))
            )
            counts[e] += 1
        if "shared" in parameters:
            y[token] += swiglu(
                x[token], *(parameters["shared"][name] for name in ("gate", "up", "down"))
            )
    return y, counts
