"""Two processes (gloo, CPU) train as one does at the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, run, training_arguments
from encoders import edit_json, write_plain_encoder

COMMON = ["--max_steps", 10, "--learning_rate", 1e-3, "--no_test"]
# The first checkpoints stay, for the gradients in them.
COMMON += ["--save_steps", 1, "--average_checkpoints", 10]
CASES = {
    "sts": ["training_sts.py"],
    "nli": ["training_nli.py", "--batch_size", 16],
    "multi-task": ["training_multi-task.py", "--nli_batch_size", 16],
    "pearson": ["training_sts.py", "--loss", "pearson"],
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
    file = folder / "commands.json"
    file.write_text(json.dumps(lines))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [*torchrun, str(REPOSITORY / "tests/two_processes.py"), str(file)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    said = "\n".join(path.read_text() for path in sorted(folder.glob("*.done-*")))
    assert done.returncode == 0, said + done.stderr
    for _, stdout, _ in json.loads((folder / "commands.done-0").read_text()):
        assert stdout.count("finished: ") == 1
    return folder


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
    name: str, steady: Path, of_two: Path, tmp_path: Path
) -> None:
    script, *options = CASES[name]
    done = run(script, steady, *COMMON, *options, "--run_dir", tmp_path / "of-one")
    assert done.returncode == 0, done.stderr
    one, two = ends(tmp_path / "of-one"), ends(of_two / name)
    assert len(one[0]) == len(two[0]) == (2 if name == "multi-task" else 1)
    for expected, actual in zip(one[0], two[0], strict=True):
        assert expected.norm() > 0
        assert (actual - expected).norm() <= 1e-4 * expected.norm()
    assert one[1] == pytest.approx(two[1], abs=1e-4)
    assert one[2] == pytest.approx(two[2], abs=1e-3)
