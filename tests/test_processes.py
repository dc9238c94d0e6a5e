"""Two processes (gloo, CPU) train as one does at the same global batch."""

from __future__ import annotations

import json
import shutil
import socket
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from commands import Started, keep_every_checkpoint, run, training_arguments, weights
from encoders import edit_json, write_plain_encoder

from common.checkpoints import checkpoints, step_of

COMMON = ["--max_steps", 10, "--learning_rate", 1e-3, "--no_test"]
COMMON += ["--save_steps", 1, "--average_checkpoints", 10]
CASES = {
    "sts": ["training_sts.py"],
    "nli": ["training_nli.py", "--batch_size", 16],
    "multi-task": ["training_multi-task.py", "--nli_batch_size", 16],
    "pearson": ["training_sts.py", "--loss", "pearson"],
    "bf16": ["training_sts.py", "--precision", "bf16"],
    "matryoshka": ["training_sts.py", "--matryoshka_dims", "32,16"],
    "mini-batches": ["training_nli.py", "--batch_size", 16, "--mini_batch_size", 4],
}
Ends = tuple[list[torch.Tensor], list[float], float]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without dropout, whose draws differ between processes."""
    folder = write_plain_encoder(tmp_path_factory.mktemp("steady") / "steady")
    edit_json(folder / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return folder


@pytest.fixture(scope="module")
def of_two(steady: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases' runs by two processes, one run folder a case."""
    folder = tmp_path_factory.mktemp("of-two")
    lines = [
        [script, *training_arguments(steady, *COMMON, *options, "--run_dir", folder / name)]
        for name, (script, *options) in CASES.items()
    ]
    half_a_run(steady, folder / "resumed")
    again = training_arguments(steady, *COMMON, "--resume", "--run_dir", folder / "resumed")
    lines.append(["training_sts.py", *again])
    file = folder / "commands.json"
    file.write_text(json.dumps(lines))
    both = start_two("tests/two_processes.py", file)
    ended = connection.wait([one.process.sentinel for one in both], timeout=300)
    if not ended or any(one.returncode for one in both):  # the other may wait for it for ever
        for one in both:
            one.kill()
    said = [one.communicate() for one in both]
    said += [path.read_text() for path in sorted(folder.glob("*.done-*"))]
    assert [one.returncode for one in both] == [0, 0], said
    for _, stdout, _ in json.loads((folder / "commands.done-0").read_text()):
        assert stdout.count("finished: ") == 1
    return folder


def start_two(script: str, file: Path) -> list[Started]:
    """Starts a script as `torchrun --nproc_per_node 2` does; tests/test_blocks.py runs that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return [Started(script, file, environment=place | rank) for rank in ranks]


def half_a_run(steady: Path, folder: Path) -> None:
    """Leaves what a run of one process leaves that is killed behind its fifth step."""
    with pytest.MonkeyPatch.context() as patch:
        keep_every_checkpoint(patch)
        assert run("training_sts.py", steady, *COMMON, "--run_dir", folder).returncode == 0
    shutil.copytree(folder, folder.with_name("whole"))
    for checkpoint in checkpoints(folder / "checkpoints"):
        if step_of(checkpoint) > 5:
            shutil.rmtree(checkpoint)
    edit_json(folder / "run.json", finished=None)
    (folder / "modules.json").unlink()


def test_two_processes_go_on_with_a_run_of_one(of_two: Path) -> None:
    whole, resumed = weights(of_two / "whole"), weights(of_two / "resumed")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-4, rtol=1e-3)
    state = of_two / "resumed/checkpoints/checkpoint-10/trainer_state.json"
    assert json.loads(state.read_text())["global_step"] == 10
    *_, (_, _, stderr) = json.loads((of_two / "commands.done-0").read_text())
    assert "checkpoint-5\n" in stderr and "note: 2 processes now, 1 before" in stderr


def ends(folder: Path) -> Ends:
    """Returns each task's first gradients, the logged losses, and the dev score of a run.

    AdamW's first moment after its first step is a tenth of the (clipped) gradient: what Adam's
    division hides shows there.
    """
    gradients = []
    for task in (0, 1):
        file = folder / f"checkpoints/checkpoint-{task + 1}/optimizer.pt"
        optimizer = torch.load(file, weights_only=True)
        states = optimizer.get("tasks", [optimizer])
        if task < len(states):
            moments = states[task]["state"].values()
            assert {state["step"].item() for state in moments} == {1}
            gradients.append(torch.cat([state["exp_avg"].flatten() for state in moments]))
    state = json.loads((folder / "checkpoints/checkpoint-10/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    scores = json.loads((folder / "scores.json").read_text())
    return gradients, losses, scores["evaluations"][-1]["cosine_pearson"]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_at_the_same_global_batch(
    name: str, steady: Path, of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, *options = CASES[name]
    keep_every_checkpoint(monkeypatch)
    done = run(script, steady, *COMMON, *options, "--run_dir", tmp_path / "of-one")
    assert done.returncode == 0, done.stderr
    one, two = ends(tmp_path / "of-one"), ends(of_two / name)
    rounding = 1e-2 if name == "bf16" else 1e-4  # of 8 bits: another batch rounds differently
    assert len(one[0]) == len(two[0]) == (2 if name == "multi-task" else 1)
    for expected, actual in zip(one[0], two[0], strict=True):
        assert expected.norm() > 0
        assert (actual - expected).norm() <= rounding * expected.norm()
    assert one[1] == pytest.approx(two[1], abs=rounding)
    assert one[2] == pytest.approx(two[2], abs=max(rounding, 1e-3))
