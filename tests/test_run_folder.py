"""Runs that are killed, stopped, refused, full: what is on disk, and how they go on."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import KORNLU, OFFLINE, REPOSITORY, SAMPLES, run, start, weights
from encoders import edit_json, write_plain_encoder
from filelock import FileLock

from common import run_folder
from common.checkpoints import changed_file, checkpoints, last_checkpoint, step_of
from common.command_line import UserError


def checkpoint_states(folder: Path, name: str) -> set[str]:
    return {str(path) for path in folder.glob(f"checkpoints/*/{name}")}


def check_kills(
    script: str,
    model: Path,
    options: list[object],
    tmp_path: Path,
    kills: int,
    seconds: float,
) -> None:
    """Kills a run at random moments; each run that ends in spite of it must give the weights (and
    scores) of an uninterrupted one. Every other kill falls while a checkpoint is being written or
    just after it, the others up to `seconds` after the start of the process."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    done = run(script, model, *options, "--run_dir", whole)
    assert done.returncode == 0, done.stderr
    expected, expected_scores = weights(whole), json.loads((whole / "scores.json").read_text())
    generator = np.random.default_rng(777)
    killed, resumed = 0, False
    finished = False
    while not finished or killed < kills:
        resume = ["--resume"] if (folder / "run.json").exists() else []
        process = start(script, model, *options, "--run_dir", folder, *resume)
        if killed < kills:
            if killed % 2:
                # The first file of a checkpoint, or its last: then there is one to go on from.
                name = "*.json" if killed % 4 == 1 else "manifest.json"
                before = checkpoint_states(folder, name)
                while process.poll() is None and checkpoint_states(folder, name) <= before:
                    time.sleep(0.005)
                time.sleep(generator.uniform(0, 0.5))
            else:
                time.sleep(generator.uniform(0, seconds))
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
    options += ["--average_checkpoints", 9]  # their mean goes from checkpoint to checkpoint
    check_kills("training_multi-task.py", encoder, options, tmp_path, 6, 2)


@pytest.mark.slow
@pytest.mark.skipif(not KORNLU.is_dir(), reason="no ../shared/KorNLUDatasets")
def test_killed_twenty_times_the_real_encoder_ends_with_the_same_weights(
    offline_encoder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data/KorSTS"
    data.mkdir(parents=True)
    shutil.copy(KORNLU / "KorSTS/sts-train.tsv", data)
    # Of dev a part: scoring all of it takes most of the time between two kills.
    lines = (KORNLU / "KorSTS/sts-dev.tsv").read_text(encoding="utf-8").splitlines(True)
    (data / "sts-dev.tsv").write_text("".join(lines[:201]), encoding="utf-8")
    options = ["--max_steps", 60, "--save_steps", 10, "--data_dir", data.parent, "--no_test"]
    check_kills("training_sts.py", offline_encoder, options, tmp_path, 20, 8)


def test_a_damaged_checkpoint_and_a_finished_run_stop_a_resume(
    encoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = ["--max_steps", 2, "--save_steps", 1, "--no_test", "--run_dir", folder]
    options += ["--average_checkpoints", 2, "--early_stopping", 99]  # so that both stay
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
    shutil.rmtree(optimizer.parent)
    gone = run("training_sts.py", encoder, *options, "--resume")
    assert gone.returncode == 2
    assert "checkpoint-1: weights alone" in gone.stderr.splitlines()[-1]
    busy = FileLock(folder / ".lock")
    with busy:
        second = run("training_sts.py", encoder, *options, "--resume")
    assert second.returncode == 2
    assert "another run is at work in this folder" in second.stderr


@pytest.mark.parametrize("content", ["", '{"finished": nu', "{}", "[]"])
def test_a_cut_off_file_stops_a_resume_in_one_line(
    content: str, encoder: Path, tmp_path: Path
) -> None:
    options = ["--max_steps", 1, "--no_test", "--run_dir", tmp_path / "run", "--resume"]
    (tmp_path / "run/checkpoints/checkpoint-1").mkdir(parents=True)
    run_file = tmp_path / "run/run.json"
    run_file.write_text(content)
    done = run("training_sts.py", encoder, *options)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: --resume: {run_file}: damaged: train again in another folder\n"
    manifest = tmp_path / "run/checkpoints/checkpoint-1/manifest.json"
    manifest.write_text(content)
    says = "weights alone" if content in ("{}", "[]") else f"{manifest}: damaged"
    with pytest.raises(UserError, match=says):
        last_checkpoint(manifest.parent.parent)


def test_a_run_json_that_lacks_what_a_resume_compares_is_one_line(
    encoder: Path, tmp_path: Path
) -> None:
    run_file = tmp_path / "run.json"
    whole = {"finished": None, "options": {}, "data": [], "processes": 1, "precision": "fp32"}
    for key in whole:
        run_file.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        done = run("training_sts.py", encoder, "--run_dir", tmp_path, "--resume")
        line = f"error: --resume: {run_file}: damaged: train again in another folder\n"
        assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.parametrize("stops_early", [False, True])
def test_checkpoints_hold_no_more_than_a_run_needs(
    stops_early: bool, encoder: Path, tmp_path: Path
) -> None:
    """The best one and the newest, which has the mean; all where the last is not known before."""
    options = ["--early_stopping", 99] if stops_early else []
    done = run("training_sts.py", encoder, "--max_steps", 6, "--save_steps", 1, "--no_test",
               "--average_checkpoints", 5, *options, "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = checkpoints(tmp_path / "run/checkpoints")
    best = json.loads((tmp_path / "run/scores.json").read_text())["best_step"]
    kept = {2, 3, 4, 5, 6} if stops_early else {6}
    assert {step_of(folder) for folder in found} == kept | {best}
    for folder in found:
        names = {path.name for path in folder.iterdir()}
        state = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
        state |= set() if stops_early else {"mean.safetensors"}
        assert names & {*state, "mean.safetensors"} == (state if folder is found[-1] else set())
        assert {"model.safetensors", "embeddings.npy", "trainer_state.json"} <= names
        assert changed_file(folder) is None  # its manifest names what is there, and no more


def test_the_mean_so_far_is_that_of_the_checkpoints(encoder: Path, tmp_path: Path) -> None:
    models, options = [], ["--max_steps", 6, "--save_steps", 1, "--average_checkpoints", 5]
    options += ["--learning_rate", 1e-3, "--no_test"]
    for name, more in (("so-far", []), ("kept", ["--early_stopping", 99])):
        folder = tmp_path / name
        done = run("training_sts.py", encoder, *options, *more, "--run_dir", folder)
        assert done.returncode == 0, done.stderr
        models.append(json.loads((folder / "scores.json").read_text())["tried"])
    assert models[0] == models[1] and "mean of steps 2, 3, 4, 5, 6" in models[0]


def test_ctrl_c_tells_the_command_that_resumes(encoder: Path, tmp_path: Path) -> None:
    options = ["--save_steps", 2, "--run_dir", tmp_path / "run", "--no_test"]
    process = start("training_sts.py", encoder, "--max_steps", 2000, *options)
    while process.poll() is None and not [*tmp_path.glob("run/checkpoints/*/manifest.json")]:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    line = next(line for line in stderr.splitlines() if line.startswith("stopped; to go on: "))
    again = shlex.split(line.removeprefix("stopped; to go on: "))
    assert again[1:] == [*process.args[1:], "--resume"]
    assert last_checkpoint(tmp_path / "run/checkpoints")


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
        process = start("training_sts.py", encoder, *options, *resume, largest_file=limit)
        _, stderr = process.communicate()
        assert process.returncode == 1, (limit, stderr)
        assert stderr.splitlines()[-1].startswith("error: "), stderr
        assert "Traceback" not in stderr
        assert not (folder / "modules.json").exists()
        resume = ["--resume"]
    done = run("training_sts.py", encoder, *options, "--resume")
    assert done.returncode == 0, done.stderr
    expected, actual = weights(tmp_path / "whole"), weights(folder)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("where", ["training.add_to_mean", "run_folder.save_encoder"])
def test_a_disk_that_is_full_later_than_the_optimizer_ends_in_one_line_too(
    where: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    options = ["--max_steps", 3, "--save_steps", 1, "--average_checkpoints", 2, "--no_test"]
    room, module = resource.getrlimit(resource.RLIMIT_FSIZE), f"common.{where.split('.')[0]}"
    write = getattr(importlib.import_module(module), where.split(".")[1])

    def write_with_little_room(*arguments: object, **more: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, room[1]))
        try:
            write(*arguments, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, room)

    with monkeypatch.context() as patch:
        patch.setattr(f"common.{where}", write_with_little_room)
        done = run("training_sts.py", encoder, *options, "--run_dir", folder)
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {folder}") and "not written: " in line
    assert not [*folder.glob("mod*.json"), *folder.glob(".saving")]
    done = run("training_sts.py", encoder, *options, "--run_dir", folder, "--resume")
    assert done.returncode == 0, done.stderr


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


def test_a_resume_with_other_options_is_refused_before_anything_is_read(
    encoder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(encoder, tmp_path / "model")
    data = shutil.copytree(SAMPLES, tmp_path / "data")
    options = ["--data_dir", data, "--max_steps", 1, "--no_test", "--run_dir", tmp_path / "run"]
    assert run("training_sts.py", model, *options).returncode == 0
    edit_json(tmp_path / "run/run.json", finished=None)
    shutil.rmtree(model)
    shutil.rmtree(data)
    done = run("training_sts.py", model, *options, "--resume", "--seed", 1)
    assert done.returncode == 2
    assert done.stderr == "error: --resume: --seed is 1 now and was 777: not that run\n"


def unfinish(folder: Path) -> None:
    """Makes a finished run look like one that was killed before its end."""
    edit_json(folder / "run.json", finished=None)
    (folder / "modules.json").unlink()


def test_a_resume_compares_contents_and_not_places(encoder: Path, tmp_path: Path) -> None:
    data, model = shutil.copytree(SAMPLES, tmp_path / "data"), tmp_path / "model"
    shutil.copytree(encoder, model)
    folder = tmp_path / "run"
    options = ["--max_steps", 2, "--no_test", "--run_dir", folder]
    assert run("training_sts.py", model, "--data_dir", data, *options).returncode == 0
    expected = weights(folder)
    stored = (folder / "run.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in stored and str(data) not in stored
    unfinish(folder)

    def resume(model: Path, data: Path) -> str:
        done = run("training_sts.py", model, "--data_dir", data, *options, "--resume")
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr
        return "" if done.returncode == 0 else done.stderr.splitlines()[-1]

    train = data / "KorSTS/sts-train.tsv"
    whole = train.read_text(encoding="utf-8")
    lines = whole.splitlines()
    fields = lines[5].split("\t")
    lines[5] = "\t".join([*fields[:4], "0.5", *fields[5:]])
    train.write_text("\n".join(lines) + "\n", encoding="utf-8")
    says = "error: --resume: sts-train.tsv: another content than the run in "
    assert resume(model, data).startswith(says)
    other = write_plain_encoder(tmp_path / "other", seed=1)
    train.write_text(whole, encoding="utf-8")
    assert resume(other, data).startswith("error: --resume: other: other weights than the run in ")
    moved = data.rename(tmp_path / "moved"), model.rename(tmp_path / "moved-model")
    assert resume(moved[1], moved[0]) == ""
    assert all(torch.equal(value, weights(folder)[name]) for name, value in expected.items())


def test_save_steps_is_free_on_resume_only_where_nothing_is_averaged(
    encoder: Path, tmp_path: Path
) -> None:
    for name, more, status in (("alone", [], 0), ("mean", ["--average_checkpoints", 2], 2)):
        options = ["--max_steps", 2, "--no_test", *more, "--run_dir", tmp_path / name]
        assert run("training_sts.py", encoder, *options, "--save_steps", 1).returncode == 0
        unfinish(tmp_path / name)
        done = run("training_sts.py", encoder, *options, "--save_steps", 2, "--resume")
        assert done.returncode == status, done.stderr
        assert ("--save_steps is 2 now and was 1" in done.stderr) == (status == 2)


def test_another_number_of_processes_is_said(encoder: Path, tmp_path: Path) -> None:
    options = ["--max_steps", 2, "--no_test", "--run_dir", tmp_path / "run"]
    assert run("training_sts.py", encoder, *options).returncode == 0
    unfinish(tmp_path / "run")
    edit_json(tmp_path / "run/run.json", processes=2)
    done = run("training_sts.py", encoder, *options, "--resume")
    assert done.returncode == 0 and "note: 1 processes now, 2 before" in done.stderr


def test_early_stopping_ends_without_a_best_and_survives_a_kill_after_the_last_evaluation(
    encoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # At a rate as high as this one, dev falls again after a few epochs.
    options = ["--num_epochs", 30, "--learning_rate", 0.01, "--early_stopping", 2, "--no_test"]
    done = run("training_sts.py", encoder, *options, "--run_dir", folder)
    assert done.returncode == 0, done.stderr
    expected, scores = weights(folder), json.loads((folder / "scores.json").read_text())
    steps = [entry["step"] for entry in scores["evaluations"]]
    assert len([step for step in steps if step > scores["best_step"]]) == 2
    assert len(steps) < 30
    unfinish(folder)
    (folder / "model.safetensors").unlink()
    done = run("training_sts.py", encoder, *options, "--run_dir", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(value, weights(folder)[name]) for name, value in expected.items())
    assert json.loads((folder / "scores.json").read_text()) == scores


def test_a_run_killed_while_it_began_leaves_nothing_in_the_way(
    encoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".run.json.4711").write_text("{")
    options = ["--max_steps", 1, "--no_test", "--run_dir", folder]
    assert run("training_sts.py", encoder, *options).returncode == 0
    again = run("training_sts.py", encoder, *options)
    assert again.returncode == 2 and "not empty; --resume goes on with a run" in again.stderr


PICTURES = [
    "from common.evaluation import SIMILARITIES\n"
    "from common.run_folder import plot_scores\n"
    "scores = {f'{name}_spearman': 0.5 for name in SIMILARITIES}\n"
    "plot_scores(Path('scores.png'), 'dev.tsv', [(0, scores), (4, scores)])\n",
    "from common.plots import draw_plots\n"
    "draw_plots([], Path(), Path(sys.argv[1]))\n",
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "picture"), list(zip(PICTURES, ("scores", "score_by_cost"), strict=True))
)
def test_pictures_take_no_settings_of_a_notebook_or_a_user(
    code: str, picture: str, tmp_path: Path
) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 40\n")
    settings = "print([matplotlib.rcParams[name] for name in ('text.usetex', 'lines.linewidth')])"
    code = f"import sys\nfrom pathlib import Path\n{code}import matplotlib\n{settings}\n"
    done = subprocess.run(
        [sys.executable, "-c", code, REPOSITORY / "measurements"],
        capture_output=True, text=True, cwd=tmp_path,
        env=OFFLINE | {"MPLBACKEND": "module://of_a_notebook.that_is_not_here"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[False, 1.5]\n"), done.stderr
    assert (tmp_path / f"{picture}.png").is_file()


def test_the_commit_is_one_of_these_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]

    def commit(*paths: str) -> str:
        for line in (["add", *paths], ["commit", "-q", "-m", "a commit"]):
            subprocess.run([*git, *line], check=True, cwd=tmp_path)
        head = [*git, "rev-parse", "HEAD"]
        return subprocess.run(head, capture_output=True, text=True, cwd=tmp_path).stdout.strip()

    subprocess.run([*git, "init", "-q"], check=True, cwd=tmp_path)
    for name in ("theirs.txt", "unpacked/common/run_folder.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.setattr(run_folder, "REPOSITORY", tmp_path / "unpacked")
    assert run_folder._git_commit() is None  # no commit at all
    commit("theirs.txt")
    assert run_folder._git_commit() is None  # one of what is around it
    expected = commit("unpacked")
    assert run_folder._git_commit() == expected and len(expected) == 40


def test_a_run_is_whole_before_its_scores_are_printed(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def print_nothing(*said: str, file: object = None, **_: object) -> None:
        if file is None:  # stdout: whoever read it is gone
            written.append((tmp_path / "run/modules.json").is_file())
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(run_folder, "print", print_nothing, raising=False)
    done = run("training_sts.py", encoder, "--max_steps", 1, "--run_dir", tmp_path / "run")
    assert (done.returncode, done.stdout, written) == (1, "", [True])
    assert done.stderr.splitlines()[-1] == "error: system: Broken pipe"
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]
