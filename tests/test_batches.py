"""Orders of rows, and batches on their way to the device."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from commands import SAMPLES, Started, run, weights

from common import batches, training
from common.batches import (
    HOST_MASK,
    MASK,
    ArrayCollator,
    move_batch,
    no_duplicates_batches,
    share,
    shuffled_batches,
    tokenizing_processes,
)
from common.command_line import UserError
from common.encoders import load_encoder
from common.formats import read_nli_triplets
from common.packing import pack_sentences


def test_shuffled_batches_cover_every_row_each_pass_in_a_new_order() -> None:
    found = list(itertools.islice(shuffled_batches(21, 8, 777), 6))
    assert [len(batch) for batch in found] == [8, 8, 5, 8, 8, 5]
    first, second = sum(found[:3], []), sum(found[3:], [])
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second
    shared = list(itertools.islice(shuffled_batches(21, 8, 777, 2), 3))
    assert [len(batch) for batch in shared] == [8, 8, 4]


def test_fewer_rows_than_processes_are_refused_before_a_batch_is_asked_for() -> None:
    with pytest.raises(UserError, match="1 pairs to train on cannot be shared by 2 processes"):
        shuffled_batches(1, 8, 777, 2)
    assert next(shuffled_batches(2, 8, 777, 2)) in ([0, 1], [1, 0])


def test_nli_batches_hold_no_text_twice_and_go_on_through_the_data() -> None:
    files = [SAMPLES / f"KorNLI/{name}" for name in
             ("multinli.train.ko.tsv", "snli_1.0_train.ko.tsv")]  # fmt: skip
    triplets, _ = read_nli_triplets(files, 777)
    found = list(itertools.islice(no_duplicates_batches(triplets, 16, 777), 30))
    for batch in found:
        texts = triplets.iloc[batch].to_numpy().ravel().tolist()
        assert len(batch) == 16
        assert len(set(texts)) == len(texts)
    per_pass = len(triplets) // 16
    first_pass = sum(found[:per_pass], [])
    assert len(set(first_pass)) > 0.9 * len(first_pass)
    assert found[:per_pass] != found[per_pass : 2 * per_pass]


def test_texts_that_differ_in_case_and_spaces_alone_are_duplicates() -> None:
    rows = [(f"a{i % 2}", f"b{i}", f"c{i}") for i in range(4)]
    table = pd.DataFrame(rows, columns=["anchor", "positive", "negative"])
    table.loc[2, "anchor"] = " A0 "
    for batch in itertools.islice(no_duplicates_batches(table, 2, 1), 6):
        anchors = table["anchor"].iloc[batch].str.strip().str.lower()
        assert anchors.nunique() == 2


def test_data_too_small_for_one_batch_is_an_error() -> None:
    table = pd.DataFrame({"anchor": ["a"] * 9, "positive": ["b"] * 9, "negative": ["c"] * 9})
    with pytest.raises(UserError, match="9 triplets cannot fill one batch of 4"):
        next(no_duplicates_batches(table, 4, 777))


def test_shares_are_equal_and_make_up_the_batch() -> None:
    shares = list(share([[0, 1, 2, 3], [4, 5]], 100, 2))
    assert shares == [[100, 101], [102, 103], [104], [105]]


def test_tokens_travel_as_arrays_and_arrive_as_tensors(encoder: Path) -> None:
    model = load_encoder(str(encoder), 48, device="cpu")
    rows = [
        {"sentence1": "한 남자가 먹는다.", "sentence2": "여자가 파스타를 먹는다.", "label": 0.5},
        {"sentence1": "먹는다.", "sentence2": "한 남자.", "label": 1.0},
    ]
    batch = ArrayCollator(preprocess_fn=model.preprocess)(rows)
    assert not any(isinstance(value, torch.Tensor) for value in batch.values())
    moved = move_batch(batch, torch.device("cpu"), masks_on_host=True)
    assert moved.keys() == batch.keys()  # of a GPU alone
    expected = model.preprocess([row["sentence2"] for row in rows])
    for name in ("input_ids", MASK):
        assert torch.equal(moved[f"sentence2_{name}"], expected[name])
    assert moved["label"].tolist() == [0.5, 1.0]
    assert moved["label"].dtype == torch.float32  # MPS has no float64


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True), ("cpu", True)])
def test_cuda_alone_is_not_waited_for(
    device: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        asked.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    batch = {"sentence1_input_ids": np.ones((2, 3), np.int64), f"sentence1_{MASK}": np.ones((2, 3))}
    moved = move_batch(batch | {"dataset_name": "sts"}, torch.device(device), masks_on_host=False)
    assert moved.keys() == {*batch, "dataset_name"} and asked == 2 * [(device, not waits)]


def test_a_mask_on_the_host_lays_out_the_rows_where_it_is_the_same(encoder: Path) -> None:
    model = load_encoder(str(encoder), 48, device="cpu").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    features = model.preprocess(["한 남자가 먹는다.", "먹는다."])
    padded = model(dict(features))["sentence_embedding"]
    pack_sentences(model)
    mask = features[MASK]
    for host_mask in (mask.clone(), torch.ones(2, mask.shape[1] + 3, dtype=mask.dtype)):
        packed = model(features | {HOST_MASK: host_mask})["sentence_embedding"]
        torch.testing.assert_close(packed, padded)
    wrong = model(features | {HOST_MASK: torch.ones_like(mask)})["sentence_embedding"]
    assert not torch.allclose(wrong, padded)  # it is what is used
    with torch.no_grad():  # scoring drops it
        model.eval()(features | {HOST_MASK: mask})


@pytest.mark.parametrize(
    ("cores", "processes_here", "start_methods", "expected"),
    [(64, 1, ["fork"], 8), (12, 1, ["forkserver", "fork"], 6), (2, 1, ["fork"], 2),
     (16, 4, ["fork"], 2), (16, 1, ["spawn"], 0)],
)  # fmt: skip
def test_half_of_the_cores_tokenize_for_a_gpu(
    cores: int,
    processes_here: int,
    start_methods: list[str],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    monkeypatch.setattr(batches, "get_all_start_methods", lambda: start_methods)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes_here))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tokenizing_processes() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tokenizing_processes() == 0


@pytest.mark.parametrize("script", ["training_sts.py", "training_multi-task.py"])
def test_processes_that_tokenize_change_nothing_and_end(
    script: str,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As beside a GPU, also where Python (3.14's) would not fork by itself."""
    options = ["--max_steps", 6, "--gradient_accumulation_steps", 2, "--no_test", "--run_dir"]
    options = ["--nli_batch_size", 8, *options] if "multi" in script else options
    assert run(script, encoder, *options, tmp_path / "alone").returncode == 0
    step, kinds = training.RecipeTrainer.training_step, []

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        kinds.append({type(child).__name__ for child in multiprocessing.active_children()})
        return step(*args, **kwargs)

    monkeypatch.setattr(training.RecipeTrainer, "training_step", noted)
    monkeypatch.setattr(training, "tokenizing_processes", lambda: 2)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        done = run(script, encoder, *options, tmp_path / "beside")
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert done.returncode == 0, done.stderr
    assert kinds[0] == {"ForkProcess"} and not multiprocessing.active_children()
    assert "tokenizers" not in capfd.readouterr().err  # it warns of forks, unless told
    expected, found = weights(tmp_path / "alone"), weights(tmp_path / "beside")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


LOADS = """
import sys
import time
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from common.batches import ArrayCollator

collator = ArrayCollator(preprocess_fn=lambda texts, **_: {"input_ids": torch.zeros(1, 100_000)})
options = {"num_workers": 2, "collate_fn": collator, "multiprocessing_context": "fork"}
batches = iter(DataLoader([{"anchor": "한 남자"}] * 64, **options))
next(batches)
time.sleep(1)  # until batches that nobody takes fill what they go through
Path(sys.argv[1]).write_text("")
time.sleep(600)
"""


def test_processes_that_tokenize_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "loads.py").write_text(LOADS)
    run = Started(tmp_path / "loads.py", tmp_path / "full")
    while run.poll() is None and not (tmp_path / "full").exists():
        time.sleep(0.05)
    assert run.poll() is None, run.communicate()
    workers = psutil.Process(run.process.pid).children()
    assert len(workers) == 2
    run.kill()
    _, left = psutil.wait_procs(workers, timeout=10)
    for worker in left:
        worker.kill()
    assert not left, run.communicate()
