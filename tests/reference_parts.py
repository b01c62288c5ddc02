"""The parts of the reference in float64 NumPy: norm, rotation, scores, and every mixer of streams,
scores and outputs. See tests/reference.py for the rules and the legend."""

import math

import numpy as np


def float64(tree):
    """The same nest of dicts, lists and tuples with float64 arrays; strings, formulas, None and
    Python's integers and booleans, which are settings, stay."""
    if isinstance(tree, dict):
        return {name: float64(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(float64(value) for value in tree)
    if tree is None or callable(tree) or isinstance(tree, (str, int)):
        return tree
    return np.asarray(tree, dtype=np.float64)


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


def magnitude(scaling, share):
    """YaRN's m = 1 + 0.1 share log(factor), 1 without a share."""
    return 1 + 0.1 * (share or 0) * math.log(scaling["factor"])


def frequency(theta, i, R, scaling):
    """theta^(-2i/R), as `scaling` has it: its kind (Hugging Face's rope_type) and its numbers."""
    plain, kind = float(theta) ** (-2 * i / R), scaling.get("kind", "none")
    if kind == "none":
        return plain
    slow = plain / scaling["factor"]
    if kind == "linear":
        return slow
    length = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wave = 2 * math.pi / plain
        if wave < length / high:
            return plain
        if wave > length / low:
            return slow
        smooth = (length / wave - low) / (high - low)
        return (1 - smooth) * slow + smooth * plain
    # yarn: the pair that turns so often in `length` positions, R log(length / 2 pi turns) / 2 log b
    ends = [
        R * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    ]
    first, last = (math.floor(ends[0]), math.ceil(ends[1])) if scaling["truncate"] else ends
    first, last = max(first, 0), min(last, R - 1)
    ramp = min(max((i - first) / ((last - first) or 0.001), 0), 1)
    return plain * (1 - ramp) + slow * ramp


def rotate(x_BTNR, positions_BT, theta, scaling=None, width=None):
    """Rotary embedding, half-split: of the first R = `width` coordinates, all by default, i pairs
    with i + R/2 and turns by position * frequency i, i < R/2.

    [a | b | rest] -> [a cos - b sin | b cos + a sin | rest], cos and sin times yarn's factor.
    """
    x_BTNR, scaling = float64(x_BTNR), scaling or {}
    R = x_BTNR.shape[-1] if width is None else width
    half, odd = divmod(R, 2)
    if odd:
        raise ValueError(f"rotary width {R} is odd")
    frequencies = np.array([frequency(theta, i, R, scaling) for i in range(half)])
    angles = np.asarray(positions_BT)[:, :, None, None] * frequencies  # [B, T, 1, R/2]
    factor = 1.0
    if scaling.get("kind") == "yarn":
        both = magnitude(scaling, scaling["mscale"]) / magnitude(scaling, scaling["mscale_all_dim"])
        factor = scaling["attention_factor"] or (
            both if scaling["mscale"] else magnitude(scaling, 1)
        )
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    a, b, rest = np.split(x_BTNR, [half, R], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def rotate_tail(z_BTNH, width, positions_BT, theta, scaling=None):
    """[z_nope | z_rope] -> [z_nope | RoPE(z_rope)], z_nope the first `width` coordinates."""
    return np.concatenate(
        [z_BTNH[..., :width], rotate(z_BTNH[..., width:], positions_BT, theta, scaling)], axis=-1
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


def read_by(z_BSKH, n, N):
    """z_j with j = n // (N / K): the key/value head that query head n of N reads."""
    K = z_BSKH.shape[2]
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key/value heads evenly")
    return z_BSKH[:, :, n // (N // K)]


def talk(s_BNTS, scores, slot):
    """s~_n = sum_m s_m M[m, n] (talking heads, arXiv 2003.02436), or s where `slot` has no M."""
    if slot not in scores:
        return s_BNTS
    M_NN = scores[slot]
    if callable(M_NN):
        return M_NN(s_BNTS)
    if M_NN.shape != (s_BNTS.shape[1],) * 2:
        raise ValueError(f"{slot} of {s_BNTS.shape[1]} heads cannot be mixed by {M_NN.shape}")
    N = len(M_NN)
    return np.stack([sum(s_BNTS[:, m] * M_NN[m, n] for m in range(N)) for n in range(N)], axis=1)


def attend(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, scores=None, width=None):
    """o_n = P_w(softmax(mask(P_l(q_n k_j^T / sqrt(width))))) v_j, j = n // G, over all heads at
    once.

    P_l and P_w are the score mixers `logits` and `probabilities`, after the scale and on either
    side of mask and softmax, so a masked key gets exactly no weight. Keys and values are grouped
    each by their own number of heads. width: H unless given.
    """
    q_BTNH, k_BSKH, v_BSKU, scores = float64((q_BTNH, k_BSKH, v_BSKU, scores or {}))
    if not set(scores) <= {"logits", "probabilities"}:
        raise ValueError(f"score mixers are logits and probabilities, got {sorted(scores)}")
    B, T, N, H = q_BTNH.shape
    logits_BNTS = np.stack(
        [q_BTNH[:, :, n] @ read_by(k_BSKH, n, N).swapaxes(1, 2) for n in range(N)], axis=1
    ) / np.sqrt(width or H)
    logits_BNTS = talk(logits_BNTS, scores, "logits")
    mask_B1TS = causal_mask(B, T, segment_ids_BT)[:, None]
    p_BNTS = talk(softmax(np.where(mask_B1TS, logits_BNTS, -np.inf)), scores, "probabilities")
    return np.stack([p_BNTS[:, n] @ read_by(v_BSKU, n, N) for n in range(N)], axis=2)


def heads(x_BTD, W_DNH, b_NH=None):
    """z_n = x W_n + b_n for each head n."""
    z = np.stack([x_BTD @ W_DNH[:, n] for n in range(W_DNH.shape[1])], axis=2)
    return z if b_NH is None else z + b_NH


def combine(o_BTNU, W_NUD):
    """sum_n o_n W_O_n, which is Concat(o_1, ..., o_N) W_O."""
    if o_BTNU.shape[2] != W_NUD.shape[0]:
        raise ValueError(f"W_O has {W_NUD.shape[0]} heads, attention {o_BTNU.shape[2]}")
    return sum(o_BTNU[:, :, n] @ W_NUD[n] for n in range(W_NUD.shape[0]))


# Stream mixers on z [..., K, H]. Knocking: one H x H matrix shared by all heads, no sum over heads.
def linear(z, T):
    """z T (equations 5 to 7)."""
    return z @ T


def gate(z, W_gate):
    """z * 2 sigmoid(z W_gate)."""
    return z * 2.0 * sigmoid(z @ W_gate)


def mlp(z, W_up, W_gate, W_down):
    """2 ((z W_up) * sigmoid(z W_gate)) W_down (equation 9)."""
    return 2.0 * ((z @ W_up) * sigmoid(z @ W_gate)) @ W_down


def compose(z, W_KM):
    """z'_m = sum_n z_n W[n, m]: whole heads mixed by scalars, M of them from K (MEA, arXiv
    2601.19611).

    On query, key and value alike it is interleaved-head attention (arXiv 2602.21371) with one
    pseudo-head per head. There its P pseudo-heads of a token are P neighbours in a sequence of P T
    and are collapsed afterwards; with P = 1 both steps are the identity, or fold into W_O.
    """
    return np.stack(
        [sum(z[..., n, :] * W_KM[n, m] for n in range(len(W_KM))) for m in range(W_KM.shape[1])], -2
    )


MIXERS = {
    "none": (lambda z: z, ()),
    "linear": (linear, ("kernel",)),
    "gate": (gate, ("gate",)),
    "mlp": (mlp, ("up", "gate", "down")),
    "heads": (compose, ("kernel",)),
}


SLOTS, LINEAR = ("query", "key", "value"), ("none", "linear", "heads")


def mix(z, kind, parameters):
    """Apply one mixer to z [..., K, H]; `parameters` holds exactly the matrices of its kind. A row
    of tests/cases.py may give the formula itself instead of a kind."""
    function, names = (kind, ()) if callable(kind) else MIXERS[kind]
    if set(parameters) != set(names):
        raise ValueError(f"mixer {kind} takes {names}, got {sorted(parameters)}")
    return function(float64(z), *(float64(parameters[name]) for name in names))


def mix_slot(z, slot, parameters, slots, kinds=tuple(MIXERS)):
    """The mixer of `slot`, or z itself; mixers outside `slots` or of a kind outside `kinds` are
    refused."""
    mixers = parameters.get("mixers", {})
    for name, (kind, _) in mixers.items():
        if name not in slots or (kind not in kinds and not callable(kind)):
            raise ValueError(
                f"mixer {kind} of {name} is refused: this layer takes {kinds} of {slots}"
            )
    return mix(z, *mixers.get(slot, ("none", {})))


# Output mixers: (o, x, v, parameters and settings by name) -> o. x [B,T,D] is the layer's input,
# already normed by the block, and v the values that attention read.
def group_norm(o_BTNU, x_BTD, v_BSKU, scale, eps=1e-5):
    """RMSNorm(o_n) over U with one weight [U] for all heads (MEA)."""
    return rms_norm(o_BTNU, scale, eps)


def gate_output(o_BTNU, x_BTD, v_BSKU, kernel, doubled=False):
    """o * sigmoid(x W) (arXiv 2505.06708), W [D, N] a gate a head or [D, N, U] one an element;
    `doubled`: 2 sigmoid, which is the identity at W = 0 (not from the paper)."""
    gate_BTNx = sigmoid(np.tensordot(x_BTD, kernel, 1)) * (2.0 if doubled else 1.0)
    return o_BTNU * (gate_BTNx if kernel.ndim == 3 else gate_BTNx[..., None])


def exclusive(o_BTNU, x_BTD, v_BSKU, eps=1e-12):
    """o_n - (o_n . v^) v^ with v^ = v / sqrt(sum v^2 + eps), v the token's own mixed value in the
    key/value head that n reads (arXiv 2603.09078); eps is ours, so that v = 0 changes nothing."""
    o_BTNU, N = o_BTNU.copy(), o_BTNU.shape[2]
    for n in range(N):
        v_BTU = read_by(v_BSKU, n, N)
        unit_BTU = v_BTU / np.sqrt(np.sum(v_BTU**2, axis=-1, keepdims=True) + eps)
        o_BTNU[:, :, n] -= np.sum(o_BTNU[:, :, n] * unit_BTU, axis=-1, keepdims=True) * unit_BTU
    return o_BTNU


def route_heads(x_BTD, W_DR, top_k):
    """softmax(x W_r) over the routed heads, and 1 for the top_k of each token, 0 elsewhere; the
    lower index wins a tie."""
    p_BTR = softmax(x_BTD @ W_DR)
    order_BTR = np.argsort(-p_BTR, axis=-1, kind="stable")
    chosen_BTR = np.zeros_like(p_BTR)
    np.put_along_axis(chosen_BTR, order_BTR[..., :top_k], 1.0, axis=-1)
    return p_BTR, chosen_BTR


def mixture_of_heads(
    o_BTNU, x_BTD, v_BSKU, routed, top_k, shared=None, alphas=None, paper_scale=False
):
    """g_n o_n (arXiv 2410.11842): heads 0..S-1 are shared, R = N - S are routed, top_k to a token.

    g = alpha_1 softmax(x W_s) of the shared, alpha_2 softmax(x W_r) of the chosen and 0 of the
    other routed heads, [alpha_1, alpha_2] = softmax(x W_h): the paper's two-stage formula, which
    `paper_scale` gives. The default follows the authors' code (SkyworkAI/MoH, MoH-ViT and MoH-DiT):
    chosen routed gates are divided by their sum and multiplied by top_k, shared gates by S, alphas
    by 2, so that equal scores give each active head 1; without shared heads there are no alphas.
    shared [D, S] and alphas [D, 2] come together or not at all; routed [D, R].
    """
    p_BTR, chosen_BTR = route_heads(x_BTD, routed, top_k)
    gates_BTN = p_BTR * chosen_BTR
    if not paper_scale:
        gates_BTN = gates_BTN * top_k / gates_BTN.sum(axis=-1, keepdims=True)
    if shared is not None:
        alphas_BT2, shared_BTS = softmax(x_BTD @ alphas), softmax(x_BTD @ shared)
        if not paper_scale:
            alphas_BT2, shared_BTS = 2 * alphas_BT2, shared.shape[1] * shared_BTS
        gates_BTN = np.concatenate(
            [alphas_BT2[..., :1] * shared_BTS, alphas_BT2[..., 1:] * gates_BTN], axis=-1
        )
    return o_BTNU * gates_BTN[..., None]


def head_balance_loss(x_BTD, routed, top_k):
    """R^2 mean_i(P_i f_i), P_i the mean over tokens of softmax(x W_r)_i and f_i the fraction of
    tokens that chose routed head i, so that sum f = top_k and balance gives top_k (authors' code;
    to be weighted by 0.01)."""
    p_BTR, chosen_BTR = route_heads(*float64((x_BTD, routed)), top_k)
    return routed.shape[1] ** 2 * np.mean(p_BTR.mean(axis=(0, 1)) * chosen_BTR.mean(axis=(0, 1)))


def differential(o_BTNU, x_BTD, v_BSKU, kernel):
    """o_n = a_2n - sigmoid(x W)_n a_2n+1, no norm: half as many heads come out (differential
    attention V2, microsoft/unilm Diff-Transformer-V2).

    kernel [D, N], N the heads that come out. Each pair must share a key/value head.
    """
    if (o_BTNU.shape[2] // v_BSKU.shape[2]) % 2:
        raise ValueError(
            f"{o_BTNU.shape[2]} query heads over {v_BSKU.shape[2]} value heads are not pairs"
        )
    lambda_BTN = sigmoid(x_BTD @ kernel)
    return o_BTNU[:, :, 0::2] - lambda_BTN[..., None] * o_BTNU[:, :, 1::2]


OUTPUTS = {
    "group_norm": group_norm,
    "gate": gate_output,
    "exclusive": exclusive,
    "mixture": mixture_of_heads,
    "differential": differential,
}


def finish(q_BTNH, k_BSKH, v_BSKU, x_BTD, p, segment_ids_BT, width=None):
    """Scores, output mixers and W_O: what every layer does with its q, k and v."""
    o_BTNU = attend(q_BTNH, k_BSKH, v_BSKU, segment_ids_BT, p.get("scores"), width)
    outputs = p.get("outputs", [])
    for kind, parameters in outputs if isinstance(outputs, list) else [outputs]:
        function = kind if callable(kind) else OUTPUTS[kind]
        o_BTNU = function(o_BTNU, x_BTD, v_BSKU, **parameters)
    return combine(o_BTNU, p["output"]) + p.get("output_bias", 0.0)


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
