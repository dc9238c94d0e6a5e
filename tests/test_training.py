"""What training does with its options, on a tiny encoder and the samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import REPOSITORY, SAMPLES, run, weights
from encoders import edit_json
from sentence_transformers import SentenceTransformer

from common.data import read_korsts
from common.encoders import load_encoder
from common.options import recipe_parser
from common.run_folder import last_checkpoint
from common.scoring import PairsEvaluator
from common.training import AdamWPerTask, load_model
from training_sts import PearsonLoss


def test_early_stopping_ends_after_evaluations_without_a_best(
    encoder: Path, tmp_path: Path
) -> None:
    # At a rate as high as this one, dev falls again after a few epochs.
    done = run("training_sts.py", encoder, "--num_epochs", 30, "--learning_rate", 0.01,
               "--early_stopping", 2, "--run_dir", tmp_path / "run", "--no_test")  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    steps = [entry["step"] for entry in scores["evaluations"]]
    assert len([step for step in steps if step > scores["best_step"]]) == 2
    assert len(steps) < 30


def test_accumulated_batches_and_precision_auto_train_as_one_batch_in_fp32(
    encoder: Path, tmp_path: Path
) -> None:
    steady = shutil.copytree(encoder, tmp_path / "steady")
    edit_json(steady / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = ["--max_steps", 8, "--learning_rate", 1e-3, "--no_test"]
    ends = []
    for name, more in (
        ("one", ["--batch_size", 8]),
        ("two", ["--batch_size", 4, "--gradient_accumulation_steps", 2]),
        ("auto", ["--batch_size", 8, "--precision", "auto"]),
    ):
        folder = tmp_path / name
        done = run("training_sts.py", steady, *options, *more, "--run_dir", folder)
        assert done.returncode == 0, done.stderr
        ends.append(json.loads((folder / "scores.json").read_text())["dev"]["cosine_pearson"])
        before = json.loads((folder / "scores.json").read_text())["before_training"]
        assert abs(ends[-1] - before["cosine_pearson"]) > 1e-3
    assert ends[1] == pytest.approx(ends[0], abs=1e-4)
    if not torch.cuda.is_available():
        assert ends[2] == ends[0]


def test_the_pearson_loss_is_one_minus_the_correlation() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 32, 8)).astype(np.float32)
    scores = generator.random(32, dtype=np.float32)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    expected = 1 - np.corrcoef((first * second).sum(1) / norms, scores)[0, 1]
    loss = PearsonLoss(torch.nn.Identity())
    embeddings = [torch.tensor(first, requires_grad=True), torch.tensor(second)]
    assert loss.compute_loss_from_embeddings(
        embeddings, torch.tensor(scores)
    ).item() == pytest.approx(expected, abs=1e-6)
    alone = loss.compute_loss_from_embeddings([e[:1] for e in embeddings], torch.tensor(scores[:1]))
    alone.backward()  # the last batch may hold one pair: no correlation, and no NaN
    assert alone.item() == 1 and torch.isfinite(embeddings[0].grad).all()


@pytest.mark.parametrize("loss", ["cosent", "angle", "pearson"])
def test_another_loss_learns_and_the_mean_of_checkpoints_is_tried(
    loss: str, encoder: Path, tmp_path: Path
) -> None:
    options = ["--loss", loss, "--batch_size", 32, "--learning_rate", 1e-3, "--no_test"]
    options += ["--max_steps", 10, "--save_steps", 2, "--average_checkpoints", 3]
    done = run(
        "training_sts.py",
        encoder,
        *options,
        *("--start_weight", 0.25, "--attention_dropout", 0),
        "--run_dir",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert scores["dev"]["cosine_spearman"] > scores["before_training"]["cosine_spearman"]
    # Of each epoch's end (every three steps), each second step and the last step.
    means = ["mean of steps 8, 9, 10", "mean of steps 8, 9, 10, 0.25 of the start"]
    best = f"step {scores['best_step']}"
    assert list(scores["tried"]) == [best, means[0], f"{best}, 0.25 of the start", means[1]]
    values = {name: found["cosine_spearman"] for name, found in scores["tried"].items()}
    assert values[scores["chosen"]] == max(values.values()) == scores["dev"]["cosine_spearman"]
    assert f"best ({scores['chosen']}): " in done.stdout
    model = load_encoder(str(tmp_path / "run"))
    dev = PairsEvaluator(read_korsts(SAMPLES / "KorSTS/sts-dev.tsv"), "sts-dev.tsv")
    assert dev(model)["cosine_spearman"] == pytest.approx(max(values.values()), abs=1e-6)


@pytest.mark.parametrize("option", ["attention_dropout", "hidden_dropout"])
def test_a_dropout_option_reaches_its_layers_alone(option: str, encoder: Path) -> None:
    args = recipe_parser("", "x_", 1).parse_args(
        ["--model_name_or_path", str(encoder), "--max_seq_length", "48"]
    )
    before = load_model(args)
    vars(args)[option] = 0.25
    after = load_model(args)
    for (name, old), (_, new) in zip(before.named_modules(), after.named_modules(), strict=True):
        if isinstance(old, torch.nn.Dropout):
            asked = name.endswith("attention.self.dropout") == (option == "attention_dropout")
            assert new.p == (0.25 if asked else old.p)


def test_bf16_trains_and_is_scored_in_fp32(encoder: Path, tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        done = run("training_sts.py", encoder, "--max_steps", 12, "--precision", precision,
                   "--run_dir", folder, "--no_test")  # fmt: skip
        assert done.returncode == 0, done.stderr
        state = json.loads(
            last_checkpoint(folder / "checkpoints").joinpath("trainer_state.json").read_text()
        )
        losses += [[log["loss"] for log in state["log_history"] if "loss" in log]]
        scores = json.loads((folder / "scores.json").read_text())
        dev = PairsEvaluator(read_korsts(SAMPLES / "KorSTS/sts-dev.tsv"), "sts-dev.tsv")
        # Also of the very weights that the run started with.
        assert dev(load_encoder(str(encoder), 48)) == pytest.approx(scores["before_training"])
        assert dev(load_encoder(str(folder))) == pytest.approx(scores["dev"], abs=1e-6)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_prompt_is_trained_with_and_declared(encoder: Path, tmp_path: Path) -> None:
    """A run with --prompt is the run on sentences that begin with it."""
    prompt = "문장: "
    data = tmp_path / "data/KorSTS"
    data.mkdir(parents=True)
    for name in ("train", "dev"):
        table = pd.read_csv(SAMPLES / f"KorSTS/sts-{name}.tsv", sep="\t", quoting=3, dtype=str)
        table[["sentence1", "sentence2"]] = prompt + table[["sentence1", "sentence2"]]
        table.to_csv(data / f"sts-{name}.tsv", sep="\t", quoting=3, index=False)
    options = ["--max_steps", 6, "--no_test", "--run_dir"]
    written = run("training_sts.py", encoder, "--data_dir", data.parent, *options, tmp_path / "a")
    assert written.returncode == 0, written.stderr
    declared = run("training_sts.py", encoder, "--prompt", prompt, *options, tmp_path / "b")
    assert declared.returncode == 0, declared.stderr
    expected, actual = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    scores = [json.loads((tmp_path / run / "scores.json").read_text()) for run in ("a", "b")]
    assert scores[0] == scores[1]
    model = SentenceTransformer(str(tmp_path / "b"))
    assert np.array_equal(
        model.encode(["비가 온다"]), model.encode([f"{prompt}비가 온다"], prompt="")
    )


def test_each_task_has_its_own_adam_moments() -> None:
    def optimize(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, gradient: float) -> None:
        p.grad = torch.full_like(p, gradient)
        optimizer.step()

    shared = torch.nn.Parameter(torch.ones(3))
    ours = AdamWPerTask([shared], lr=0.1)
    reference = torch.nn.Parameter(torch.ones(3))
    theirs = [torch.optim.AdamW([reference], lr=0.1) for _ in range(2)]
    for step, gradient in enumerate([1.0, -100.0, 2.0, -50.0, 0.5, 10.0]):
        ours.task = step % 2
        optimize(ours, shared, gradient)
        optimize(theirs[step % 2], reference, gradient)
        torch.testing.assert_close(shared, reference)
        # What a checkpoint holds is enough to go on.
        state = ours.state_dict()
        ours = AdamWPerTask([shared], lr=0.1)
        ours.load_state_dict(state)


def test_a_loss_that_is_not_finite_names_step_data_and_sentences(
    encoder: Path, tmp_path: Path
) -> None:
    script = (REPOSITORY / "training_sts.py").read_text()
    broken = tmp_path / "training_broken.py"
    broken.write_text(
        script.replace(
            "train_data={", 'train_data=tables["train"].__setitem__("score", float("inf")) or {'
        )
    )
    done = run(str(broken), encoder, "--max_steps", 2, "--run_dir", tmp_path / "run")
    assert done.returncode == 1
    assert "error: step 1, data set sts: the loss is inf for the batch: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/modules.json").exists()
