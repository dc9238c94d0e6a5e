"""Means of weights, and which of them dev prefers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence

import torch
from sentence_transformers import SentenceTransformer

from common.encoders import load_encoder
from common.evaluation import spearman_line
from common.run_folder import Run, Scores, checkpoints, step_of
from common.scoring import PairsEvaluator


def mean_weights(
    models: Sequence[SentenceTransformer], shares: Sequence[float]
) -> SentenceTransformer:
    """Returns a model whose weights are the mean of the models', each with its share (sum 1)."""
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for target, *weights in zip(*(m.parameters() for m in (mean, *models)), strict=True):
            target.copy_(sum(share * weight for share, weight in zip(shares, weights, strict=True)))
    return mean


def try_means(
    run: Run, dev: PairsEvaluator, best: SentenceTransformer, best_step: int, best_scores: Scores
) -> tuple[SentenceTransformer, str, dict[str, Scores]]:
    """Returns what dev likes best of the best checkpoint and the means that were asked for.

    Last checkpoints: "Averaging Weights Leads to Wider Optima and Better Generalization",
    https://arxiv.org/abs/1803.05407. With the start: "Robust fine-tuning of zero-shot models",
    https://arxiv.org/abs/2109.01903.

    Args:
        best, best_step, best_scores: the best checkpoint, with its dev scores.

    Returns:
        The model, its name, and the dev scores of all candidates by name.
    """
    args = run.args
    options = {"max_seq_length": args.max_seq_length, "trust_remote_code": args.trust_remote_code}
    candidates = {f"step {best_step}": best}
    if (last := args.average_checkpoints) > 1:
        folders = checkpoints(run.folder / "checkpoints")[-last:]
        models = [load_encoder(str(folder), **options) for folder in folders]
        name = f"mean of steps {', '.join(str(step_of(folder)) for folder in folders)}"
        candidates[name] = mean_weights(models, [1 / len(models)] * len(models))
    if share := args.start_weight:
        start = load_encoder(args.model_name_or_path, pooling=args.pooling, **options)
        for name, model in list(candidates.items()):
            mixed = mean_weights([model, start], [1 - share, share])
            candidates[f"{name}, {share:g} of the start"] = mixed
    tried = {f"step {best_step}": best_scores}
    for name, model in candidates.items():
        if name not in tried:
            tried[name] = dev(model, steps=best_step)
        print(f"{name}: {dev}: {spearman_line(tried[name])}", file=sys.stderr)
    # Of equals the first, which is the best checkpoint.
    chosen = max(candidates, key=lambda name: tried[name]["cosine_spearman"])
    return candidates[chosen], chosen, tried
