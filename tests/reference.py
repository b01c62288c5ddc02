"""An independent reference in float64 NumPy: every mixer of streams, scores and outputs, five
attention projections and a tiny transformer.

Written from the formulas of the papers alone; it imports neither the package nor jax, and prefers
loops over heads to speed. Vectors are rows, as in the papers: z T is `z @ T`. Parameters are plain
dicts of arrays; whatever float type they have is promoted to float64. One order holds in every
layer: W -> stream mixers -> q/k RMS-norm -> rotary -> scaled dot product (score mixers) -> output
mixers -> W_O.

Legend: B batch, T query position, S key position, D model width, N query heads, K key/value heads,
G = N/K query heads a key/value head, H query/key head width, R rotary width, P = H - R non-rotary
width, U value width of a head, C latent width, L query latent width, J latent groups, M = N/J heads
a latent group, F feed-forward width, V vocabulary.

`parameters` of every layer may also hold
    mixers: {slot: (kind, matrices)}, slot among query, key, value and kind in MIXERS;
    scores: {slot: matrix [N, N] or a function}, slot among logits, probabilities (talking heads);
    outputs: (kind, {arrays and settings}), or a list of such pairs in their order, kind in OUTPUTS.
What is left out is the identity. `segment_ids_BT` may be None (one document a row). Settings that a
layer does not read are refused.
"""

import numpy as np

from tests.reference_parts import (
    LINEAR,
    SLOTS,
    complete,
    compose,
    finish,
    float64,
    heads,
    magnitude,
    mix_slot,
    normalise,
    rms_norm,
    rotate,
    rotate_tail,
    sigmoid,
    softmax,
)


def grouped_query(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """GQA; MHA is K = N, MQA is K = 1.

    q = RoPE(norm(T_q(x W_Q + b_Q))), k = RoPE(norm(T_k(x W_K + b_K))), v = T_v(x W_V + b_V), scale
    1/sqrt(H); mixers act on the K heads. parameters: query [D,N,H], key [D,K,H], value [D,K,U],
    output [N,U,D]; with the norm query_norm [H], key_norm [H]; with biases query_bias [N,H],
    key_bias [K,H], value_bias [K,U]. settings: theta 10 000, scaling None, rope_dim None (all), eps
    1e-6, qk_norm True. Where `heads` changes the number of heads, attention reads the new number,
    and so does W_O. after_norm: {slot: {kernel}} composes heads between the norm and the rotation.
    """
    settings = complete(
        settings, theta=10_000.0, scaling=None, rope_dim=None, eps=1e-6, qk_norm=True
    )
    x_BTD, p = float64(x_BTD), float64(parameters)
    q_BTNH, k_BSKH, v_BSKU = (
        mix_slot(heads(x_BTD, p[slot], p.get(f"{slot}_bias")), slot, p, SLOTS) for slot in SLOTS
    )
    q_BTNH, k_BSKH = normalise(q_BTNH, k_BSKH, p, settings)
    after = p.get("after_norm", {})
    q_BTNH, k_BSKH, v_BSKU = (
        compose(z, after[slot]["kernel"]) if slot in after else z
        for slot, z in zip(SLOTS, (q_BTNH, k_BSKH, v_BSKU))
    )
    turn = [settings[name] for name in ("theta", "scaling", "rope_dim")]
    q_BTNH, k_BSKH = (rotate(z, positions_BT, *turn) for z in (q_BTNH, k_BSKH))
    return finish(q_BTNH, k_BSKH, v_BSKU, x_BTD, p, segment_ids_BT)


def grouped_tied(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """GTA, with R = P = H/2.

    KV = T_v(x W_KV), v = KV, k_j = [KV_j[:H/2] | RoPE(x W_R)] with one rotary key for all heads,
    [q_nope | q_rope] = T_q(x W_Q), q = [q_nope | RoPE(q_rope)], scale 1/sqrt(H). There is no key
    mixer: the mixer of `value` acts on the tied state, before it is split into k and v. parameters:
    query [D,N,H], state [D,K,H], rotary_key [D,H/2], output [N,H,D]; where normalised query_norm
    [H], key_norm [H]. settings: theta 10 000, scaling None, eps 1e-6, qk_norm False (or True, or
    any of "query", "key"). The query norm spans the whole query head; the key norm spans the whole
    assembled key [KV_j[:H/2] | x W_R] of head j; both come before rotation. The value is never
    normalised. So
    normalised, the rotary half differs between heads by a factor, but follows from the same cache.
    """
    settings = complete(settings, theta=10_000.0, scaling=None, eps=1e-6, qk_norm=False)
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
        rotate_tail(z, half, positions_BT, settings["theta"], settings["scaling"])
        for z in (q_BTNH, k_BSKH)
    )
    return finish(q_BTNH, k_BSKH, state_BSKH, x_BTD, p, segment_ids_BT)


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
    q_BTNH = np.concatenate([nope, q_BTNH[..., width:]], axis=-1)
    return rotate_tail(q_BTNH, width, positions_BT, settings["theta"], settings["scaling"])


def with_rotary_key(nope_BSNP, x_BTD, p, positions_BT, settings):
    """[k_nope_n | RoPE(x W_KR)]: the one rotary key behind each head."""
    key_BS1R = (x_BTD @ p["rotary_key"])[:, :, None]
    rope_BSR = rotate(key_BS1R, positions_BT, settings["theta"], settings["scaling"])[:, :, 0]
    return np.stack(
        [
            np.concatenate([nope_BSNP[:, :, n], rope_BSR], axis=-1)
            for n in range(nope_BSNP.shape[2])
        ],
        axis=2,
    )


def latent_width(q_BTNH, scaling):
    """What the logits are divided by the root of: P + R, and under yarn with mscale_all_dim they
    are multiplied by its m^2 (DeepSeek-V3)."""
    share = (scaling or {}).get("mscale_all_dim")
    return q_BTNH.shape[-1] / (magnitude(scaling, share) ** 4 if share else 1)


def latent(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """MLA, expanded: keys and values of all N heads are made from one latent.

    c = RMSNorm(x W_DKV), k_n = [T_k(c W_UK_n) | RoPE(x W_KR)], v_n = T_v(c W_UV_n), q_n =
    [T_q(q_nope) | RoPE(q_rope)], scale 1/sqrt(P + R). Mixers are linear only and never touch a
    rotary part; the only norms are those of the latents. parameters: query [D,N,P+R], or query_down
    [D,L], query_latent_norm [L], query_up [L,N,P+R]; latent_down [D,1,C], latent_norm [1,C],
    rotary_key [D,R], key_up [1,C,N,P], value_up [1,C,N,U], output [N,U,D]. settings: theta,
    scaling, eps.
    """
    settings = complete(settings, theta=10_000.0, scaling=None, eps=1e-6)
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
    k_BSNH = with_rotary_key(nope_BSNP, x_BTD, p, positions_BT, settings)
    q_BTNH = latent_query(x_BTD, p, nope_BSNP.shape[-1], positions_BT, settings)
    width = latent_width(q_BTNH, settings["scaling"])
    return finish(q_BTNH, k_BSNH, v_BSNU, x_BTD, p, segment_ids_BT, width)


def grouped_latent(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """GLA: head n = g M + m reads latent g, c_g = RMSNorm_g(x W_DKV_g), each with a norm weight and
    a mean square of its own.

    k_n = [T_k(c_g W_UK_gm) | RoPE(x W_KR)], v_n = T_v(c_g W_UV_gm); one rotary key and one T per
    slot for all groups; the rest as MLA, which is J = 1. parameters: as for MLA with latent_down
    [D,J,C], latent_norm [J,C], key_up [J,C,M,P], value_up [J,C,M,U]. settings: theta, scaling,
    eps.
    """
    settings = complete(settings, theta=10_000.0, scaling=None, eps=1e-6)
    x_BTD, p = float64(x_BTD), float64(parameters)
    J, _, M, P = p["key_up"].shape
    q_BTNH = latent_query(x_BTD, p, P, positions_BT, settings)
    if q_BTNH.shape[2] != J * M:
        raise ValueError(f"{q_BTNH.shape[2]} query heads are not {J} groups of {M}")
    nope, values = [], []
    for n in range(J * M):
        g, m = n // M, n % M
        c_BSC = rms_norm(x_BTD @ p["latent_down"][:, g], p["latent_norm"][g], settings["eps"])
        nope.append(c_BSC @ p["key_up"][g, :, m])
        values.append(c_BSC @ p["value_up"][g, :, m])
    nope_BSNP = mix_slot(np.stack(nope, axis=2), "key", p, SLOTS, LINEAR)
    v_BSNU = mix_slot(np.stack(values, axis=2), "value", p, SLOTS, LINEAR)
    k_BSNH = with_rotary_key(nope_BSNP, x_BTD, p, positions_BT, settings)
    width = latent_width(q_BTNH, settings["scaling"])
    return finish(q_BTNH, k_BSNH, v_BSNU, x_BTD, p, segment_ids_BT, width)


def collaborative(x_BTD, parameters, positions_BT, segment_ids_BT, settings):
    """Collaborative heads (arXiv 2006.16362): one shared query and key of width C, which head n
    weighs by m_n.

    logits_n = sum_c RoPE(x W_Q)_c m_nc RoPE(x W_K)_c / sqrt(H), v_n = x W_V_n. The paper has no
    rotary embedding: here the C coordinates are C/H blocks of width H, each rotated like a head of
    width H, and m is one number for both coordinates of a rotary pair, so that a pair's share of a
    logit depends on the distance alone. C may be any multiple of H, above or below N H; with C = N
    H and m_n 1 on block n and 0 elsewhere (`concatenate`) it is multi-head attention without q/k
    norm. The mixers of query and key act on the blocks as on heads, that of value on the N heads.
    parameters: query [D,C], key [D,C], mixing [N,C/2], entry b H/2 + i for coordinates b H + i and
    b H + i + H/2; value [D,N,U], output [N,U,D]. settings: head_dim (H, no default),
    theta 10 000, scaling None.
    """
    settings = complete(settings, theta=10_000.0, scaling=None, head_dim=None)
    x_BTD, p, H = float64(x_BTD), float64(parameters), settings["head_dim"]
    (D, C), N = p["query"].shape, p["mixing"].shape[0]
    if C % H:
        raise ValueError(f"shared width {C} is not blocks of head_dim={H}")
    weights = {s: p[s].reshape(D, C // H, H) for s in ("query", "key")} | {"value": p["value"]}
    q_BTbH, k_BSbH, v_BSNU = (mix_slot(heads(x_BTD, weights[s]), s, p, SLOTS) for s in SLOTS)
    turn = settings["theta"], settings["scaling"]
    q_BTbH, k_BSbH = (rotate(z, positions_BT, *turn) for z in (q_BTbH, k_BSbH))
    m_Nbi = p["mixing"].reshape(N, C // H, H // 2)
    m_NbH = np.concatenate([m_Nbi, m_Nbi], axis=-1)
    q_BTNC = np.stack([(q_BTbH * m_NbH[n]).reshape(*x_BTD.shape[:2], C) for n in range(N)], axis=2)
    k_BS1C = k_BSbH.reshape(*x_BTD.shape[:2], 1, C)
    return finish(q_BTNC, k_BS1C, v_BSNU, x_BTD, p, segment_ids_BT, width=H)


LAYERS = (grouped_query, grouped_tied, latent, grouped_latent, collaborative)
ATTENTION = {layer.__name__: layer for layer in LAYERS}


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
    choice by choice.

    parameters: router [D,E], gate, up [E,D,F], down [E,F,D], maybe `shared`. settings: scores
    (sigmoid or softmax), top_k, scaling, normalise; groups of E / groups neighbours, of which
    groups_used may be chosen from, those with the largest sum of their two best scores + bias.
    """
    settings = {"normalise": True, "groups": 1, "groups_used": 1, **settings}
    logits = x @ parameters["router"]
    scores = 1 / (1 + np.exp(-logits)) if settings["scores"] == "sigmoid" else softmax(logits)
    y, counts = np.zeros_like(x), np.zeros(logits.shape[-1])

    def swiglu(z, gate, up, down):
        return ((z @ gate) / (1 + np.exp(-(z @ gate))) * (z @ up)) @ down

    for token in np.ndindex(x.shape[:-1]):
        groups = np.split(scores[token] + bias, settings["groups"])
        best = np.argsort([-sum(sorted(group)[-2:]) for group in groups])
        for refused in best[settings["groups_used"] :]:
            groups[refused][:] = -np.inf
        chosen = np.argsort(-np.concatenate(groups))[: settings["top_k"]]
        total = scores[token][chosen].sum() if settings["normalise"] else 1.0
        for e in chosen:
            weight = settings["scaling"] * scores[token][e] / total
            y[token] += weight * swiglu(
                x[token], *(parameters[name][e] for name in ("gate", "up", "down"))
            )
            counts[e] += 1
        if "shared" in parameters:
            y[token] += swiglu(
                x[token], *(parameters["shared"][name] for name in ("gate", "up", "down"))
            )
    return y, counts
