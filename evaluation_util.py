"""The eight KorSTS correlations: one definition for training, benchmark and export.

Everywhere the whole corpus at once, never an average over batches; cosine Spearman leads.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

SIMILARITIES = ("cosine", "euclidean", "manhattan", "dot")
COEFFICIENTS = ("pearson", "spearman")
SCORE_KEYS = tuple(f"{name}_{kind}" for name in SIMILARITIES for kind in COEFFICIENTS)


def similarities(embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
    """Returns the four similarities of paired embeddings.

    Args:
        embeddings1, embeddings2: (pairs, dimension), any float dtype.

    Returns:
        (4, pairs) float64 in the order of `SIMILARITIES`; distances are negated.

    Raises:
        ValueError: an embedding is NaN or infinite.
    """
    first = np.asarray(embeddings1, dtype=np.float64)
    second = np.asarray(embeddings2, dtype=np.float64)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("embeddings hold NaN or infinite values")
    dot = np.einsum("pd,pd->p", first, second)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    difference = first - second
    return np.stack(
        [
            # As in sentence-transformers, a zero vector has cosine 0 with everything.
            dot / np.maximum(norms, 1e-12),
            -np.linalg.norm(difference, axis=1),
            -np.abs(difference).sum(axis=1),
            dot,
        ]
    )


def _pearson(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson correlation of each of (n, pairs) rows with a (pairs,) target, as (n,)."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    target = target - target.mean()
    return rows @ target / (np.linalg.norm(rows, axis=1) * np.linalg.norm(target))


def correlations(
    embeddings1: np.ndarray, embeddings2: np.ndarray, scores: np.ndarray
) -> dict[str, float]:
    """Correlates the four similarities with human scores: the eight numbers of the README.

    Args:
        embeddings1, embeddings2: (pairs, dimension) float.
        scores: (pairs,) float, any scale.

    Returns:
        Keys of `SCORE_KEYS` (`cosine_pearson`, `cosine_spearman`, ...), values in [-1, 1].

    Raises:
        ValueError: embeddings that are not finite, or constant so that nothing correlates.
    """
    values = similarities(embeddings1, embeddings2)
    # Rounding alone makes equal embeddings differ in the last bits: that is constant too.
    spread = np.ptp(values, axis=1)
    if (spread <= 1e-9 * np.abs(values).max(axis=1)).any():
        raise ValueError("all pairs have the same similarity: the embeddings are constant")
    scores = np.asarray(scores, dtype=np.float64)
    pearson = _pearson(values, scores)
    spearman = _pearson(rankdata(values, axis=1), rankdata(scores))
    return {
        f"{name}_{kind}": float(result[row])
        for row, name in enumerate(SIMILARITIES)
        for kind, result in (("pearson", pearson), ("spearman", spearman))
    }
