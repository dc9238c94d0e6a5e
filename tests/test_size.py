"""measurements/size.py: what it counts, with an encoder of a few kilobytes and few rows."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, SAMPLES, Started, run_script
from test_train_sh import TRUE, copy_of_train_sh, train_sh
from transformers import AutoTokenizer

from common import machine, whole_runs
from common.command_line import UserError, read_json, write_json
from common.data import NLI_TRAIN_FILES, read_korsts
from common.experiment_log import without_repeats
from common.formats import read_nli_triplets

sys.path.append(str(REPOSITORY / "measurements"))
import size
import size_data

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"intermediate_size": 32}


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_data, "SHAPE", size_data.SHAPE | TINY)
    rows = dict(zip(NLI_TRAIN_FILES, (300, 90), strict=True))  # 260 triplets
    monkeypatch.setattr(size_data, "KORNLI_ROWS", rows)
    monkeypatch.setattr(size_data, "KORSTS_ROWS", {"train": 40, "dev": 20})
    monkeypatch.setattr(size, "start", start)


def start(line: list[object]) -> Started | InThisProcess:
    """Starts a script as size.py's own `start` does; what is to be killed in another process."""
    is_to_be_killed = "--resume" not in line and Path(line[-1]).name == "killed"
    return (Started if is_to_be_killed else InThisProcess)(*line)


class InThisProcess:
    """A script that has run, with what size.py uses of `subprocess.Popen`."""

    def __init__(self, *line: object) -> None:
        done = run_script(*line)
        self.returncode, self.stderr = done.returncode, done.stderr

    def communicate(self) -> None:
        print(self.stderr, file=sys.stderr)


def run_size(monkeypatch: pytest.MonkeyPatch, work_dir: Path, *options: object) -> dict:
    """Runs size.py's main in this process, its scripts in others; returns its report."""
    output = work_dir / "size.json"
    line = ["size.py", "--work_dir", work_dir, "--output", output, *options]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    size.main()
    return read_json(output) if output.is_file() else {}


def test_the_recipes_are_measured_and_the_hours_reckoned(
    monkeypatch: pytest.MonkeyPatch, work_dir: Path
) -> None:
    other = {"machine": "a GPU", "rows": {"sts, fp32": {}}}
    write_json(work_dir / "size.json", {"gpu": other})
    report = run_size(monkeypatch, work_dir, "--steps", 3, "--dev_pairs", 10)
    assert report["gpu"] == other
    rows = report["cpu"]["rows"]
    assert {name: row["whole_recipe"] for name, row in rows.items()} == {
        "sts, fp32": {"steps": 25, "dev_scores": 6, "checkpoints": 5},
        "nli, fp32": {"steps": 4, "dev_scores": 2, "checkpoints": 1},
        "multi-task, fp32": {"steps": 40, "dev_scores": 6, "checkpoints": 5},
        "v2 sts, fp32": {"steps": 6, "dev_scores": 7, "checkpoints": 3},
    }
    assert [row["steps_measured"] for row in rows.values()] == [3, 3, 4, 3]
    for row in rows.values():
        assert row["whole_dev_score_seconds_by_proportion"] == 2 * row["dev_score_seconds"]
        assert row["checkpoint_bytes"] > 3 * 4 * report["cpu"]["encoder"]["parameters"]
        assert row["steps_a_second"] > 0 and row["peak_memory_mb"] > 100
        assert 0 < row["cores_used"] < 3  # one thread, and those of the libraries
    row = rows["v2 sts, fp32"]
    seconds = row["start_seconds"] + row["reading_back_and_saving_seconds"]
    seconds += 6 / row["steps_a_second"] + 7 * 2 * row["dev_score_seconds"]
    seconds += 3 * row["checkpoint_seconds"]
    assert row["hours_of_the_whole_recipe"] == pytest.approx(seconds / 3600)
    assert "size.py" in report["cpu"]["command"] and str(work_dir) not in report["cpu"]["command"]
    assert not list(work_dir.glob("tmp*"))


def test_a_gpu_takes_all_precisions_and_the_library_and_keeps_what_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(size.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(size, "device_name", lambda device: f"a {device}")
    monkeypatch.setattr(size_data, "write_encoder", lambda *_: {"parameters": 1})
    for name in ("measure", "measure_library"):
        monkeypatch.setattr(size, name, lambda *line, name=name: {"by": name, "steps": line[2]})
    rows = run_size(monkeypatch, tmp_path)["gpu"]["rows"]
    assert len(rows) == 4 * 3 + 2 * 3
    assert rows["v2 sts, tf32"] == {"by": "measure", "steps": 300}
    assert rows["nli, bf16, library"] == {"by": "measure_library", "steps": 300}
    options = ("--recipes", "sts", "--precisions", "bf16", "--steps", 50)
    again = run_size(monkeypatch, tmp_path, *options)["gpu"]["rows"]
    changed = {name for name in rows if again[name] != rows[name]}
    assert changed == {"sts, bf16", "sts, bf16, library"} and again.keys() == rows.keys()


def test_tf32_is_set_before_the_script_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, seen = torch.get_float32_matmul_precision(), []
    monkeypatch.setattr(sys, "argv", ["size.py", "--child", "tf32", "report", "3", "script.py"])
    monkeypatch.setattr(
        size, "child", lambda *line: seen.append([torch.get_float32_matmul_precision(), *line])
    )
    try:
        size.main()
    finally:
        torch.set_float32_matmul_precision(usual)
    assert seen == [["high", "report", "3", "script.py"]]


def test_more_steps_than_a_recipe_has_are_refused(
    monkeypatch: pytest.MonkeyPatch, work_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError, match="exit status 2: "):
        run_size(monkeypatch, work_dir, "--recipes", "sts", "--steps", 26)
    assert "error: --steps 26: training_sts.py has 25 here" in capsys.readouterr().err


def test_no_run_begins_that_would_not_end_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_size(monkeypatch, tmp_path, "--minutes", 0) == {}
    assert capsys.readouterr().err.count("no time left for ") == 4


def test_v2_killed_in_its_middle_ends_with_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run_size(monkeypatch, tmp_path, "--whole_v2", "--steps", 12)["cpu"]["whole_v2"]
    assert found["steps"] == [12, 12] and 6 <= found["killed_after_step"] <= 12
    assert found["same_weights"] and found["weights"][0] == found["weights"][1] != {}


def test_the_librarys_own_trainer_is_timed(tmp_path: Path) -> None:
    stems = size_data.write_data(tmp_path, None, None)
    size_data.write_encoder(tmp_path, stems)
    for recipe in size.LIBRARY:
        size.library(str(tmp_path / "report.json"), "3", recipe, str(tmp_path), "fp32")
        found = read_json(tmp_path / "report.json")
        assert found["steps_a_second"] > 0 and found["peak_memory_mb"] > 100


def test_the_options_are_those_of_train_sh(tmp_path: Path) -> None:
    done = train_sh(copy_of_train_sh(tmp_path, TRUE), "ko-sroberta-v2")
    places = ("--model_name_or_path", "--run_dir", "--precision", "--data_dir")
    for line, measured in zip(
        done.stderr.splitlines(), (size.NLI_OF_V2, size.STS_OF_V2), strict=True
    ):
        _, _, script, *options = shlex.split(line)
        assert without_repeats([script, *options], places) == measured


def test_generated_data_has_triplets_and_real_korsts_its_words(tmp_path: Path) -> None:
    stems = size_data.write_data(tmp_path, SAMPLES, 10)
    size_data.write_encoder(tmp_path, stems)
    triplets, records = read_nli_triplets([tmp_path / name for name in NLI_TRAIN_FILES], 777)
    assert [record["rows"] for record in records] == [300, 90] and len(triplets) >= 260
    assert len(read_korsts(tmp_path / "KorSTS/sts-dev.tsv")) == 10
    pairs = read_korsts(tmp_path / "KorSTS/sts-train.tsv")
    assert pairs.equals(read_korsts(SAMPLES / "KorSTS/sts-train.tsv"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    texts = [*pairs["sentence1"], *triplets["anchor"]]
    tokens = [token for row in tokenizer(texts)["input_ids"] for token in row]
    assert tokens.count(tokenizer.unk_token_id) < len(tokens) / 100
    words = sum(len(text.split()) for text in texts)
    assert 1.5 < len(tokens) / words < 3.5  # of klue's tokenizers about two


def test_a_cost_has_the_gpus_memory_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if not machine.torch.cuda.is_available():
        assert "peak_gpu_memory_mb" not in machine.cost(1.0, 1.0)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(machine.torch.cuda, "max_memory_reserved", lambda: 5 * 2**20)
    found = machine.cost(1.0, 1.0)
    assert (found["peak_gpu_memory_mb"], found["peak_gpu_reserved_mb"]) == (3, 5)


def test_the_table_says_what_was_not_measured(tmp_path: Path) -> None:
    row = {"hours_of_the_whole_recipe": 2.345, "peak_memory_mb": 4321, "steps_a_second": 0.34567}
    gpu = {"hours_of_the_whole_recipe": 0.1, "peak_gpu_memory_mb": 99, "steps_a_second": 12.345}
    path = tmp_path / "size.json"
    sides = {"cpu": {"machine": "M", "threads": 2, "rows": {"nli, fp32": row}}}
    write_json(path, sides)
    only, _, unmeasured = whole_runs.size_part(path).splitlines()[2:]
    assert unmeasured.startswith("GPU에서 측정하지 않음: STS(fp32, tf32, bf16), NLI(fp32, ")
    assert only == "| M, 스레드 2개 | NLI | fp32 | 2.35 | 4,321 | 0.346 |"
    rows = {"sts, bf16": gpu, "sts, bf16, library": gpu}
    write_json(path, sides | {"gpu": {"machine": "G", "threads": 8, "rows": rows}})
    lines = whole_runs.size_part(path).splitlines()
    assert "| G, 스레드 8개 | STS | bf16 | 0.10 | 99 | 12.3 |" in lines
    assert "| G, 스레드 8개 | STS, 라이브러리만 | bf16 |  | 99 | 12.3 |" in lines
    assert len(lines) == 2 + 3 + 2 and "STS(fp32, tf32), NLI(" in lines[-1]
