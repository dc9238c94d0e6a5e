"""Means of weights, and which of them dev prefers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from common.checkpoints import MEAN, checkpoints, step_of
from common.encoders import load_encoder
from common.evaluation import spearman_line
from common.run_folder import Run, Scores
from common.scoring import PairsEvaluator


def mean_weights(
    models: Iterable[SentenceTransformer], shares: Sequence[float]
) -> SentenceTransformer:
    """Returns a model whose weights are the mean of the models', each with its share (sum 1).

    The models are taken one at a time, so that a generator keeps one in memory beside the mean.
    """
    mean = None
    with torch.no_grad():
        for model, share in zip(models, shares, strict=True):
            if mean is None:
                mean = copy.deepcopy(model)
                for weight in mean.parameters():
                    weight.mul_(share)
            else:
                for weight, other in zip(mean.parameters(), model.parameters(), strict=True):
                    weight.add_(share * other)
    return mean


def add_to_mean(checkpoint: Path, model: SentenceTransformer, steps: Sequence[int]) -> None:
    """Writes beside a checkpoint its share of the mean of `steps`, added to the one before it.

    So the means of many checkpoints need the files of two: the last one holds the whole mean.

    Args:
        checkpoint: that of one of `steps`; where it is not the first, the one before is whole.
        model: its weights.
    """
    position, share = list(steps).index(step_of(checkpoint)), 1 / len(steps)
    mean = {name: share * weight.detach().cpu() for name, weight in model.named_parameters()}
    if position:
        before = load_file(checkpoint.with_name(f"checkpoint-{steps[position - 1]}") / MEAN)
        mean = {name: before[name].add_(weight) for name, weight in mean.items()}
    save_file(mean, checkpoint / MEAN, metadata={"steps": ", ".join(map(str, steps))})


def mean_of_last(run: Run, model: SentenceTransformer) -> tuple[SentenceTransformer, str]:
    """Returns the mean of the last checkpoints that --average_checkpoints asks for, and its steps.

    Args:
        model: any of the run's.
    """
    args = run.args
    *_, newest = found = checkpoints(run.folder / "checkpoints")
    if (newest / MEAN).is_file():
        mean = copy.deepcopy(model)
        with safe_open(newest / MEAN, "pt") as file, torch.no_grad():
            for name, weight in mean.named_parameters():
                weight.copy_(file.get_tensor(name))
            return mean, file.metadata()["steps"]
    # With --early_stopping nobody knows before the end which are the last.
    folders = found[-args.average_checkpoints :]
    options = {"max_seq_length": args.max_seq_length, "trust_remote_code": args.trust_remote_code}
    models = (load_encoder(str(folder), **options) for folder in folders)
    mean = mean_weights(models, [1 / len(folders)] * len(folders))
    return mean, ", ".join(str(step_of(folder)) for folder in folders)


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
    chosen, chosen_name, tried = best, f"step {best_step}", {f"step {best_step}": best_scores}
    print(f"step {best_step}: {dev}: {spearman_line(best_scores)}", file=sys.stderr)

    def consider(name: str, model: SentenceTransformer) -> None:
        nonlocal chosen, chosen_name
        tried[name] = dev(model, steps=best_step)
        print(f"{name}: {dev}: {spearman_line(tried[name])}", file=sys.stderr)
        # Of equals the first stays, which is the best checkpoint.
        if tried[name]["cosine_spearman"] > tried[chosen_name]["cosine_spearman"]:
            chosen, chosen_name = model, name

    candidates = [(f"step {best_step}", best)]
    if args.average_checkpoints > 1:
        mean, steps = mean_of_last(run, best)
        if steps != str(best_step):
            consider(f"mean of steps {steps}", mean)
            candidates.append((f"mean of steps {steps}", mean))
    if share := args.start_weight:
        start = load_encoder(
            args.model_name_or_path,
            args.max_seq_length,
            pooling=args.pooling,
            trust_remote_code=args.trust_remote_code,
        )
        for name, model in candidates:
            mixed = mean_weights([model, start], [1 - share, share])
            consider(f"{name}, {share:g} of the start", mixed)
    return chosen, chosen_name, tried
