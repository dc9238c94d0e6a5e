"""The three recipes: what a run leaves, and what they are made of."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import KORNLU, SAMPLES, SCRIPTS, new_environment, run, run_script
from hub import Hub
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CosineSimilarityLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Dense
from sentence_transformers.util import cos_sim

from common import training
from common.batches import check_accumulation, no_duplicates_batches, shuffled_batches
from common.data import NLI_TRAIN_FILES, read_korsts
from common.encoders import save_encoder
from common.formats import read_nli_triplets
from common.packing import lay_in_rows
from common.run_folder import Run
from common.scoring import PairsEvaluator
from common.training import RecipeTrainer
from common.two_tasks import AdamWPerTask


@pytest.mark.parametrize(
    ("script", "batches"),
    [("training_sts.py", 12), ("training_nli.py", 2), ("training_multi-task.py", 2)],
)
def test_a_step_of_more_batches_than_an_epoch_has_is_refused(
    script: str, batches: int, encoder: Path, tmp_path: Path
) -> None:
    check_accumulation(batches, batches)
    option = ["--gradient_accumulation_steps", batches + 1]
    done = run(script, encoder, *option, "--run_dir", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        f"error: --gradient_accumulation_steps {batches + 1}: an epoch has {batches} batches: at "
        "most as many, or smaller batches"
    )
    assert not (tmp_path / "run").exists()


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
    evaluator = PairsEvaluator(test, "sts-test.tsv")
    assert evaluator(model)["cosine_spearman"] == pytest.approx(
        scores["test"]["cosine_spearman"], abs=1e-6
    )
    assert "sts-test.tsv, 48 pairs" in done.stdout
    low, high = scores["test_interval"]
    assert low < scores["test"]["cosine_spearman"] < high
    assert f", 95% interval [{100 * low:.2f}, {100 * high:.2f}]\n" in done.stdout
    assert "published:" not in done.stdout  # those are scores on another file


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


def test_a_card_keeps_the_licence_of_the_stage_before_and_no_place(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = "".join(f"문장 {row},글 {row},{row % 5}\n" for row in range(12))
    (tmp_path / "own.csv").write_text("sentence1,sentence2,score\n" + rows, encoding="utf-8")
    own = ["--train_file", tmp_path / "own.csv", "--dev_file", tmp_path / "own.csv"]
    own += ["--max_score", 4, "--max_steps", 1, "--no_test"]

    def card(model: str | Path, name: str, *options: object) -> str:
        done = run("training_sts.py", model, *options, "--run_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        return (tmp_path / name / "README.md").read_text(encoding="utf-8")

    assert "license: cc-by-sa-4.0" in card(encoder, "first", "--max_steps", 1, "--no_test")
    second = card("~/first", "second", *own)
    assert "license: cc-by-sa-4.0" in second and "trained from\n`first` with" in second
    assert "base_model" not in second and "~" not in second
    assert "license" not in card(encoder, "alone", *own)


def test_base_and_trained_model_come_from_the_hub_and_go_to_it(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(encoder, tmp_path / "hub/klue/tiny")
    with Hub(tmp_path / "hub") as hub:
        hub.patch(monkeypatch, tmp_path / "cache")

        def from_hub(model: str, *options: object) -> subprocess.CompletedProcess:
            return run("training_sts.py", Path(model), "--max_steps", 1, "--no_test", *options)

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


def test_a_score_on_korsts_test_stands_beside_published_ones(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.run_folder.is_korsts_test", lambda *_: True)
    done = run("training_sts.py", encoder, "--max_steps", 1, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^published: \d\d\.\d\d \S+/\S+$", done.stdout, re.M)) == 3


@pytest.mark.slow
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
    # What the two versions write in different forms: a Dense module, special tokens of one's own.
    model = SentenceTransformer(str(folder))
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["[문서]"]})
    model[0].model.resize_token_embeddings(len(model.tokenizer))
    model.append(Dense(32, 16))
    save_encoder(model, tmp_path / "dense")
    old = ("sentence-transformers==2.7.0", "transformers==4.57.*", "tokenizers==0.22.*")
    python = new_environment(tmp_path / "old", "--no-deps", *old, "huggingface_hub<1")
    # torch, numpy and so on come from here; what stands in the new folder comes first.
    (packages,) = (tmp_path / "old").glob("lib/*/site-packages")
    (packages / "here.pth").write_text(str(Path(torch.__file__).parent.parent))
    sentences = ["비행기가 이륙하고 있다.", "가", "한 남자가 큰 플루트를 연주하고 있다. " * 5]
    code = (
        "import sys, json; from sentence_transformers import SentenceTransformer as S, __version__;"
        "models = map(S, sys.argv[2:]); print(json.dumps([[__version__, m.max_seq_length, "
        "m.encode(json.loads(sys.argv[1])).tolist()] for m in models]))"
    )
    paths = (folder, tmp_path / "dense")
    line = [python, "-c", code, json.dumps(sentences), *paths]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for path, (version, length, embeddings) in zip(paths, found, strict=True):
        assert (version, length) == ("2.7.0", 48)
        expected = SentenceTransformer(str(path)).encode(sentences)
        assert np.abs(np.array(embeddings) - expected).max() < 1e-5


# --- What the recipes are made of ------------------------------------------------------------


class ReadyToTrain(Exception):
    """Stops a script where it would train, with all that it made."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with as many KorNLI rows as the recipe's batches need: no sentence of them real."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(SAMPLES / "KorSTS", folder / "KorSTS")
    (folder / "KorNLI").mkdir()
    for number, name in enumerate(NLI_TRAIN_FILES):
        rows = ["sentence1\tsentence2\tgold_label"]
        for row in range(100):
            for label in ("entailment", "contradiction"):
                rows.append(f"전제 {number} {row}\t가설 {number} {row} {label}\t{label}")
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def ready(
    encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RecipeTrainer]:
    """Runs a script with its defaults up to its training, and returns its trainer."""

    def call(script: str, *options: object) -> RecipeTrainer:
        def stop(run: Run, trainer: RecipeTrainer) -> None:
            raise ReadyToTrain(trainer)

        with monkeypatch.context() as patch, pytest.raises(ReadyToTrain) as stopped:
            patch.setattr(training, "train", stop)
            run_script(
                script, "--model_name_or_path", encoder, "--data_dir", data,
                "--max_seq_length", 48, "--run_dir", tmp_path / script, *options,
            )  # fmt: skip
        return stopped.value.args[0]

    return call


@pytest.mark.parametrize("script", ["training_sts.py", "training_multi-task.py"])
def test_an_epoch_of_accumulated_batches_is_about_one_pass(
    script: str, ready: Callable[..., RecipeTrainer], tmp_path: Path
) -> None:
    whole = len(ready(script).batches)
    an_epoch = whole // 5 // (2 if "multi" in script else 1)  # batches, of each task
    for accumulation in (2, an_epoch // 2 + 1, an_epoch - 1, an_epoch):
        options = ["--gradient_accumulation_steps", accumulation]
        trainer = ready(script, *options, "--run_dir", tmp_path / str(accumulation))
        assert 0.65 < len(trainer.batches) / whole < 1.35


def sampled(trainer: RecipeTrainer, batches: int) -> list[tuple[str, int]]:
    """Returns data set and size of the first batches as the trainer's loader gives them."""
    loader = itertools.islice(trainer.get_train_dataloader(), batches)
    sizes = []
    for batch in loader:
        columns = {len(value) for name, value in batch.items() if name.endswith("input_ids")}
        sizes.append((batch["dataset_name"], *columns))
    return sizes


def rows_of(trainer: RecipeTrainer, batch: list[int]) -> tuple[str, list[dict]]:
    """Returns data set and rows that the numbers of a batch stand for."""
    start = 0
    for name, table in trainer.train_dataset.items():
        if batch[0] < start + len(table):
            rows = [table[row - start] for row in batch]
            assert {row.pop("dataset_name") for row in rows} == {name}
            return name, rows
        start += len(table)
    raise IndexError(batch)


@pytest.mark.parametrize(
    ("script", "epochs", "steps_per_epoch"),
    [
        ("training_sts.py", 5, 12),  # 96 pairs in batches of 8
        ("training_nli.py", 1, 6),  # 2 x 100 premises, two triplets each, in batches of 64
        ("training_multi-task.py", 5, 12),  # as many of each as NLI has
    ],
)
def test_the_recipes_have_the_originals_constants(
    script: str, epochs: int, steps_per_epoch: int, ready: Callable[..., RecipeTrainer]
) -> None:
    trainer = ready(script)
    steps, arguments = epochs * steps_per_epoch, trainer.args
    assert len(trainer.batches) == steps
    assert trainer.points.evaluate_at == set(range(steps_per_epoch, steps, steps_per_epoch))
    assert (arguments.seed, arguments.gradient_accumulation_steps) == (777, 1)
    assert arguments.max_grad_norm == 1.0
    assert not (arguments.bf16 or arguments.fp16)
    # The optimizer and schedule that training will use, not the options that ask for them.
    trainer.create_optimizer_and_scheduler(steps)
    kind = AdamWPerTask if "multi" in script else torch.optim.AdamW
    assert type(trainer.optimizer) is kind
    names = dict(trainer.model.named_parameters())
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups
             for p in group["params"]}  # fmt: skip
    for name, parameter in names.items():
        exempt = "bias" in name or "LayerNorm" in name
        assert decay[id(parameter)] == (0.0 if exempt else 0.01), name
    assert all(group["betas"] == (0.9, 0.999) for group in trainer.optimizer.param_groups)
    warm_up = math.ceil(0.1 * steps)
    for step in range(steps):
        up, down = step / warm_up, (steps - step) / (steps - warm_up)
        assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(2e-5 * min(up, down))
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert trainer.lr_scheduler.get_last_lr()[0] == 0


def test_the_recipes_have_the_originals_losses(ready: Callable[..., RecipeTrainer]) -> None:
    losses = {
        script: {name: loss.loss for name, loss in ready(script).loss.items()} for script in SCRIPTS
    }
    nli = [losses["training_nli.py"]["nli"], losses["training_multi-task.py"]["nli"]]
    sts = [losses["training_sts.py"]["sts"], losses["training_multi-task.py"]["sts"]]
    assert [sorted(found) for found in losses.values()] == [["sts"], ["nli"], ["nli", "sts"]]
    for loss in nli:
        assert type(loss) is MultipleNegativesRankingLoss
        assert loss.scale == 20.0 and loss.similarity_fct is cos_sim
    for loss in sts:
        assert type(loss) is CosineSimilarityLoss
        assert type(loss.loss_fct) is torch.nn.MSELoss


def test_the_first_batches_are_those_of_the_recipes(
    ready: Callable[..., RecipeTrainer], data: Path
) -> None:
    pairs = read_korsts(data / "KorSTS/sts-train.tsv").to_dict("records")
    triplets, _ = read_nli_triplets([data / name for name in NLI_TRAIN_FILES], 777)
    sts = shuffled_batches(len(pairs), 8, 777)
    nli = no_duplicates_batches(triplets, 64, 777)
    expected = {
        "sts": [("sts", [pairs[row] for row in next(sts)]) for _ in range(4)],
        "nli": [("nli", triplets.iloc[next(nli)].to_dict("records")) for _ in range(4)],
    }
    trainer = ready("training_sts.py")
    assert [rows_of(trainer, batch) for batch in trainer.batches[:4]] == expected["sts"]
    assert sampled(trainer, 3) == [("sts", 8)] * 3
    trainer = ready("training_nli.py")
    assert [rows_of(trainer, batch) for batch in trainer.batches[:4]] == expected["nli"]
    assert sampled(trainer, 3) == [("nli", 64)] * 3
    trainer = ready("training_multi-task.py")
    in_turn = [batch for both in zip(expected["nli"], expected["sts"], strict=True)
               for batch in both]  # fmt: skip
    assert [rows_of(trainer, batch) for batch in trainer.batches[:8]] == in_turn
    assert sampled(trainer, 4) == [("nli", 64), ("sts", 8)] * 2


def test_multi_task_gives_each_task_its_own_moments(encoder: Path, tmp_path: Path) -> None:
    done = run("training_multi-task.py", encoder, "--max_steps", 4, "--nli_batch_size", 16,
               "--no_test", "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    optimizer = torch.load(
        tmp_path / "run/checkpoints/checkpoint-4/optimizer.pt", weights_only=True
    )
    # Four steps, two of each task.
    for task in optimizer["tasks"]:
        assert {state["step"].item() for state in task["state"].values()} == {2}


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_forwards_hold_no_padding_and_all_columns(
    script: str, ready: Callable[..., RecipeTrainer]
) -> None:
    trainer = ready(script, "--max_steps", 2)
    shapes: list[tuple[int, int]] = []

    def note(module: torch.nn.Module, inputs: tuple, options: dict) -> None:
        if module.training:
            shapes.append(tuple(options["input_ids"].shape))

    embeddings = trainer.model[0].model.embeddings
    embeddings.register_forward_pre_hook(note, with_kwargs=True)
    batches = [rows_of(trainer, batch)[1] for batch in trainer.batches]
    trainer.args.eval_on_start, trainer.args.save_strategy = False, "no"
    trainer.train()
    assert len(shapes) == len(batches) == 2  # one forward a step
    for (rows, width), batch in zip(shapes, batches, strict=True):
        texts = [value for row in batch for value in row.values() if isinstance(value, str)]
        lengths = trainer.model.preprocess(texts)["attention_mask"].sum(1)
        assert (width, rows) == lay_in_rows(lengths.tolist())[:2] and rows < len(texts)
        assert 0.9 * rows * width < lengths.sum() <= rows * width
