import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sklearn.metrics import f1_score

from common import evaluation
from common.evaluation import SCORE_KEYS, SIMILARITIES, bootstrap, correlations, f1, interval


def make_pairs(pairs: int = 200, dimension: int = 24, seed: int = 0):
    """Embeddings of pairs with tied scores, identical sentences and a zero vector among them."""
    generator = np.random.default_rng(seed)
    first = generator.normal(size=(pairs, dimension)).astype(np.float32)
    mix = generator.uniform(size=(pairs, 1))
    second = (mix * first + (1 - mix) * generator.normal(size=first.shape)).astype(np.float32)
    second[::10] = first[::10]
    second[5] = 0
    scores = np.round(5 * mix[:, 0] + generator.normal(scale=0.5, size=pairs)).clip(0, 5) / 5
    return first, second, scores


def evaluator_scores(first, second, scores) -> dict[str, float]:
    """What sentence-transformers' evaluator says of these embeddings."""
    blank = [""] * len(scores)
    evaluator = EmbeddingSimilarityEvaluator(
        blank, blank, list(scores), similarity_fn_names=list(SIMILARITIES), write_csv=False
    )
    sides = iter([first, second])
    evaluator.embed_inputs = lambda *_, **__: next(sides)
    evaluator.store_metrics_in_model_card_data = lambda *_: None
    metrics = evaluator(None)
    return {
        f"{name}_{kind}": metrics[f"{kind}_{name}"]
        for name in SIMILARITIES
        for kind in ("pearson", "spearman")
    }


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_the_evaluator(seed, normalized):
    first, second, scores = make_pairs(seed=seed)
    if normalized:  # identical sentences have a cosine of 1 up to rounding: ties that are none
        first = first / np.linalg.norm(first, axis=1, keepdims=True)
        second = second / np.maximum(np.linalg.norm(second, axis=1, keepdims=True), 1e-9)
    ours = correlations(first, second, scores)
    assert list(ours) == list(SCORE_KEYS)
    assert ours == pytest.approx(evaluator_scores(first, second, scores), abs=1e-9)


def test_scores_may_have_any_scale():
    first, second, scores = make_pairs()
    assert correlations(first, second, scores) == pytest.approx(
        correlations(first, second, 5 * scores + 1), abs=1e-12
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    first, second, scores = make_pairs()
    second[7, 3] = value
    with pytest.raises(ValueError, match="NaN"):
        correlations(first, second, scores)


@pytest.mark.parametrize("scale", [1e19, 1e20, 1e37])
def test_embeddings_whose_similarities_are_infinite_are_refused(scale):
    first, second, scores = make_pairs()
    for function in (correlations, bootstrap):
        with pytest.raises(ValueError, match="so large that their similarities are infinite"):
            function(scale * first, scale * second, scores)


@pytest.mark.parametrize("noise", [0, 1e-8])
def test_constant_embeddings_are_refused_even_where_rounding_blurs_them(noise):
    generator = np.random.default_rng(0)
    constant = generator.normal(size=24) * (1 + noise * generator.normal(size=(200, 24)))
    with pytest.raises(ValueError, match="constant"):
        correlations(constant, constant[::-1], generator.uniform(size=200))


def test_bootstrap_is_scipy_on_each_resample():
    first, second, scores = make_pairs()
    values = evaluation.similarities(first, second)
    values[3] = np.round(values[3])  # ties among similarities too
    generator = np.random.default_rng(1)
    drawn = generator.integers(0, len(scores), size=(30, len(scores)))
    weights = np.stack([np.bincount(row, minlength=len(scores)) for row in drawn])
    result = evaluation._weighted_correlations(values, scores, weights)
    for number, row in enumerate(drawn):
        for name, similarity in zip(SIMILARITIES, values, strict=True):
            expected = pearsonr(similarity[row], scores[row])[0]
            assert result[f"{name}_pearson"][number] == pytest.approx(expected, abs=1e-10)
            expected = spearmanr(similarity[row], scores[row])[0]
            assert result[f"{name}_spearman"][number] == pytest.approx(expected, abs=1e-10)


def test_resample_ranks_are_average_ranks():
    values = np.array([3.0, 1.0, 1.0, 2.0, 5.0])
    weights = np.array([[1, 1, 1, 1, 1], [2, 0, 3, 0, 0], [0, 2, 1, 1, 1]])
    ranks = evaluation._resample_ranks(values, weights.astype(float))
    for row, weight in zip(ranks, weights, strict=True):
        copies = np.repeat(np.arange(5), weight)
        np.testing.assert_allclose(row[copies], rankdata(values[copies]))


def test_bootstrap_depends_on_seed_and_pairs_alone_so_that_models_are_paired():
    first, second, scores = make_pairs(100)
    samples = bootstrap(first, second, scores, resamples=700, seed=3)
    again = bootstrap(first, second, scores, resamples=700, seed=3)
    other = bootstrap(first, second, scores, resamples=700, seed=4)
    assert all(np.array_equal(samples[key], again[key]) for key in SCORE_KEYS)
    assert not np.array_equal(samples["dot_spearman"], other["dot_spearman"])
    assert len(samples["dot_spearman"]) == 700
    # A monotone change of the embeddings leaves every resample's Spearman where it was: the
    # difference of two equal models is 0 throughout, not a difference of two draws.
    scaled = bootstrap(2 * first, 2 * second, scores, resamples=700, seed=3)
    np.testing.assert_allclose(samples["dot_spearman"], scaled["dot_spearman"], atol=1e-12)


def test_interval_agrees_with_fisher_for_normal_data():
    generator = np.random.default_rng(0)
    pairs = 1000
    cosine = generator.normal(size=pairs)
    human = 0.8 * cosine + 0.6 * generator.normal(size=pairs)
    embeddings = np.stack([cosine, np.ones(pairs)], axis=1)
    axis = np.tile([1.0, 0.0], (pairs, 1))
    samples = bootstrap(embeddings, axis, human, resamples=4000)["dot_pearson"]
    centre = np.arctanh(pearsonr(cosine, human)[0])
    expected = np.tanh(centre + np.array([-1.96, 1.96]) / np.sqrt(pairs - 3))
    assert interval(samples) == pytest.approx(expected, abs=0.005)


def test_f1_of_klue_counts_five_times_cosine_from_3_on():
    axis = np.tile([1.0, 0.0], (4, 1))
    cosines = np.array([0.6001, 0.5999, 0.9, 0.1])
    embeddings = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    labels = np.array([1, 1, 0, 0])
    assert f1(embeddings, axis, labels) == pytest.approx(f1_score(labels, [1, 0, 1, 0]))
    assert f1(-embeddings, axis, labels) == 0


def test_bootstrap_of_f1_is_that_of_scikit_learn():
    first, second, scores = make_pairs()
    labels = (scores >= 0.6).astype(int)
    samples = bootstrap(first, second, scores, labels, resamples=20, seed=2)["f1"]
    drawn = np.random.default_rng(2).integers(0, len(scores), size=(20, len(scores)))
    called = evaluation.similarities(first, second)[0] >= 0.6
    expected = [f1_score(labels[row], called[row]) for row in drawn]
    np.testing.assert_allclose(samples, expected, atol=1e-12)


def test_ten_thousand_resamples_hold_the_score_in_their_interval():
    first, second, scores = make_pairs()
    samples = bootstrap(first, second, scores)
    assert {len(values) for values in samples.values()} == {10_000}
    low, high = interval(samples["cosine_spearman"])
    assert low < correlations(first, second, scores)["cosine_spearman"] < high


def test_the_interval_is_of_95_percent_unless_told_otherwise():
    samples = np.arange(1001.0)
    assert interval(samples) == pytest.approx([25, 975])
    assert interval(samples, 0.9) == pytest.approx([50, 950])
