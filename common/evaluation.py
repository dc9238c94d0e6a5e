"""The eight KorSTS correlations and their uncertainty: one definition for every script.

Everywhere the whole corpus at once, never an average over batches; cosine Spearman leads.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

SIMILARITIES = ("cosine", "euclidean", "manhattan", "dot")
COEFFICIENTS = ("pearson", "spearman")
SCORE_KEYS = tuple(f"{name}_{kind}" for name in SIMILARITIES for kind in COEFFICIENTS)
POSITIVE_FROM = 3.0  # of 5: from here on KLUE-STS calls a pair a paraphrase
RESAMPLES = 10_000


def similarities(embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
    """Returns the four similarities of paired embeddings, as sentence-transformers computes them.

    In float32, as its EmbeddingSimilarityEvaluator does: with other rounding, pairs whose
    similarities are all but equal change places, and Spearman changes by more than 1e-6.

    Args:
        embeddings1, embeddings2: (pairs, dimension), any float dtype.

    Returns:
        (4, pairs) float64 in the order of `SIMILARITIES`; distances are negated.

    Raises:
        ValueError: an embedding is NaN or infinite, or so large that a similarity is.
    """
    # Late: who only formats scores (the tables) need not wait for torch.
    import torch
    from sentence_transformers import util

    functions = (
        util.pairwise_cos_sim,
        util.pairwise_euclidean_sim,
        util.pairwise_manhattan_sim,
        util.pairwise_dot_score,
    )
    first = torch.from_numpy(np.asarray(embeddings1, dtype=np.float32))
    second = torch.from_numpy(np.asarray(embeddings2, dtype=np.float32))
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("embeddings hold NaN or infinite values")
    rows = [function(first, second).numpy() for function in functions]
    if not np.isfinite(rows).all():
        raise ValueError("embeddings are so large that their similarities are infinite")
    return np.stack(rows).astype(np.float64)


def _pearson(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson correlation of each of (n, pairs) rows with a (pairs,) target, as (n,)."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    target = target - target.mean()
    return rows @ target / (np.linalg.norm(rows, axis=1) * np.linalg.norm(target))


def _check_spread(values: np.ndarray) -> None:
    # Rounding alone makes equal embeddings differ in the last bits: that is constant too.
    spread = np.ptp(values, axis=1)
    if (spread <= 1e-6 * np.abs(values).max(axis=1)).any():
        raise ValueError("all pairs have the same similarity: the embeddings are constant")


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
    _check_spread(values)
    scores = np.asarray(scores, dtype=np.float64)
    pearson = _pearson(values, scores)
    spearman = _pearson(rankdata(values, axis=1), rankdata(scores))
    return {
        f"{name}_{kind}": float(result[row])
        for row, name in enumerate(SIMILARITIES)
        for kind, result in (("pearson", pearson), ("spearman", spearman))
    }


def spearman_line(scores: dict[str, float]) -> str:
    """Formats the four Spearman correlations x100, cosine first."""
    return "  ".join(f"{name} {100 * scores[f'{name}_spearman']:.2f}" for name in SIMILARITIES)


def f1(embeddings1: np.ndarray, embeddings2: np.ndarray, labels: np.ndarray) -> float:
    """F1 of KLUE-STS: a pair is called positive where 5 x cosine >= 3.0.

    Args:
        embeddings1, embeddings2: (pairs, dimension) float.
        labels: (pairs,) 0 or 1, the binary-label.

    Returns:
        F1 in [0, 1]; 0 where nothing is positive, as in scikit-learn.
    """
    cosine = similarities(embeddings1, embeddings2)[0]
    return float(_weighted_f1(cosine, labels, np.ones((1, len(cosine))))[0])


def bootstrap(
    embeddings1: np.ndarray,
    embeddings2: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Scores of resampled corpora: pairs drawn with replacement, as many as there are.

    The draws depend on `seed` and the number of pairs alone, so that the samples of two models on
    one corpus are paired: their difference is the bootstrap of the difference.

    Args:
        embeddings1, embeddings2: (pairs, dimension) float.
        scores: (pairs,) float, any scale.
        labels: (pairs,) 0 or 1, for F1 too.

    Returns:
        (resamples,) float64 for each of `SCORE_KEYS`, and for `f1` where labels are given. NaN
        where a resample is constant, which happens with a handful of pairs only.
    """
    values = similarities(embeddings1, embeddings2)
    pairs = values.shape[1]
    generator = np.random.default_rng(seed)
    chunks = []
    for start in range(0, resamples, 500):  # 500 x 1,379 weights stay in the processor's cache
        rows = min(500, resamples - start)
        drawn = generator.integers(0, pairs, size=(rows, pairs))
        drawn += np.arange(rows)[:, None] * pairs
        weights = np.bincount(drawn.ravel(), minlength=rows * pairs).reshape(rows, pairs)
        chunk = _weighted_correlations(values, np.asarray(scores, dtype=np.float64), weights)
        if labels is not None:
            chunk["f1"] = _weighted_f1(values[0], labels, weights)
        chunks.append(chunk)
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}


def interval(samples: np.ndarray, level: float = 0.95) -> list[float]:
    """Returns the two ends of the percentile interval of bootstrap samples."""
    tail = (1 - level) / 2
    return [float(end) for end in np.nanquantile(samples, [tail, 1 - tail])]


def _weighted_correlations(
    values: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """The eight correlations of resamples given by how often each pair is drawn.

    Args:
        values: (4, pairs) float.
        scores: (pairs,) float.
        weights: (resamples, pairs) int.

    Returns:
        (resamples,) float64 for each of `SCORE_KEYS`.
    """
    weights = weights.astype(np.float64)
    score_ranks = _resample_ranks(scores, weights)
    result = {}
    for name, row in zip(SIMILARITIES, values, strict=True):
        result[f"{name}_pearson"] = _weighted_pearson(row, scores, weights)
        result[f"{name}_spearman"] = _weighted_pearson(
            _resample_ranks(row, weights), score_ranks, weights
        )
    return result


def _resample_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks of (pairs,) values within each resample, ties averaged, as (resamples, pairs).

    Sorted once: in a resample, the copies of a value and of its equals fill the ranks that follow
    those of all smaller values, and each of them has the middle one.
    """
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    if len(count) == len(values):  # no ties
        per_group = np.empty_like(weights)
        per_group[:, group] = weights
    else:
        order = np.argsort(group, kind="stable")
        starts = np.concatenate([[0], np.cumsum(count)[:-1]])
        per_group = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = np.cumsum(per_group, axis=1) - (per_group - 1) / 2
    return ranks[:, group]


def _weighted_pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlations of x and y, each (pairs,) or (resamples, pairs), as (resamples,)."""
    total = weights.shape[1]  # as many are drawn as there are pairs

    def centred(v: np.ndarray) -> np.ndarray:
        return v - (weights * v).sum(axis=1, keepdims=True) / total

    x, y = centred(x), centred(y)
    weighted = weights * x
    variances = (weighted * x).sum(axis=1) * (weights * y * y).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weighted * y).sum(axis=1) / np.sqrt(variances)


def _weighted_f1(cosine: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 of resamples given by (resamples, pairs) weights, as (resamples,)."""
    called = (5 * cosine >= POSITIVE_FROM).astype(np.float64)
    labels = np.asarray(labels, dtype=np.float64)
    hits = weights @ (called * labels)
    positives = weights @ called + weights @ labels
    return np.divide(2 * hits, positives, out=np.zeros(len(weights)), where=positives > 0)
