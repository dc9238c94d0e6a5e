"""What training does with its options, on a tiny encoder and the samples."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from commands import REPOSITORY, SAMPLES, run, weights
from encoders import edit_json
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from common import checkpoints, machine, training
from common.checkpoints import last_checkpoint
from common.data import read_korsts
from common.encoders import default_prompt, load_encoder
from common.evaluation import correlations
from common.options import recipe_parser
from common.scoring import PairsEvaluator
from common.training import load_model
from common.two_tasks import AdamWPerTask
from training_sts import PearsonLoss

LAYER = "encoder.layer.0.output.dense.weight"


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
        *("--start_weight", 0.25, "--attention_dropout", 0, "--hidden_dropout", 0),
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


def test_of_several_gpus_one_trains_and_says_so(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, post_init = [], training.SentenceTransformerTrainingArguments.__post_init__

    def with_two_gpus(self: training.SentenceTransformerTrainingArguments) -> None:
        post_init(self)
        self._n_gpu = 2
        found.append(self)

    monkeypatch.setattr(
        training.SentenceTransformerTrainingArguments, "__post_init__", with_two_gpus
    )
    done = run("training_sts.py", encoder, "--run_dir", tmp_path / "run", "--max_steps", 1)
    assert done.returncode == 0, done.stderr
    assert "note: one of 2 GPUs trains; for all of them: torchrun --nproc_per_node" in done.stderr
    assert found[0].n_gpu == 1


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
    assert script.count("train_data=data.train") == 1
    infinite = 'data.train["sts"].__setitem__("score", float("inf"))'
    broken.write_text(
        script.replace("train_data=data.train", f"train_data={infinite} or data.train")
    )
    done = run(str(broken), encoder, "--max_steps", 2, "--run_dir", tmp_path / "run")
    assert done.returncode == 1
    assert "error: step 1, data set sts: the loss is inf for the batch: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/modules.json").exists()


def test_losses_are_looked_at_together_and_the_first_bad_one_is_named(
    encoder: Path, tmp_path: Path
) -> None:
    """Step by step, a GPU would be waited for; before anything is scored or saved, all are."""
    script = (REPOSITORY / "training_sts.py").read_text()
    broken = tmp_path / "training_broken.py"
    counted = """
class Broken(losses.CosineSimilarityLoss):
    steps = 0

    def compute_loss_from_embeddings(self, *inputs):
        self.steps += 1
        loss = super().compute_loss_from_embeddings(*inputs)
        return loss * float("nan") if self.steps > 2 else loss


LOSSES["broken"] = Broken


def main("""
    assert script.count("\ndef main(") == 1
    broken.write_text(script.replace("\ndef main(", counted, 1))
    options = ["--loss", "broken", "--max_steps", 9]  # scored behind the last
    done = run(str(broken), encoder, *options, "--run_dir", tmp_path / "run")
    assert done.returncode == 1
    assert "error: step 3, data set sts: the loss is nan for the batch: " in done.stderr
    assert not checkpoints.checkpoints(tmp_path / "run/checkpoints")


def test_a_gpu_without_memory_left_ends_in_one_line(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB."

    def compute_loss(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError(f"{said}\nand more")

    monkeypatch.setattr(training.RecipeTrainer, "compute_loss", compute_loss)
    done = run("training_sts.py", encoder, "--max_steps", 2, "--run_dir", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {said}" and "Traceback" not in done.stderr


def test_a_second_stage_keeps_the_prompt_of_the_first(encoder: Path, tmp_path: Path) -> None:
    def stage(model: Path, name: str, *options: object) -> subprocess.CompletedProcess:
        done = run("training_sts.py", model, "--max_steps", 3, "--no_test", *options,
                   "--run_dir", tmp_path / name)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    stage(encoder, "first", "--prompt", "문장: ")
    kept = stage(tmp_path / "first", "kept")
    repeated = stage(tmp_path / "first", "repeated", "--prompt", "문장: ")
    other = stage(tmp_path / "first", "other", "--prompt", "글: ")
    none = stage(tmp_path / "first", "none", "--prompt", "")
    one, two = weights(tmp_path / "kept"), weights(tmp_path / "repeated")
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name, prompt in (("kept", "문장: "), ("other", "글: "), ("none", "")):
        model = SentenceTransformer(str(tmp_path / name))
        assert default_prompt(model) == prompt
        assert json.loads((tmp_path / name / "run.json").read_text())["prompt"] == prompt
        assert not torch.equal(weights(tmp_path / name)[LAYER], one[LAYER]) or name == "kept"
    note = "note: --prompt {!r} instead of "
    assert "note: --prompt" not in kept.stderr + repeated.stderr
    assert note.format("글: ") in other.stderr and note.format("") in none.stderr


def test_a_model_kept_in_half_precision_trains_and_is_saved_in_fp32(
    encoder: Path, tmp_path: Path
) -> None:
    ends = []
    for name, dtype in (("half", torch.bfloat16), ("twin", torch.float32)):
        folder = shutil.copytree(encoder, tmp_path / name)
        model = AutoModel.from_pretrained(encoder, dtype=torch.bfloat16).to(dtype)
        model.save_pretrained(folder)
        done = run("training_sts.py", folder, "--max_steps", 3, "--no_test",
                   "--run_dir", tmp_path / f"{name}-run")  # fmt: skip
        assert done.returncode == 0, done.stderr
        ends.append(weights(tmp_path / f"{name}-run"))
    for key, value in ends[1].items():
        assert ends[0][key].dtype == torch.float32
        assert torch.equal(ends[0][key], value)


def test_a_readback_may_differ_by_rounding_and_by_no_more(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = checkpoints.check_embeddings

    def run_with(change: float, name: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(checkpoints, "check_embeddings", lambda model: embed(model) + change)
        return run("training_sts.py", encoder, "--max_steps", 1, "--no_test",
                   "--run_dir", tmp_path / name)  # fmt: skip

    assert run_with(2e-6, "rounding").returncode == 0
    for change in (1e-2, float("nan")):
        done = run_with(change, str(change))
        assert done.returncode == 1
        assert "gives other embeddings when read back" in done.stderr.splitlines()[-1]
        assert not (tmp_path / str(change) / "modules.json").exists()


def test_each_model_is_scored_once(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    embed = PairsEvaluator.embed

    def counted(self: PairsEvaluator, model: SentenceTransformer) -> object:
        scored.append(self.file)
        return embed(self, model)

    monkeypatch.setattr(PairsEvaluator, "embed", counted)
    done = run("training_sts.py", encoder, "--max_steps", 2, "--save_steps", 1,
               "--average_checkpoints", 2, "--start_weight", 0.5,
               "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Before training, the best step, the mean, and both with the start; then the chosen one.
    assert scored == ["sts-dev.tsv"] * 5 + ["sts-test.tsv"]


def test_run_json_says_what_each_part_cost(encoder: Path, tmp_path: Path) -> None:
    done = run("training_sts.py", encoder, "--max_steps", 2, "--start_weight", 0.5,
               "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "run/run.json").read_text())
    parts, whole = content["parts"], content["whole"]
    assert list(parts) == ["start", "training", "dev scores", "reading back", "means",
                           "test scores", "saving"]  # fmt: skip
    for key in ("wall_seconds", "cpu_seconds"):
        costs = [part[key] for part in parts.values()]
        assert all(cost >= 0 for cost in costs) and parts["training"][key] > 0
        assert sum(costs) <= whole[key] + 0.1
    assert whole["peak_memory_mb"] > 100


@pytest.mark.parametrize(
    ("capabilities", "times_as_fast", "taken"),
    [
        ({"amx_bf16": True}, 1.8, "bf16 (amx_bf16: products of matrices 1.8 times as fast"),
        ({"avx512_bf16": True}, 1.8, "bf16 (avx512_bf16: products of matrices 1.8 times as fast"),
        ({"avx512_bf16": True}, 0.9, "fp32 (avx512_bf16: products of matrices 0.9 times as fast"),
        ({"avx2": True}, None, "fp32 (no amx_bf16 or avx512_bf16 here)"),
    ],
)
def test_precision_auto_takes_bf16_where_it_is_faster(
    capabilities: dict[str, bool],
    times_as_fast: float | None,
    taken: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    # None: not measured where it cannot be faster.
    monkeypatch.setattr(machine, "bf16_times_as_fast", times_as_fast and (lambda: times_as_fast))
    assert machine.training_precision("auto") == taken[:4]
    assert capsys.readouterr().err.startswith(f"precision auto: {taken}")
    assert machine.training_precision("fp32") == "fp32"
    assert capsys.readouterr().err == ""


def test_the_precision_is_that_of_the_option_alone(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plain", "launched"):
        done = run("training_sts.py", encoder, "--max_steps", 2, "--no_test",
                   "--run_dir", tmp_path / name)  # fmt: skip
        assert done.returncode == 0, done.stderr
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` does
    plain, launched = (weights(tmp_path / name) for name in ("plain", "launched"))
    assert all(torch.equal(plain[name], launched[name]) for name in plain)


@pytest.mark.parametrize(("major", "taken"), [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_precision_auto_takes_no_bf16_that_a_gpu_emulates(
    major: int, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    properties = SimpleNamespace(major=major)  # 7: T4, V100
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert machine.training_precision("auto") == taken


def test_a_mac_is_named_and_so_is_where_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    sysctl = tmp_path / "sysctl"
    sysctl.write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo Apple M4\n')
    sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.device_name("cpu") == "Apple M4"
    assert machine.device_name(torch.device("mps")) == "Apple M4 (mps)"
    sysctl.unlink()
    assert machine.device_name("mps").endswith(" (mps)") and len(machine.device_name("cpu")) > 1


def test_precision_auto_is_decided_once(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max_steps", 4, "--save_steps", 2, "--precision", "auto", "--no_test"]
    options += ["--run_dir", tmp_path / "run"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(machine, "bf16_times_as_fast", lambda: 2.0)
    assert run("training_sts.py", encoder, *options).returncode == 0
    run_file = tmp_path / "run/run.json"
    content = json.loads(run_file.read_text())
    assert content["precision"] == "bf16"
    run_file.write_text(json.dumps(content | {"finished": None}))
    shutil.rmtree(tmp_path / "run/checkpoints")  # from the start, on another machine
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    done = run("training_sts.py", encoder, *options, "--resume")
    assert done.returncode == 0, done.stderr
    again = json.loads(run_file.read_text())
    assert again["precision"] == "bf16" and again["weights"] == content["weights"]


def test_training_runs_without_the_modules_that_windows_lacks(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("resource", "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    done = run("training_sts.py", encoder, "--max_steps", 1, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["whole"]["peak_memory_mb"] > 100


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize(("rows", "says"), [(48, "48 pairs with 1 "), (9, "9 pairs with ")])
def test_pairs_without_a_correlation_are_refused_before_a_model_loads(
    split: str, rows: int, says: str, tmp_path: Path
) -> None:
    data = shutil.copytree(SAMPLES, tmp_path / "data")
    path = data / f"KorSTS/sts-{split}.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()[: rows + 1]
    if rows == 48:
        lines[1:] = ["\t".join([*line.split("\t")[:4], "2.0", *line.split("\t")[5:]])
                     for line in lines[1:]]  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = run("training_sts.py", tmp_path / "no-model", "--data_dir", data)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: sts-{split}.tsv: {says}")


def test_the_whole_width_selects_whatever_dims_are_asked_for(encoder: Path, tmp_path: Path) -> None:
    done = run("training_sts.py", encoder, "--max_steps", 2, "--matryoshka_dims", "16,8",
               "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    test = json.loads((tmp_path / "run/scores.json").read_text())["test"]
    table = read_korsts(SAMPLES / "KorSTS/sts-test.tsv")
    model = load_encoder(str(tmp_path / "run"))
    first, second = (model.encode(list(table[f"sentence{side}"])) for side in (1, 2))
    for dim, suffix in ((32, ""), (16, "@16"), (8, "@8")):
        expected = correlations(first[:, :dim], second[:, :dim], table["score"])
        assert test[f"cosine_spearman{suffix}"] == pytest.approx(
            expected["cosine_spearman"], abs=1e-6
        )
    for dim in (16, 8):
        assert f"cosine_spearman at {dim}: " in done.stdout
