"""The three training commands on a tiny encoder and the samples, and the parts they share."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from encoders import edit_json, write_plain_encoder
from hub import Hub
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

import training_util
from data_util import UserError, read_korsts, read_nli_triplets
from evaluation_util import SCORE_KEYS
from model_util import load_encoder
from training_sts import PearsonLoss

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLES = REPOSITORY / "tests" / "samples"
KORNLU = REPOSITORY.parent / "shared" / "KorNLUDatasets"
SCRIPTS = ("training_sts.py", "training_nli.py", "training_multi-task.py")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def command(script: str, encoder: Path, *options: object) -> list[str]:
    fixed = ["--model_name_or_path", encoder, "--max_seq_length", 48, "--data_dir", SAMPLES]
    return [sys.executable, str(REPOSITORY / script), *map(str, [*fixed, *options])]


def run(
    script: str, encoder: Path, *options: object, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(script, encoder, *options),
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
    )


def options_of(*options: str) -> argparse.Namespace:
    args = training_util.recipe_parser("", "x_", 1).parse_args(options)
    args.world_size = 1
    return args


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- The commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("training_sts.py", ["--num_epochs", 2, "--matryoshka_dims", "32,16"]),
        ("training_nli.py", ["--batch_size", 16, "--mini_batch_size", 8]),
        (
            "training_multi-task.py",
            ["--max_steps", 5, "--nli_batch_size", 16, "--learning_rate", 0.01],
        ),
    ],
)
def test_a_run_leaves_a_finished_folder(
    script: str, options: list, encoder: Path, tmp_path: Path
) -> None:
    done = run(script, encoder, *options, "--run_dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    run_file = json.loads((folder / "run.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())
    assert run_file["finished"] >= run_file["started"]
    assert {record["file"] for record in run_file["data"]} >= {"sts-dev.tsv", "sts-test.tsv"}
    assert scores["dev_pairs"] == scores["test_pairs"] == 48
    assert scores["before_training"]["cosine_spearman"] != scores["dev"]["cosine_spearman"]
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "logs").iterdir())
    assert "model-index" in (folder / "README.md").read_text()
    if "training_sts" in script:
        assert [entry["step"] for entry in scores["evaluations"]] == [12, 24]
        assert "cosine_spearman@16" in scores["test"]
    best = max(scores["evaluations"], key=lambda entry: entry["cosine_spearman"])
    assert best["step"] == scores["best_step"]
    # The folder opens as a mean-pooling encoder, in the layout of every version.
    model = SentenceTransformer(str(folder))
    assert model.max_seq_length == 48
    assert "sentence_transformers.models.Pooling" in (folder / "modules.json").read_text()
    test = read_korsts(SAMPLES / "KorSTS/sts-test.tsv")
    evaluator = training_util.KorSTSEvaluator(test, None)
    assert evaluator(model)["cosine_spearman"] == pytest.approx(
        scores["test"]["cosine_spearman"], abs=1e-6
    )
    assert "sts-test.tsv, 48 pairs" in done.stdout


def test_a_stage_goes_on_from_a_run_folder_and_a_dead_run_says_so(
    encoder: Path, tmp_path: Path
) -> None:
    first = run("training_nli.py", encoder, "--max_steps", 2, "--batch_size", 8,
                "--run_dir", tmp_path / "nli", "--no_test")  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert "test" not in json.loads((tmp_path / "nli/scores.json").read_text())
    second = run("training_sts.py", tmp_path / "nli", "--max_steps", 1,
                 "--run_dir", tmp_path / "sts")  # fmt: skip
    assert second.returncode == 0, second.stderr
    run_file = tmp_path / "nli/run.json"
    run_file.write_text(json.dumps(json.loads(run_file.read_text()) | {"finished": None}))
    third = run("training_sts.py", tmp_path / "nli", "--run_dir", tmp_path / "never")
    assert third.returncode == 2
    assert third.stderr.splitlines()[-1].endswith("an unfinished training run: go on with --resume")
    assert not (tmp_path / "never").exists()


def test_base_and_trained_model_come_from_the_hub_and_go_to_it(
    encoder: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoder, tmp_path / "hub/klue/tiny")
    with Hub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment(tmp_path / "cache")

        def from_hub(model: str, *options: object) -> subprocess.CompletedProcess:
            line = command("training_sts.py", Path(model), "--max_steps", 1, "--no_test", *options)
            return subprocess.run(line, capture_output=True, text=True, env=environment)

        first = tmp_path / "first"
        done = from_hub("klue/tiny", "--run_dir", first, "--push_to_hub", "someone/trained")
        assert done.returncode == 0, done.stderr
        pushed = tmp_path / "hub/someone/trained"
        assert (pushed / "modules.json").read_bytes() == (first / "modules.json").read_bytes()
        assert "base_model: klue/tiny" in (pushed / "README.md").read_text()
        assert not (pushed / "checkpoints").exists()
        assert not (pushed / "logs").exists()
        second = from_hub("someone/trained", "--run_dir", tmp_path / "second")
        assert second.returncode == 0, second.stderr
        hub.faults["someone/refused"] = "push-403"
        refused = tmp_path / "refused"
        third = from_hub("klue/tiny", "--run_dir", refused, "--push_to_hub", "someone/refused")
        assert third.returncode == 1
        assert third.stderr.splitlines()[-1].startswith("error: someone/refused: not uploaded: ")
        assert json.loads((refused / "run.json").read_text())["finished"]


def test_a_bad_file_stops_before_anything_is_left(encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "KorSTS").mkdir(parents=True)
    for name in ("train", "dev", "test"):
        text = (SAMPLES / f"KorSTS/sts-{name}.tsv").read_text()
        (data / f"KorSTS/sts-{name}.tsv").write_text(text)
    with (data / "KorSTS/sts-dev.tsv").open("a") as file:
        file.write("g\tf\ty\ti\tfive\ta\tb\n")
    done = run("training_sts.py", encoder, "--data_dir", data, "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert (
        done.stderr.strip() == f"error: {data}/KorSTS/sts-dev.tsv:50: score 'five' is not a number"
    )
    assert not (tmp_path / "out").exists()


def check_kills(
    script: str, model: Path, options: list[object], tmp_path: Path, kills: int, start: float
) -> None:
    """Kills a run at random moments; each run that ends in spite of it must give the weights (and
    scores) of an uninterrupted one. Every other kill falls while a checkpoint is being written or
    just after it, the others up to `start` seconds after the start of the process."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    done = run(script, model, *options, "--run_dir", whole)
    assert done.returncode == 0, done.stderr
    expected, expected_scores = weights(whole), json.loads((whole / "scores.json").read_text())
    generator = np.random.default_rng(777)
    killed, resumed = 0, False
    finished = False
    while not finished or killed < kills:
        resume = ["--resume"] if (folder / "run.json").exists() else []
        process = subprocess.Popen(
            command(script, model, *options, "--run_dir", folder, *resume),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if killed < kills:
            if killed % 2:
                # The first file of a checkpoint, or its last: then there is one to go on from.
                name = "*.json" if killed % 4 == 1 else "manifest.json"
                before = checkpoint_states(folder, name)
                while process.poll() is None and checkpoint_states(folder, name) <= before:
                    time.sleep(0.005)
                time.sleep(generator.uniform(0, 0.5))
            else:
                time.sleep(generator.uniform(0, start))
            process.kill()
        _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        killed += process.returncode == -signal.SIGKILL
        resumed |= "resuming from" in stderr and "no checkpoint yet" not in stderr
        # What looks finished is finished. A fast machine ends runs between two kills: begin anew.
        finished = (folder / "modules.json").exists()
        assert finished or process.returncode
        if finished:
            actual = weights(folder)
            assert all(torch.equal(expected[name], actual[name]) for name in expected)
            assert json.loads((folder / "scores.json").read_text()) == expected_scores
            shutil.rmtree(folder)
    assert resumed


def test_killed_at_any_moment_a_run_ends_with_the_same_weights(
    encoder: Path, tmp_path: Path
) -> None:
    options = ["--max_steps", 24, "--save_steps", 2, "--nli_batch_size", 8, "--no_test"]
    check_kills("training_multi-task.py", encoder, options, tmp_path, kills=6, start=8)


def checkpoint_states(folder: Path, name: str) -> set[str]:
    return {str(path) for path in folder.glob(f"checkpoints/*/{name}")}


def test_a_damaged_checkpoint_and_a_finished_run_stop_a_resume(
    encoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = ["--max_steps", 2, "--save_steps", 1, "--no_test", "--run_dir", folder]
    assert run("training_sts.py", encoder, *options).returncode == 0
    again = run("training_sts.py", encoder, *options, "--resume")
    assert again.returncode == 2
    assert "this run finished at" in again.stderr
    run_file = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run_file | {"finished": None}))
    other = run("training_sts.py", encoder, *options, "--resume", "--learning_rate", 1e-3)
    assert other.returncode == 2
    assert "--learning_rate is 0.001 now and was 2e-05" in other.stderr
    optimizer = folder / "checkpoints/checkpoint-2/optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    damaged = run("training_sts.py", encoder, *options, "--resume")
    assert damaged.returncode == 2
    assert damaged.stderr.splitlines()[-1].startswith(f"error: {optimizer}: damaged")
    busy = training_util.FileLock(folder / ".lock")
    with busy:
        second = run("training_sts.py", encoder, *options, "--resume")
    assert second.returncode == 2
    assert "another run is at work in this folder" in second.stderr


@pytest.mark.slow
@pytest.mark.skipif(not KORNLU.is_dir(), reason="no ../shared/KorNLUDatasets")
def test_killed_twenty_times_the_real_encoder_ends_with_the_same_weights(
    offline_encoder: Path, tmp_path: Path
) -> None:
    options = ["--max_steps", 60, "--save_steps", 10, "--data_dir", KORNLU, "--no_test"]
    check_kills("training_sts.py", offline_encoder, options, tmp_path, kills=20, start=15)


def test_ctrl_c_tells_the_command_that_resumes(encoder: Path, tmp_path: Path) -> None:
    options = ["--save_steps", 2, "--run_dir", tmp_path / "run", "--no_test"]
    process = subprocess.Popen(
        command("training_sts.py", encoder, "--max_steps", 2000, *options),
        stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        # Tests that run in the background inherit a SIGINT that is ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and not [*tmp_path.glob("run/checkpoints/*/manifest.json")]:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    line = next(line for line in stderr.splitlines() if line.startswith("stopped; to go on: "))
    again = shlex.split(line.removeprefix("stopped; to go on: "))
    assert again[1:] == [*process.args[1:], "--resume"]
    assert training_util.last_checkpoint(tmp_path / "run/checkpoints")


def file_size_limit(limit: int) -> None:
    """A write beyond it fails in the middle of a file, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_ends_in_one_line_and_loses_no_checkpoint(
    encoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = ["--max_steps", 6, "--save_steps", 2, "--run_dir", folder, "--no_test"]
    whole = run("training_sts.py", encoder, *options[:-3], "--run_dir", tmp_path / "whole",
                "--no_test")  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    sizes = [path.stat().st_size for path in (tmp_path / "whole/checkpoints").rglob("*.*")]
    resume: list[str] = []
    # Too little for the optimizer, then for the weights, then for the small files.
    for limit in (max(sizes) - 1000, max(sizes) // 2 - 1000, 2000):
        done = subprocess.run(
            command("training_sts.py", encoder, *options, *resume), capture_output=True, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            preexec_fn=functools.partial(file_size_limit, limit),
        )  # fmt: skip
        assert done.returncode == 1, (limit, done.stderr)
        assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
        assert not (folder / "modules.json").exists()
        resume = ["--resume"]
    done = run("training_sts.py", encoder, *options, "--resume")
    assert done.returncode == 0, done.stderr
    expected, actual = weights(tmp_path / "whole"), weights(folder)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_an_output_folder_that_cannot_be_written(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("whole")
    done = run("training_sts.py", encoder, "--output_dir", tmp_path / "file", "--no_test")
    assert done.returncode in (1, 2)
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "whole"
    if os.geteuid() == 0:
        return  # root writes to read-only folders
    (tmp_path / "closed").mkdir(mode=0o555)
    done = run("training_sts.py", encoder, "--output_dir", tmp_path / "closed", "--no_test")
    assert done.returncode == 1
    assert "Permission denied" in done.stderr.splitlines()[-1]


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
        assert ends[-1] != json.loads((folder / "scores.json").read_text())["before_training"]
    assert ends[1] == pytest.approx(ends[0], abs=1e-4)
    if not torch.cuda.is_available():
        assert ends[2] == ends[0]


@pytest.mark.parametrize(
    ("script", "more"),
    [*((script, []) for script in SCRIPTS), ("training_sts.py", ["--loss", "pearson"])],
)
def test_two_processes_train_as_one_at_the_same_global_batch(
    script: str, more: list[str], tmp_path: Path
) -> None:
    steady = write_plain_encoder(tmp_path / "steady")
    edit_json(steady / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = ["--max_steps", 10, "--learning_rate", 1e-3, "--no_test", *more]
    options += {"training_nli.py": ["--batch_size", 16]}.get(script, [])
    options += {"training_multi-task.py": ["--nli_batch_size", 16]}.get(script, [])
    ends = []
    for processes in (1, 2):
        folder = tmp_path / f"of-{processes}"
        line = command(script, steady, *options, "--run_dir", folder)
        if processes > 1:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            line = [*torchrun, "--nproc_per_node", str(processes), *line[1:]]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished: ") == 1
        state = json.loads((folder / "checkpoints/checkpoint-10/trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        scores = json.loads((folder / "scores.json").read_text())
        ends.append((losses, scores["dev"]["cosine_pearson"]))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-4)
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-3)


# --- Losses, dropout, averaging --------------------------------------------------------------


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
    dev = training_util.KorSTSEvaluator(read_korsts(SAMPLES / "KorSTS/sts-dev.tsv"), None)
    assert dev(model)["cosine_spearman"] == pytest.approx(max(values.values()), abs=1e-6)


@pytest.mark.parametrize("option", ["attention_dropout", "hidden_dropout"])
def test_a_dropout_option_reaches_its_layers_alone(option: str, encoder: Path) -> None:
    args = argparse.Namespace(
        seed=777, model_name_or_path=str(encoder), max_seq_length=48, matryoshka_dims=None,
        prompt=None, attention_dropout=None, hidden_dropout=None,
    )  # fmt: skip
    before = training_util.load_model(args)
    vars(args)[option] = 0.25
    after = training_util.load_model(args)
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
            training_util.last_checkpoint(folder / "checkpoints")
            .joinpath("trainer_state.json")
            .read_text()
        )
        losses += [[log["loss"] for log in state["log_history"] if "loss" in log]]
        scores = json.loads((folder / "scores.json").read_text())
        dev = training_util.KorSTSEvaluator(read_korsts(SAMPLES / "KorSTS/sts-dev.tsv"), None)
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


def test_the_means_of_weights_and_which_dev_prefers(encoder: Path, tmp_path: Path) -> None:
    def constant(value: float) -> SentenceTransformer:
        model = load_encoder(str(encoder))
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(value)
        return model

    for step, value in ((2, 9.0), (4, 2.0), (6, 6.0)):
        constant(value).save(str(tmp_path / f"checkpoint-{step}"))
    constant(-4.0).save(str(tmp_path / "start"))
    args = argparse.Namespace(
        average_checkpoints=2,
        start_weight=0.25,
        max_seq_length=None,
        model_name_or_path=str(tmp_path / "start"),
    )
    seen = []

    def evaluate(model: SentenceTransformer, steps: int, wanted: float) -> dict[str, float]:
        (value,) = {weight.flatten()[0].item() for weight in model.parameters()}
        seen.append(value)
        return dict.fromkeys(SCORE_KEYS, -abs(value - wanted))

    for wanted, expected in ((6.0, 6.0), (4.2, 4.0), (3.4, 3.5), (0.0, 2.0)):
        trainer = SimpleNamespace(
            args=SimpleNamespace(output_dir=tmp_path),
            evaluator=functools.partial(evaluate, wanted=wanted),
            state=SimpleNamespace(global_step=6, best_global_step=6),
            points=SimpleNamespace(dev="dev"),
            tried={},
        )
        best = training_util.try_means(args, trainer, constant(6.0))
        assert all((weight == expected).all() for weight in best.parameters())
    assert seen[:4] == [6.0, 4.0, 3.5, 2.0]


# --- Options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--matryoshka_weights", "1,1"], "give --matryoshka_dims too"),
        (["--matryoshka_dims", "8,4", "--matryoshka_weights", "1"], "1 weights for 2 dims"),
        (["--matryoshka_dims", "4,8"], "strictly decreasing"),
        (["--matryoshka_dims", "8,8"], "strictly decreasing"),
        (["--matryoshka_dims", "8,0"], "at least 1"),
        (["--num_epochs", "0"], "--num_epochs 0: must be above 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be above 0"),
        (["--max_steps", "-1"], "--max_steps -1: must be above 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--average_checkpoints", "0"], "--average_checkpoints 0: must be above 0"),
        (["--start_weight", "1"], "--start_weight 1.0: must be from 0 to below 1"),
        (["--attention_dropout", "1"], "--attention_dropout 1.0: must be from 0 to below 1"),
        (["--hidden_dropout", "-0.1"], "--hidden_dropout -0.1: must be from 0 to below 1"),
        (["--resume"], "give the folder"),
        (["--resume", "--run_dir", "nowhere"], "no run to go on with"),
        (["--run_dir", "."], "not empty"),
        pytest.param(
            ["--precision", "fp16"],
            "needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        training_util.check_options(options_of(*options))
    assert len(str(error.value).splitlines()) == 1


def test_a_dim_above_the_model_and_a_length_above_its_positions(encoder: Path) -> None:
    model = ["--model_name_or_path", str(encoder)]
    with pytest.raises(UserError, match="--matryoshka_dims 64: the model has 32"):
        training_util.load_model(
            options_of(*model, "--max_seq_length", "48", "--matryoshka_dims", "64,32")
        )
    with pytest.raises(UserError, match="has 64 positions"):
        training_util.load_model(options_of(*model, "--max_seq_length", "65"))


# --- Batches ---------------------------------------------------------------------------------


def test_shuffled_batches_cover_every_row_each_pass_in_a_new_order() -> None:
    batches = list(itertools.islice(training_util.shuffled_batches(21, 8, 777), 6))
    assert [len(batch) for batch in batches] == [8, 8, 5, 8, 8, 5]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second
    shared = list(itertools.islice(training_util.shuffled_batches(21, 8, 777, 2), 3))
    assert [len(batch) for batch in shared] == [8, 8, 4]


def test_nli_batches_hold_no_text_twice_and_go_on_through_the_data() -> None:
    files = [SAMPLES / f"KorNLI/{name}" for name in
             ("multinli.train.ko.tsv", "snli_1.0_train.ko.tsv")]  # fmt: skip
    triplets, _ = read_nli_triplets(files, 777)
    batches = list(itertools.islice(training_util.no_duplicates_batches(triplets, 16, 777), 30))
    for batch in batches:
        texts = triplets.iloc[batch].to_numpy().ravel().tolist()
        assert len(batch) == 16
        assert len(set(texts)) == len(texts)
    per_pass = len(triplets) // 16
    first_pass = sum(batches[:per_pass], [])
    assert len(set(first_pass)) > 0.9 * len(first_pass)
    assert batches[:per_pass] != batches[per_pass : 2 * per_pass]


def test_texts_that_differ_in_case_and_spaces_alone_are_duplicates() -> None:
    rows = [(f"a{i % 2}", f"b{i}", f"c{i}") for i in range(4)]
    table = pd.DataFrame(rows, columns=["anchor", "positive", "negative"])
    table.loc[2, "anchor"] = " A0 "
    for batch in itertools.islice(training_util.no_duplicates_batches(table, 2, 1), 6):
        anchors = table["anchor"].iloc[batch].str.strip().str.lower()
        assert anchors.nunique() == 2


def test_data_too_small_for_one_batch_is_an_error() -> None:
    table = pd.DataFrame({"anchor": ["a"] * 9, "positive": ["b"] * 9, "negative": ["c"] * 9})
    with pytest.raises(UserError, match="9 triplets cannot fill one batch of 4"):
        next(training_util.no_duplicates_batches(table, 4, 777))


def test_shares_are_equal_and_make_up_the_batch() -> None:
    shares = list(training_util.share([[0, 1, 2, 3], [4, 5]], 100, 2))
    assert shares == [[100, 101], [102, 103], [104], [105]]


# --- The step --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_packed_sentences_give_the_padded_losses_and_gradients(
    model_type: str, encoder: Path
) -> None:
    from transformers import RobertaConfig, RobertaModel

    def steps(packed: bool) -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = training_util.load_encoder(str(encoder), 48, device="cpu")
        if model_type == "roberta":
            config = model[0].model.config.to_dict() | {
                "type_vocab_size": 1,
                "model_type": "roberta",
            }
            config["max_position_embeddings"] = 66
            model[0].model = RobertaModel(RobertaConfig(**config))
        if packed:
            training_util.pack_sentences(model, row_length=40)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        loss = CosineSimilarityLoss(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        pairs = read_korsts(SAMPLES / "KorSTS/sts-train.tsv")
        losses = []
        for batch in itertools.islice(training_util.shuffled_batches(len(pairs), 8, 777), 20):
            columns = [list(pairs[name].iloc[batch]) for name in ("sentence1", "sentence2")]
            features = [model.preprocess(column) for column in columns]
            value = loss(features, torch.tensor(pairs["score"].iloc[batch].to_numpy()))
            value.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        return losses, gradients

    padded, packed = steps(False), steps(True)
    assert padded[0] == pytest.approx(packed[0], abs=1e-5)
    for expected, actual in zip(padded[1], packed[1], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_each_task_has_its_own_adam_moments() -> None:
    def optimize(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, gradient: float) -> None:
        p.grad = torch.full_like(p, gradient)
        optimizer.step()

    shared = torch.nn.Parameter(torch.ones(3))
    ours = training_util.AdamWPerTask([shared], lr=0.1)
    reference = torch.nn.Parameter(torch.ones(3))
    theirs = [torch.optim.AdamW([reference], lr=0.1) for _ in range(2)]
    for step, gradient in enumerate([1.0, -100.0, 2.0, -50.0, 0.5, 10.0]):
        ours.task = step % 2
        optimize(ours, shared, gradient)
        optimize(theirs[step % 2], reference, gradient)
        torch.testing.assert_close(shared, reference)
        # What a checkpoint holds is enough to go on.
        state = ours.state_dict()
        ours = training_util.AdamWPerTask([shared], lr=0.1)
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


# --- The repository --------------------------------------------------------------------------


def test_the_scripts_stay_short_and_share_no_run_of_twelve_lines() -> None:
    texts = [(REPOSITORY / script).read_text().splitlines() for script in SCRIPTS]
    assert all(len(lines) <= 120 for lines in texts)
    for first, second in itertools.combinations(texts, 2):
        runs = {tuple(first[i : i + 12]) for i in range(len(first) - 11)}
        assert not any(tuple(second[i : i + 12]) in runs for i in range(len(second) - 11))


def test_onnx_is_no_package() -> None:
    assert not (REPOSITORY / "onnx/__init__.py").exists()


@pytest.mark.skipif(not KORNLU.is_dir(), reason="no ../shared/KorNLUDatasets")
def test_a_real_run_on_korsts_rises(offline_encoder: Path, tmp_path: Path) -> None:
    done = run("training_sts.py", offline_encoder, "--data_dir", KORNLU, "--max_steps", 30,
               "--max_seq_length", 128, "--run_dir", tmp_path / "run", "--no_test")  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert scores["dev_pairs"] == 1500
    assert scores["before_training"]["cosine_spearman"] == pytest.approx(0.7930, abs=3e-4)
    assert scores["dev"]["cosine_spearman"] > 0.81


@pytest.mark.slow
def test_the_model_opens_in_sentence_transformers_2_7(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("training_sts.py", encoder, "--max_steps", 2, "--run_dir", folder).returncode == 0
    old = tmp_path / "old"
    subprocess.run([sys.executable, "-m", "venv", old], check=True)
    subprocess.run(
        [old / "bin/python", "-m", "pip", "install", "-q", "torch==2.13.*",
         "sentence-transformers==2.7.0", "transformers==4.57.*"],
        check=True,
    )  # fmt: skip
    sentences = ["비행기가 이륙하고 있다.", "가", "한 남자가 큰 플루트를 연주하고 있다. " * 5]
    code = (
        "import sys, json; from sentence_transformers import SentenceTransformer as S; "
        "m = S(sys.argv[1]); print(json.dumps([m.max_seq_length, "
        "m.encode(json.loads(sys.argv[2])).tolist()]))"
    )
    done = subprocess.run(
        [old / "bin/python", "-c", code, folder, json.dumps(sentences)],
        capture_output=True,
        text=True,
        check=True,
    )
    length, embeddings = json.loads(done.stdout.splitlines()[-1])
    assert length == 48
    expected = SentenceTransformer(str(folder)).encode(sentences)
    assert np.abs(np.array(embeddings) - expected).max() < 1e-5
