"""train.sh: its recipes are those of the README, and the staged ones run."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import venv
from pathlib import Path

import pytest
from commands import run_script
from conftest import REPOSITORY
from encoders import SAMPLES, write_plain_encoder

from common.experiment_log import without_repeats

TRUE, FALSE = map(shutil.which, ("true", "false"))  # Linux and macOS have them in two places


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
    folder: Path,
    *arguments: str,
    data: Path | str = SAMPLES,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    environment |= {"PATH": "/usr/bin:/bin", "DATA_DIR": str(data), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", str(folder / "train.sh"), *arguments], capture_output=True, text=True, cwd=cwd,
        env=environment,
    )  # fmt: skip


def test_the_recipes_are_those_of_the_readme(tmp_path: Path) -> None:
    done = train_sh(copy_of_train_sh(tmp_path, TRUE), "all")
    assert done.returncode == 0, done.stderr
    data = f" --data_dir {SAMPLES}"
    ran = {line[2:].removesuffix(data) for line in done.stderr.splitlines()}
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(ko-[a-z0-9-]+)`.*\| `(python training_[^`]+)` \|", readme, re.M)
    assert len(rows) == 9
    assert {command for _, command in rows} <= ran


def test_data_dir_is_counted_from_where_the_script_is_called(tmp_path: Path) -> None:
    folder, elsewhere = copy_of_train_sh(tmp_path, TRUE), tmp_path / "else where"
    for place in (folder, elsewhere):
        (place / "data").mkdir(parents=True)
    for place, shown in ((folder, "data"), (elsewhere, f"'{elsewhere}/data'")):
        done = train_sh(folder, "ko-sroberta-sts", data="data", cwd=place)
        assert done.returncode == 0, done.stderr
        assert done.stderr.rstrip().endswith(f" --data_dir {shown}")


@pytest.mark.parametrize("name", ["ko-sroberta", "demo2", "ko-sroberta-v2 x"])
def test_a_wrong_name_stops_before_anything_runs(tmp_path: Path, name: str) -> None:
    done = train_sh(copy_of_train_sh(tmp_path, FALSE), *name.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: no recipe ")
    assert len(done.stderr.splitlines()) == 1


def test_v2_trains_nli_first_and_sts_from_it(tmp_path: Path) -> None:
    options = f"{write_plain_encoder(tmp_path / 'encoder')} --max_seq_length 48"
    folder = copy_of_train_sh(tmp_path, TRUE, roberta_base=options)
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
    data = tmp_path / "my data's"
    data.mkdir()
    done = train_sh(copy_of_train_sh(tmp_path, TRUE), "e5-small-ko-v2-epoch", data=data)
    assert done.returncode == 0, done.stderr
    build, training = (shlex.split(line)[1:] for line in done.stderr.splitlines())
    assert build == ["python", "offline_encoder.py", "--output", "models/e5-small-ko"]
    assert training[training.index("--prompt") + 1] == "query: "
    assert training[training.index("--data_dir") + 1] == str(data)
    # measurements/ measures the same recipe, but for its precision.
    source = (REPOSITORY / "measurements/measure_whole_run.py").read_text(encoding="utf-8")
    measured = ast.literal_eval(re.search(r"^EPOCH_OF_V2 = (\[.*?\])", source, re.M | re.S)[1])
    places = ("--model_name_or_path", "--precision", "--data_dir")
    options = without_repeats(training, places)
    assert options[:2] == ["python", "training_sts.py"]
    assert sorted(options[2:]) == sorted(measured)


def test_the_demo_does_all_stages_and_says_how_to_go_on(tmp_path: Path) -> None:
    done = train_sh(copy_of_train_sh(tmp_path, TRUE), "demo")
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
    assert search.startswith(f"{TRUE} examples/semantic_search_onnx.py") and folder[:-3] in search
    assert score.startswith(f"{TRUE} benchmark.py {folder} ") and "--results_dir" in score
    assert longer == f"DATA_DIR={SAMPLES} bash train.sh e5-small-ko-v2"


def test_the_demos_last_lines_can_be_pasted_where_folders_have_spaces(tmp_path: Path) -> None:
    python, data = tmp_path / "an environment/python", tmp_path / "my data's"
    python.parent.mkdir()
    python.symlink_to(TRUE)
    data.mkdir()
    done = train_sh(copy_of_train_sh(tmp_path, str(python)), "demo", data=data)
    assert done.returncode == 0, done.stderr
    search, score, longer = map(shlex.split, done.stdout.splitlines()[-3:])
    assert search[0] == score[0] == str(python)
    assert score[score.index("--data_dir") + 1] == str(data)
    assert longer == [f"DATA_DIR={data}", "bash", "train.sh", "e5-small-ko-v2"]


# --- Other machines --------------------------------------------------------------------------


def test_cdpath_leads_nowhere_else(tmp_path: Path) -> None:
    copy_of_train_sh(tmp_path, TRUE)
    (tmp_path / "elsewhere/repository").mkdir(parents=True)
    for path in ("elsewhere", ".", "elsewhere:."):
        done = train_sh(Path("repository"), "ko-sroberta-sts", cwd=tmp_path, CDPATH=path)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for script in ("train.sh", "tests/run.sh", ".ci/run"):
        text = (REPOSITORY / script).read_text(encoding="utf-8")
        assert 0 < text.index("unset CDPATH") < text.index("cd "), script


def copy_of_setup_sh(tmp_path: Path) -> Path:
    """A folder with common/setup.sh and requirements that everybody has: none."""
    folder = tmp_path / "with setup"
    (folder / "common").mkdir(parents=True)
    shutil.copy(REPOSITORY / "common/setup.sh", folder / "common")
    for path in ("requirements.txt", "tests/requirements.txt"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("# nothing\n")
    return folder


def setup(folder: Path, environment: Path | None) -> subprocess.CompletedProcess[str]:
    """Runs setup_python as the scripts do; stdout is PYTHON."""
    script = (
        "set -euo pipefail; source common/setup.sh; setup_python requirements.txt; echo $PYTHON"
    )
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    env |= {"VIRTUAL_ENV": str(environment)} if environment else {}
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=folder, env=env
    )


def test_an_environment_without_pip_gets_it(tmp_path: Path) -> None:
    folder = copy_of_setup_sh(tmp_path)
    for environment in (tmp_path / "of uv", folder / ".venv"):  # the second: left half-made
        venv.create(environment)
        done = setup(folder, environment if environment.name == "of uv" else None)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{environment}/bin/python\n"
        assert "No module named pip" not in done.stderr
        again = setup(folder, environment)
        assert (again.returncode, again.stderr) == (0, "")  # it knows


def test_an_environment_that_cannot_be_written_is_used_as_it_is(tmp_path: Path) -> None:
    environment = tmp_path / "of an administrator"
    venv.create(environment, with_pip=True)
    folder = copy_of_setup_sh(tmp_path)
    (environment / f"installed-{folder.name}").mkdir()  # root writes anywhere, but not here
    done = setup(folder, environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{environment}/bin/python\n"


def test_git_for_windows_leaves_the_ends_of_lines(tmp_path: Path) -> None:
    git = ["git", "-c", "core.autocrlf=true", "-c", "user.name=A", "-c", "user.email=a@b.c"]
    git += ["-c", "commit.gpgsign=false"]
    source = tmp_path / "source"
    source.mkdir()
    for name in (".gitattributes", "train.sh", "results/score_by_cost.png"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    for line in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *line], check=True, cwd=source)
    subprocess.run([*git, "clone", "-q", source, tmp_path / "clone"], check=True)
    for name in ("train.sh", "results/score_by_cost.png"):
        assert (tmp_path / "clone" / name).read_bytes() == (REPOSITORY / name).read_bytes()
