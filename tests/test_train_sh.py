"""train.sh: its recipes are those of the README, and the staged ones run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import run_script
from conftest import REPOSITORY
from encoders import SAMPLES, write_plain_encoder

from common.experiment_log import without_repeats


def copy_of_train_sh(tmp_path: Path, python: str, roberta_base: str = "") -> Path:
    """A folder with train.sh and what it runs, and this interpreter instead of an own one."""
    folder = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "common", folder / "common")
    for script in REPOSITORY.glob("*.py"):
        shutil.copy(script, folder)
    text = (REPOSITORY / "train.sh").read_text(encoding="utf-8")
    if roberta_base:
        text = text.replace("klue/roberta-base", roberta_base)
    (folder / "train.sh").write_text(text, encoding="utf-8")
    setup = f"setup_python() {{ PYTHON={python!r}; export PYTHON; }}\n"
    (folder / "common/setup.sh").write_text(setup)
    return folder


def train_sh(
    folder: Path, *arguments: str, data: Path | str = SAMPLES, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(folder / "train.sh"), *arguments], capture_output=True, text=True, cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "DATA_DIR": str(data), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_the_recipes_are_those_of_the_readme(tmp_path: Path) -> None:
    done = train_sh(copy_of_train_sh(tmp_path, "/bin/true"), "all")
    assert done.returncode == 0, done.stderr
    data = f" --data_dir {SAMPLES}"
    ran = {line[2:].removesuffix(data) for line in done.stderr.splitlines()}
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(ko-[a-z0-9-]+)`.*\| `(python training_[^`]+)` \|", readme, re.M)
    assert len(rows) == 9
    assert {command for _, command in rows} <= ran


def test_data_dir_is_counted_from_where_the_script_is_called(tmp_path: Path) -> None:
    folder, elsewhere = copy_of_train_sh(tmp_path, "/bin/true"), tmp_path / "else where"
    for place in (folder, elsewhere):
        (place / "data").mkdir(parents=True)
    for place, shown in ((folder, "data"), (elsewhere, f"'{elsewhere}/data'")):
        done = train_sh(folder, "ko-sroberta-sts", data="data", cwd=place)
        assert done.returncode == 0, done.stderr
        assert done.stderr.rstrip().endswith(f" --data_dir {shown}")


@pytest.mark.parametrize("name", ["ko-sroberta", "demo2", "ko-sroberta-v2 x"])
def test_a_wrong_name_stops_before_anything_runs(tmp_path: Path, name: str) -> None:
    done = train_sh(copy_of_train_sh(tmp_path, "/bin/false"), *name.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: no recipe ")
    assert len(done.stderr.splitlines()) == 1


def test_v2_trains_nli_first_and_sts_from_it(tmp_path: Path) -> None:
    options = f"{write_plain_encoder(tmp_path / 'encoder')} --max_seq_length 48"
    folder = copy_of_train_sh(tmp_path, "/bin/true", roberta_base=options)
    done = train_sh(folder, "ko-sroberta-v2")
    assert done.returncode == 0, done.stderr
    # What train.sh ran, run here in turn: an interpreter of its own takes ten seconds to start.
    for line in done.stderr.splitlines():
        _, _, script, *arguments = shlex.split(line)
        trained = run_script(folder / script, *arguments, cwd=folder)
        assert trained.returncode == 0, trained.stderr
    (run_folder,) = (folder / "output").iterdir()
    assert run_folder.name.startswith("ko-sroberta-v2-")
    nli, sts = (json.loads((run_folder / n / "run.json").read_text()) for n in ("nli", "sts"))
    assert nli["finished"] and sts["finished"]
    assert sts["options"]["model_name_or_path"] == "nli"  # no folder is stored
    assert sts["start_model"] == {"name": "nli", "weights": nli["weights"]}
    assert sts["options"]["loss"] == "pearson"
    assert "test" not in json.loads((run_folder / "nli/scores.json").read_text())
    assert "test" in json.loads((run_folder / "sts/scores.json").read_text())


def test_a_printed_command_can_be_pasted(tmp_path: Path) -> None:
    done = train_sh(copy_of_train_sh(tmp_path, "/bin/true"), "e5-small-ko-v2-epoch")
    assert done.returncode == 0, done.stderr
    build, training = (shlex.split(line)[1:] for line in done.stderr.splitlines())
    assert build == ["python", "offline_encoder.py", "--output", "models/e5-small-ko"]
    assert training[training.index("--prompt") + 1] == "query: "
    # measurements/ measures the same recipe, but for its precision.
    source = (REPOSITORY / "measurements/measure_whole_run.py").read_text(encoding="utf-8")
    measured = ast.literal_eval(re.search(r"^EPOCH_OF_V2 = (\[.*?\])", source, re.M | re.S)[1])
    places = ("--model_name_or_path", "--precision", "--data_dir")
    options = without_repeats(training, places)
    assert options[:2] == ["python", "training_sts.py"]
    assert sorted(options[2:]) == sorted(measured)


def test_the_demo_does_all_stages_and_says_how_to_go_on(tmp_path: Path) -> None:
    done = train_sh(copy_of_train_sh(tmp_path, "/bin/true"), "demo")
    assert done.returncode == 0, done.stderr
    ran = [shlex.split(line)[2] for line in done.stderr.splitlines()]
    assert ran == [
        "offline_encoder.py", "training_sts.py", "training_nli.py", "training_multi-task.py",
        "examples/semantic_search.py", "onnx/export_onnx.py",
    ]  # fmt: skip
    stages = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert [stage[3:6] for stage in stages] == ["1/5", "2/5", "3/5", "4/5", "5/5", "Go "]
    trained = shlex.split(done.stderr.splitlines()[1])
    folder = trained[trained.index("--run_dir") + 1]
    *_, search, score, longer = done.stdout.splitlines()
    assert search.startswith("/bin/true examples/semantic_search_onnx.py") and folder[:-3] in search
    assert score.startswith(f"/bin/true benchmark.py {folder} ") and "--results_dir" in score
    assert longer == f"DATA_DIR={SAMPLES} bash train.sh e5-small-ko-v2"


def test_the_demos_last_lines_can_be_pasted_where_folders_have_spaces(tmp_path: Path) -> None:
    python, data = tmp_path / "an environment/python", tmp_path / "my data's"
    python.parent.mkdir()
    python.symlink_to("/bin/true")
    data.mkdir()
    done = train_sh(copy_of_train_sh(tmp_path, str(python)), "demo", data=data)
    assert done.returncode == 0, done.stderr
    search, score, longer = map(shlex.split, done.stdout.splitlines()[-3:])
    assert search[0] == score[0] == str(python)
    assert score[score.index("--data_dir") + 1] == str(data)
    assert longer == [f"DATA_DIR={data}", "bash", "train.sh", "e5-small-ko-v2"]
