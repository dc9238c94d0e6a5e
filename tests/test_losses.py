"""Losses of all kinds: with one forward where they take embeddings, with their own elsewhere."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, run
from encoders import edit_json, write_plain_encoder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from torch import nn

from common.command_line import UserError
from common.encoders import load_encoder
from common.packing import takes_embeddings
from common.training import recipe_loss

TEXTS = [
    ["비행기가 이륙한다.", "한 남자가 노래한다.", "아이가 웃는다.", "눈이 많이 온다."],
    ["비행기가 뜬다.", "한 여자가 춤춘다.", "아이가 뛰어논다.", "폭설이 내린다."],
    ["비행기가 내린다.", "아무도 없다.", "아이가 운다.", "비가 온다."],
]
ARGS = argparse.Namespace(matryoshka_dims=None, matryoshka_weights=None, resume=False)
SCORES, CLASSES = torch.tensor([0.9, 0.2, 0.6, 0.8]), torch.tensor([1, 0, 1, 1])
VECTORS = torch.linspace(-1, 1, 4 * 2 * 32).reshape(4, 2, 32)
MARGINS = torch.tensor([0.5, 0.1, 0.3, 0.2])


def softmax(model: SentenceTransformer) -> nn.Module:
    torch.manual_seed(0)
    return losses.SoftmaxLoss(model, 32, num_labels=2)


# name: columns, labels, whether embeddings are enough, the loss of a model
KINDS: dict[str, tuple[int, torch.Tensor | None, bool, Callable]] = {
    "cosine": (2, SCORES, True, losses.CosineSimilarityLoss),
    "cosent": (2, SCORES, True, losses.CoSENTLoss),
    "angle": (2, SCORES, True, losses.AnglELoss),
    "contrastive": (2, CLASSES, True, losses.ContrastiveLoss),
    "online contrastive": (2, CLASSES, True, losses.OnlineContrastiveLoss),
    "softmax": (2, CLASSES, False, softmax),
    "mse": (2, VECTORS[:, 0], False, losses.MSELoss),
    "mse by column": (2, VECTORS, False, losses.MSELoss),
    "distillation": (2, VECTORS, False, losses.EmbedDistillLoss),
    "contrastive tension": (2, SCORES, False, losses.ContrastiveTensionLoss),
    "mnr": (3, None, True, losses.MultipleNegativesRankingLoss),
    "symmetric": (3, None, True, losses.MultipleNegativesSymmetricRankingLoss),
    "triplet": (3, None, True, losses.TripletLoss),
    "margin mse": (3, MARGINS, True, losses.MarginMSELoss),
    "mega batch": (2, None, False, lambda m: losses.MegaBatchMarginLoss(m, mini_batch_size=2)),
    "cached mnr": (3, None, False, lambda m: losses.CachedMultipleNegativesRankingLoss(
        m, mini_batch_size=2)),
    "gist": (3, None, False, lambda m: losses.GISTEmbedLoss(m, m)),
    "cached gist": (3, None, False, lambda m: losses.CachedGISTEmbedLoss(m, m, mini_batch_size=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_loss_keeps_its_value_and_gradients(name: str, encoder: Path) -> None:
    columns, labels, is_enough, make = KINDS[name]
    found = []
    for prepare in (lambda model, loss: loss, lambda model, loss: recipe_loss(model, loss, ARGS)):
        model = load_encoder(str(encoder), 48).eval()
        made = make(model)
        assert takes_embeddings(made) is is_enough
        loss = prepare(model, made)
        value = loss([model.preprocess(texts) for texts in TEXTS[:columns]], labels)
        value.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([value.detach(), *gradients])
    assert len(found[0]) == len(found[1]) > 10
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_a_loss_with_weights_of_its_own_does_not_go_on(encoder: Path) -> None:
    model = load_encoder(str(encoder), 48)
    args = argparse.Namespace(**vars(ARGS) | {"resume": True})
    with pytest.raises(UserError, match="--resume: SoftmaxLoss has weights that no checkpoint"):
        recipe_loss(model, softmax(model), args)
    guide = load_encoder(str(encoder)).requires_grad_(False)
    recipe_loss(model, losses.GISTEmbedLoss(model, guide), args)


ADDED = {
    "triplet": ("training_nli.py", "losses.TripletLoss"),
    "guided by itself": ("training_nli.py", "lambda model: losses.GISTEmbedLoss(model, model)"),
    "softmax": (
        "training_sts.py",
        "lambda model: losses.SoftmaxLoss(model, 32, 1, loss_fct=lambda logits, scores: "
        "torch.nn.functional.mse_loss(logits[:, 0], scores))",
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_a_line_in_the_table_is_a_loss(name: str, encoder: Path, tmp_path: Path) -> None:
    script, made = ADDED[name]
    text = (REPOSITORY / script).read_text(encoding="utf-8")
    assert text.count("\nLOSSES = {\n") == 1
    copy = tmp_path / script
    copy.write_text(text.replace("\nLOSSES = {\n", f'\nLOSSES = {{\n    "{name}": {made},\n'))
    options = ["--loss", name, "--max_steps", 3, "--batch_size", 16, "--learning_rate", 1e-3]
    done = run(copy, encoder, *options, "--no_test", "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert scores["before_training"] != scores["evaluations"][-1]
    if "nli" in script:
        done = run(copy, encoder, *options, "--mini_batch_size", 4, "--no_test")
        assert done.returncode == 2
        assert done.stderr == f"error: --mini_batch_size: not with --loss {name}\n"


@pytest.mark.parametrize(
    "more", [[], ["--mini_batch_size", 8], ["--matryoshka_dims", "32,16"], ["--precision", "bf16"]]
)
def test_gist_trains_with_a_guide_of_another_tokenizer(
    more: list, encoder: Path, offline_encoder: Path, tmp_path: Path
) -> None:
    options = ["--loss", "gist", "--guide", offline_encoder if not more else encoder]
    options += ["--max_steps", 2, "--batch_size", 16, "--no_test", "--run_dir", tmp_path / "run"]
    done = run("training_nli.py", encoder, *options, *more)
    assert done.returncode == 0, done.stderr
    stored = (tmp_path / "run/run.json").read_text()
    assert str(options[3]) not in stored  # the guide's place is this machine's alone
    guide = json.loads(stored)["guide"]
    assert guide["weights"].keys() == {"model.safetensors"} and "/" not in guide["name"]


def test_a_guide_is_compared_by_content(encoder: Path, tmp_path: Path) -> None:
    guides = [write_plain_encoder(tmp_path / f"guide-{seed}", seed=seed) for seed in (1, 2)]
    options = ["--max_steps", 2, "--batch_size", 16, "--no_test", "--run_dir", tmp_path / "run"]
    gist = ["--loss", "gist", "--guide"]
    assert run("training_nli.py", encoder, *options, *gist, guides[0]).returncode == 0
    edit_json(tmp_path / "run/run.json", finished=None)
    done = run("training_nli.py", encoder, *options, *gist, guides[1], "--resume")
    assert done.returncode == 2
    says = "error: --resume: guide-2: other weights than the run in "
    assert done.stderr.splitlines()[-1].startswith(says)
    moved = guides[0].rename(tmp_path / "moved")
    done = run("training_nli.py", encoder, *options, *gist, moved, "--resume")
    assert done.returncode == 0, done.stderr
    for wrong in (["--loss", "gist"], ["--guide", moved]):
        done = run("training_nli.py", encoder, *wrong)
        assert done.returncode == 2
        assert done.stderr == "error: --loss gist and --guide MODEL go together\n"
