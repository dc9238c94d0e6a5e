"""Pairs of sentences encoded and scored: each distinct sentence once."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from tqdm import tqdm

from common.command_line import UserError
from common.encoders import default_prompt
from common.evaluation import correlations
from common.exported import OnnxEncoder

Encoder = SentenceTransformer | OnnxEncoder
FEWEST_PAIRS = 10  # of fewer, a correlation says nothing, and may not exist
# Sentences are sorted by their number of tokens and encoded so many tokens at a time: hardly any
# padding, and on a CPU the fastest of 256 to 2,048.
BATCH_TOKENS = 16_384 if torch.cuda.is_available() else 1_024


def encode_distinct(
    encoder: Encoder,
    sentences: list[str],
    prompt: str = "",
    progress: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Encodes sentences in batches of about equal length and about `batch_tokens` tokens.

    Returns:
        (sentences, dimension) float32, in the order given.
    """
    mask = encoder.preprocess(sentences, prompt=prompt).get("attention_mask")
    lengths = np.asarray([len(text) for text in sentences] if mask is None else mask.sum(1))
    order = np.argsort(-lengths, kind="stable")
    # A batch ends where the running number of tokens passes a multiple of batch_tokens.
    ends = np.flatnonzero(np.diff(np.cumsum(lengths[order]) // batch_tokens)) + 1
    vectors = []
    with tqdm(total=len(sentences), desc=progress, unit=" sentences", disable=not progress) as bar:
        for batch in np.split(order, ends):
            texts = [sentences[index] for index in batch]
            options = {"batch_size": len(batch), "show_progress_bar": False}
            vectors.append(encoder.encode(texts, prompt=prompt, **options))
            bar.update(len(batch))
    return np.concatenate(vectors).astype(np.float32, copy=False)[np.argsort(order)]


def distinct_sentences(table: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """Returns the distinct sentences of a table's pairs, and each pair's two numbers (2, pairs)."""
    codes, sentences = pd.factorize(pd.concat([table["sentence1"], table["sentence2"]]))
    return sentences.tolist(), codes.reshape(2, -1)


def encode_pairs(
    encoder: Encoder, table: pd.DataFrame, prompt: str = "", progress: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes each distinct sentence of the corpus once, however often it occurs.

    Returns:
        (sentences, dimension) float32 embeddings, and the rows of each pair's two as (2, pairs).
    """
    sentences, pairs = distinct_sentences(table)
    return encode_distinct(encoder, sentences, prompt, progress), pairs


def check_pairs(pairs: pd.DataFrame, file: str) -> None:
    """Raises `UserError` for pairs that no correlation can be taken of."""
    scores = pairs["score"].nunique()
    if len(pairs) < FEWEST_PAIRS or scores < 2:
        raise UserError(
            f"{file}: {len(pairs)} pairs with {scores} different scores: a correlation wants "
            f"{FEWEST_PAIRS} pairs and two scores at least"
        )


class PairsEvaluator(BaseEvaluator):
    """Scores a model on sentence pairs: the eight correlations, at each Matryoshka dim.

    Keys are those of `evaluation.SCORE_KEYS` for the model's whole width, and with `@dim` behind
    them for smaller dims. Each distinct sentence is encoded once, for all dims.

    Args:
        pairs: sentence1, sentence2, score.
        file: name of the file that they come from: it stands beside every score.
        dims: Matryoshka dims, the largest first.

    Raises:
        UserError: pairs that no correlation can be taken of.
    """

    def __init__(self, pairs: pd.DataFrame, file: str, dims: Sequence[int] | None = None) -> None:
        super().__init__()
        self.pairs, self.file, self.dims = pairs, file, list(dims or [])
        check_pairs(pairs, file)
        self.greater_is_better, self.primary_metric = True, "cosine_spearman"
        self.cpu_seconds = self.wall_seconds = 0.0  # of all evaluations so far

    def __str__(self) -> str:
        return f"{self.file}, {len(self.pairs):,} pairs"

    def __call__(
        self,
        model: SentenceTransformer,
        output_path: str | None = None,
        epoch: float = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        """Returns the scores in [-1, 1]; raises FloatingPointError for NaN embeddings."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            scores = self.scores_of(*self.embed(model))
        except ValueError as error:
            raise FloatingPointError(f"step {steps}: {error}") from None
        self.cpu_seconds += time.process_time() - cpu
        self.wall_seconds += time.perf_counter() - wall
        return scores

    def embed(self, model: SentenceTransformer) -> tuple[np.ndarray, np.ndarray]:
        """Returns the embeddings of sentence1 and of sentence2, (pairs, dimension) float32."""
        embeddings, pairs = encode_pairs(model, self.pairs, default_prompt(model))
        first, second = embeddings[pairs]
        return first, second

    def scores_of(self, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
        """Returns the scores of what `embed` gave; raises ValueError where it is not finite."""
        scores, width = {}, first.shape[1]
        for dim in dict.fromkeys([width, *self.dims]):
            suffix = "" if dim == width else f"@{dim}"
            result = correlations(first[:, :dim], second[:, :dim], self.pairs["score"])
            scores |= {key + suffix: value for key, value in result.items()}
        return scores
