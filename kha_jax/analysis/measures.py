"""Numbers that say what a small matrix does: pure functions on numpy arrays.

Streams are described by their second moments C[N, H, N, H] = E[z_nh z_mk], so that the same
functions serve weights (`moments_of_weights`) and activations (`moments`).

Legend: T a matrix [..., n, m] with any leading axes such as layers, R rows, N heads, H head width.
"""

from typing import NamedTuple

import numpy as np

from kha_jax.ops import matrices


def diagonal(T: np.ndarray) -> np.ndarray:
    """The diagonal profile, [..., min(n, m)]."""
    return np.diagonal(T, axis1=-2, axis2=-1)


def diagonal_mean(T: np.ndarray) -> np.ndarray:
    """See ops.matrices, as are the next."""
    return np.asarray(matrices.diagonal_mean(T))


def off_diagonal_share(T: np.ndarray) -> np.ndarray:
    return np.asarray(matrices.off_diagonal_share(T))


def distance(T: np.ndarray, start: np.ndarray) -> np.ndarray:
    """|T - start| / |I| in Frobenius norms, [...]: how far a matrix has come from where it started.
    0 untouched, 1 for the identity turned to zeros, sqrt(2) for a permutation without fixed
    points."""
    return np.linalg.norm(T - start, axis=(-2, -1)) / np.sqrt(min(T.shape[-2:]))


def spectrum(T: np.ndarray) -> np.ndarray:
    """Singular values, largest first, [..., min(n, m)]."""
    return np.linalg.svd(T, compute_uv=False)


class Blocks(NamedTuple):
    """order: of the features, blocks together. labels: the block of each feature, from 0, largest
    block first. modularity: the share of the squared off-diagonal entries inside the blocks less
    what would fall there by chance; 0 for none, 1 - 1/k for k equal blocks apart. shuffled: the
    modularity of the same entries in random places, which noise alone reaches."""

    order: np.ndarray
    labels: np.ndarray
    modularity: float
    shuffled: float


def blocks(T: np.ndarray, most: int = 16) -> Blocks:
    """The block structure of one square matrix, rows and columns co-clustered.

    Features are joined by average linkage on the squares of T and its transpose off the diagonal;
    of the clusterings that the tree holds, with `most` blocks, that of the greatest modularity
    (Newman, arXiv physics/0602124) is taken.
    """
    n = len(T)
    off = ~np.eye(n, dtype=bool)
    mixed_up = np.zeros((n, n))
    mixed_up[off] = np.random.default_rng(0).permutation(T[off])
    shuffled = _clustered(mixed_up, most)[2]
    return Blocks(*_clustered(np.where(off, T, 0), most), shuffled)


def _clustered(T, most):
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    A = T.astype(np.float64) ** 2
    A = A + A.T
    if not A.any():
        everyone = np.arange(len(A))
        return everyone, 0 * everyone, 0.0
    joined = hierarchy.linkage(squareform(A.max() - A, checks=False), "average")
    cuts = hierarchy.cut_tree(joined, np.arange(1, min(most, len(A)) + 1)).T
    found = max(cuts, key=lambda labels: _modularity(A, labels))
    labels = np.argsort(np.argsort(-np.bincount(found), kind="stable"))[found]
    leaves = hierarchy.leaves_list(joined)
    order = leaves[np.argsort(labels[leaves], kind="stable")]
    return order, labels, float(_modularity(A, found))


def _modularity(A, labels):
    member = (labels[:, None] == np.arange(labels.max() + 1)).astype(np.float64)
    between = member.T @ A @ member / A.sum()
    return np.trace(between) - np.sum(between.sum(0) ** 2)


def moments_of_weights(W_DNH: np.ndarray, scale_D: np.ndarray | None = None) -> np.ndarray:
    """C of z = (x * scale) W for white x: what the weights alone say of the streams."""
    W_DNH = W_DNH if scale_D is None else W_DNH * scale_D[:, None, None]
    return _second_moments(W_DNH)


def moments(z_RNH: np.ndarray) -> np.ndarray:
    """C of the rows less their mean."""
    return _second_moments(z_RNH - z_RNH.mean(0)) / len(z_RNH)


def _second_moments(z_RNH):
    R, N, H = z_RNH.shape
    flat = z_RNH.reshape(R, N * H).astype(np.float64)
    return (flat.T @ flat).reshape(N, H, N, H)


def mixed(C_NHNH: np.ndarray, T: np.ndarray) -> np.ndarray:
    """C of z T, one T for all heads."""
    return np.einsum("nhmk,hi,kj->nimj", C_NHNH, T, T, optimize=True)


def similarity(C_NHNH: np.ndarray) -> np.ndarray:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) between heads, [N, N]: 1
    where one head's stream is another's up to rotation and scale, 0 where they share nothing."""
    cross = np.sum(C_NHNH**2, axis=(1, 3))
    own = np.sqrt(np.diagonal(cross))
    return cross / np.maximum(own[:, None] * own, 1e-30)


def predicted_by_peers(C_NHNH: np.ndarray, ridge: float = 1e-9) -> np.ndarray:
    """R^2 of the best linear prediction of each head's stream from all other heads', [N]. 1
    wherever the peers together span the whole input.

    What the peers leave of a head is the inverse of the head's block of C^-1; ridge: what is added
    to the diagonal of C first, relative to its mean.
    """
    N, H = C_NHNH.shape[:2]
    C = C_NHNH.reshape(N * H, N * H)
    precision = np.linalg.inv(C + ridge * np.trace(C) / (N * H) * np.eye(N * H))
    blocks = precision.reshape(N, H, N, H)
    shares = np.zeros(N)
    for head in range(N):
        left = np.trace(np.linalg.inv(blocks[head, :, head]))
        shares[head] = 1 - left / max(np.trace(C_NHNH[head, :, head]), 1e-30)
    return np.clip(shares, 0, 1)


def predicted_by_one(C_NHNH: np.ndarray, ridge: float = 1e-9) -> np.ndarray:
    """R^2 of the best linear prediction of head i's stream from head j's alone, [N, N]: 1 on the
    diagonal, H / D between heads that are independent directions of D white inputs."""
    N, H = C_NHNH.shape[:2]
    shares = np.zeros((N, N))
    for j in range(N):
        own = C_NHNH[j, :, j]
        inverse = np.linalg.inv(own + ridge * np.trace(own) / H * np.eye(H))
        for i in range(N):
            cross = C_NHNH[j, :, i]
            explained = np.sum(cross * (inverse @ cross))
            shares[i, j] = explained / max(np.trace(C_NHNH[i, :, i]), 1e-30)
    return shares


def subspaces(C_NHNH: np.ndarray, rank: int) -> np.ndarray:
    """An orthonormal basis of the `rank` directions in which each head's stream varies most,
    [N, H, rank]."""
    own = np.stack([C_NHNH[head, :, head] for head in range(len(C_NHNH))])
    return np.linalg.eigh(own)[1][..., ::-1][..., :rank]


def principal_angles(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Degrees between two subspaces with orthonormal bases [..., H, rank], smallest first: all 0
    for equal ones, 90 for orthogonal ones."""
    cosines = np.linalg.svd(np.swapaxes(A, -2, -1) @ B, compute_uv=False)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def between_heads(bases_NHr: np.ndarray) -> float:
    """Mean principal angle over all pairs of heads, in degrees; NaN for one head."""
    pairs = np.triu_indices(len(bases_NHr), 1)
    if not len(pairs[0]):
        return float("nan")
    return float(principal_angles(bases_NHr[pairs[0]], bases_NHr[pairs[1]]).mean())


def steepest(W_gate: np.ndarray, count: int = 1) -> np.ndarray:
    """The unit directions [count, n] along which a gate reacts most: left singular vectors."""
    return np.linalg.svd(W_gate)[0][:, :count].T


def gate_response(W_gate: np.ndarray, direction: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """2 sigmoid(a u W_gate), [scales, m]: what every feature is multiplied by as z moves by a along
    the unit vector u. 1 where the gate does nothing."""
    return 2 / (1 + np.exp(-np.outer(scales, direction @ W_gate)))
