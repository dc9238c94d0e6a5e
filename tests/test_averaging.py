"""Means of weights."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from common.averaging import try_means
from common.encoders import load_encoder
from common.evaluation import SCORE_KEYS
from common.run_folder import Run


def test_the_means_of_weights_and_which_dev_prefers(encoder: Path, tmp_path: Path) -> None:
    def constant(value: float) -> SentenceTransformer:
        model = load_encoder(str(encoder))
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(value)
        return model

    for step, value in ((2, 9.0), (4, 2.0), (6, 6.0)):
        constant(value).save(str(tmp_path / f"checkpoints/checkpoint-{step}"))
    constant(-4.0).save(str(tmp_path / "start"))
    args = argparse.Namespace(
        average_checkpoints=2,
        start_weight=0.25,
        max_seq_length=None,
        model_name_or_path=str(tmp_path / "start"),
        pooling=None,
        trust_remote_code=False,
    )
    run = Run(tmp_path, args, checkpoint=None, is_main=True, precision="fp32")
    seen = []

    def evaluate(model: SentenceTransformer, steps: int, wanted: float) -> dict[str, float]:
        (value,) = {weight.flatten()[0].item() for weight in model.parameters()}
        seen.append(value)
        return dict.fromkeys(SCORE_KEYS, -abs(value - wanted))

    for wanted, expected in ((6.0, 6.0), (4.2, 4.0), (3.4, 3.5), (0.0, 2.0)):
        dev = functools.partial(evaluate, wanted=wanted)
        best, name, tried = try_means(run, dev, constant(6.0), 6, dev(constant(6.0), 6))
        assert all((weight == expected).all() for weight in best.parameters())
        assert max(tried, key=lambda key: tried[key]["cosine_spearman"]) == name
    assert seen[:4] == [6.0, 4.0, 3.5, 2.0]
