"""The log of training runs: what it keeps of run folders, its rows, its tables."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common import experiment_log
from common.command_line import REPOSITORY, UserError, read_json
from common.evaluation import SCORE_KEYS
from common.results import NOT_MEASURED

SCRIPT = REPOSITORY / "measurements" / "collect_experiments.py"
RESULTS, MEASUREMENTS = REPOSITORY / "results", REPOSITORY / "measurements"
PARTS = {"original", "v2", "ablation", "training", "openvino", "openvino-avx2"}
COMPARED = """$ python benchmark.py --compare a-1,a-2 b-1,b-2
sts-test.tsv: 1,379 pairs, 2,514 sentences
x100                       A       B   A - B   95% interval
cosine_pearson         82.24   81.51   +0.73   +0.04 to +1.46
cosine_spearman        82.02   80.97   +1.05   -0.32 to +1.80
A: cosine Spearman 82.02 [79.93, 83.88]
B: cosine Spearman 80.97 [78.78, 82.92]
cosine Spearman: no difference shown, the interval holds 0

$ python benchmark.py --compare a-1 b-1 --leave_out pairs
left out, in sts-train.tsv or sts-dev.tsv: 1,010 pairs
cosine_spearman        81.86   82.91   -1.05   -1.80 to -0.29
A: cosine Spearman 81.86 [79.73, 83.76]
B: cosine Spearman 82.91 [78.56, 82.83]
"""


def collect(results_dir: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, SCRIPT, *arguments, "--results_dir", results_dir]
    return subprocess.run(list(map(str, line)), capture_output=True, text=True)


def write_run(folder: Path, finished: str | None, **changes: object) -> Path:
    """Writes a run folder as the training scripts of November 25, 2026 did."""
    run = {
        "command": "python training_sts.py --data_dir /home/a/b --seed 1 --run_dir x --no_test",
        "options": {"seed": 1},
        "git_commit": "0123456789",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": finished,
        "data": [],
        "versions": {},
        "threads": 2,
    }
    folder.mkdir(parents=True)
    if finished:
        run |= {"steps": 1234, "training_cpu_seconds": 56.7}
        scores = {
            "before_training": {"cosine_spearman": 0.5},
            "evaluations": [{"step": 10, "cosine_spearman": 0.625}],
            "chosen": "step 10",
            "dev": {"cosine_spearman": 0.625},
            "test": {"cosine_spearman": 0.75},
        }
        (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "run.json").write_text(json.dumps(run | changes))
    return folder


def collected(results_dir: Path, *folders: Path, group: str | None = None) -> dict[str, dict]:
    done = collect(results_dir, *(["--group", group] if group else []), *folders)
    assert done.returncode == 0, done.stderr
    return experiment_log.read_rows(results_dir)


# --- Collecting ------------------------------------------------------------------------------


def test_rows_come_from_run_folders_finished_or_not(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", "2026-01-02T00:00:00+00:00")
    dead = write_run(tmp_path / "dead", None)
    assert collect(tmp_path / "results", done, dead).returncode == 0
    parts = experiment_log.generated_parts(tmp_path / "results", tmp_path)
    rows = parts["log-other"].splitlines()[-4:]
    start = "| 2026-01-01 | 0123456 |"
    machine = "1 | 2 |  |  |"
    assert rows == [
        f"{start} dead | {machine}  | not finished |  |  |  |  |  |  |",
        f"{start} done | {machine} 1,234 | 57 |  | 86,400 "
        "| 50.00 62.50 | step 10 | 62.50 | 75.00 |",
        "",
        "- dead, done: `python training_sts.py --no_test`",
    ]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    done = collect(tmp_path / "results", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: no run.json: not a run folder\n"
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"options": {}}', '{"options": {"seed": 1}}'])
def test_a_run_json_that_is_no_run_is_named(tmp_path: Path, content: str) -> None:
    good, bad = write_run(tmp_path / "good", None), write_run(tmp_path / "bad", None)
    (bad / "run.json").write_text(content)
    done = collect(tmp_path / "results", good, bad)
    assert done.returncode == 2
    assert done.stderr == f"error: {bad}: run.json or scores.json is not that of a run\n"
    assert not (tmp_path / "results").exists()


def test_two_runs_of_one_name_do_not_replace_each_other(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / side / "run", None) for side in ("a", "b")]
    done = collect(tmp_path / "results", *runs)
    assert done.returncode == 2 and "error: two runs are named run: " in done.stderr
    assert not (tmp_path / "results").exists()
    later = write_run(tmp_path / "c/run", None, started="2026-01-01T00:00:01+00:00")
    before = collected(tmp_path / "results", runs[0])
    done = collect(tmp_path / "results", write_run(tmp_path / "new", None), later)
    says = f"error: {later}: the log has another run named run: rename the folder\n"
    assert (done.returncode, done.stderr) == (2, says)
    assert experiment_log.read_rows(tmp_path / "results") == before


def test_a_row_has_what_the_tables_and_a_repetition_need(tmp_path: Path) -> None:
    mean = "mean of steps 5, 10"
    figures = {
        "device": "a processor", "precision": "bf16", "startup_seconds": 4.5,
        "training_wall_seconds": 30.0, "evaluation_wall_seconds": 8.0,
        "evaluation_cpu_seconds": 15.5, "total_wall_seconds": 99.9, "peak_memory_mb": 1234,
        "weights": {"model.safetensors": "00ff"},
    }  # fmt: skip
    options = {"seed": 1, "learning_rate": 2e-5, "save_steps": 5, "run_dir": "/home/a/run",
               "train_files": ["/home/a/a.tsv", "b.tsv", "/home/a/c.tsv"],
               "model_name_or_path": "klue/roberta-base", "prompt": "query: ",
               "data_dir": "KorNLUDatasets"}  # fmt: skip
    command = (
        "python training_nli.py --learning_rate 5e-5 --train_files /home/a/a.tsv b.tsv "
        "--model_name_or_path klue/roberta-base --prompt 'query: ' --save_steps=30 "
        "--train_files=c.tsv --learning_rate 2e-5 --save_steps 5 --seed 1 --resume"
    )
    run = write_run(tmp_path / "run", "2026-01-01T00:01:00+00:00", command=command,
                    options=options, **figures)  # fmt: skip
    scores = read_json(run / "scores.json")
    scores |= {"tried": {"step 10": {"cosine_spearman": 0.6}, mean: {"cosine_spearman": 0.7}}}
    (run / "scores.json").write_text(json.dumps(scores | {"chosen": mean}))
    row = collected(tmp_path / "results", run, group="short")["run"]
    assert tuple(row) == experiment_log.KEYS
    assert {key: row[key] for key in figures} == figures
    assert row["tried"] == {"step 10": 0.6, mean: 0.7} and row["chosen"] == mean
    assert (row["group"], row["source"], row["save_steps"], row["seed"]) == (
        "short", "measured", 5, 1,
    )  # fmt: skip
    assert row["command"] == (
        "python training_nli.py --learning_rate 2e-5 --train_files a.tsv b.tsv c.tsv "
        "--model_name_or_path klue/roberta-base --prompt 'query: ' --save_steps 5"
    )
    assert row["options"] == {
        "learning_rate": 2e-5, "save_steps": 5, "train_files": ["a.tsv", "b.tsv", "c.tsv"],
        "model_name_or_path": "klue/roberta-base", "prompt": "query: ",
    }  # fmt: skip
    part = experiment_log.generated_parts(tmp_path / "results", tmp_path)["log-short"]
    assert f"| 1 | 2 | a processor | bf16 | 1,234 | 57 | 16 | 100 | 50.00 62.50 | {mean} |" in part
    # Collected again, a run stays with its question; it moves where the command says so.
    assert collected(tmp_path / "results", run)["run"]["group"] == "short"
    assert collected(tmp_path / "results", run, group="v2")["run"]["group"] == "v2"


def test_what_an_old_run_did_not_record_is_null(tmp_path: Path) -> None:
    row = collected(tmp_path / "results", write_run(tmp_path / "run", None))["run"]
    assert row["group"] == "other"
    given = {"threads": 2}
    assert {key: row[key] for key in experiment_log.FIGURES} == (
        dict.fromkeys(experiment_log.FIGURES) | given
    )
    for key in ("save_steps", "before_training", "tried", "chosen", "dev", "test"):
        assert row[key] is None
    assert row["evaluations"] == {}


# --- The stored rows -------------------------------------------------------------------------


def test_the_stored_rows_are_whole_and_their_commands_as_they_took_effect() -> None:
    rows = experiment_log.read_rows(RESULTS)
    assert {row["group"] for row in rows.values()} == set(experiment_log.GROUPS)
    for row in rows.values():
        assert tuple(row) == experiment_log.KEYS
        assert row["test"] is None or tuple(row["test"]) == SCORE_KEYS
        if row["source"] == "read":
            assert row["command"] is None and "sentence-transformers 2.7" in row["read_from"]["all"]
            continue
        options = [part for part in shlex.split(row["command"]) if part.startswith("--")]
        assert len(options) == len(set(options)) and "--seed" not in options
        assert not row["tried"] or row["tried"][row["chosen"]] == row["dev"]


def test_figures_from_elsewhere_are_those_that_stand_there() -> None:
    rows = experiment_log.read_rows(RESULTS)
    for run, name in (("cosine-777", "e5-small-ko-sts"), ("pearson-v2-777", "e5-small-ko-v2")):
        result = read_json(RESULTS / f"{name}.json")
        assert rows[run]["weights"] == result["model"]["weights"]
        assert rows[run]["test"] == pytest.approx(result["scores"], abs=1e-5)
    printed = (MEASUREMENTS / "v2.txt").read_text(encoding="utf-8")
    staged = printed.split("--compare staged-v2-777 multi-task-777\n")[1].splitlines()
    side_a = {line.split()[0]: line.split()[1] for line in staged[2:10]}
    assert side_a == {key: f"{100 * v:.2f}" for key, v in rows["staged-v2-777"]["test"].items()}
    # The means that the comparison printed are those of the rows.
    whole = experiment_log.read_comparisons(MEASUREMENTS / "v2.txt")[0]
    for side, mean in zip(whole.sides, (whole.a, whole.b), strict=True):
        tests = [rows[run]["test"]["cosine_spearman"] for run in side]
        assert f"{100 * sum(tests) / len(tests):.2f}" == mean


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"run": "odd", "group": "v2"}'])
def test_a_file_that_is_no_row_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/odd.json").write_text(content)
    with pytest.raises(UserError, match=r"odd\.json: no row of the log of training runs"):
        experiment_log.read_rows(tmp_path)


# --- Tables ----------------------------------------------------------------------------------


def test_comparisons_are_read_as_they_were_printed(tmp_path: Path) -> None:
    (tmp_path / "v2.txt").write_text(COMPARED)
    whole, without = experiment_log.read_comparisons(tmp_path / "v2.txt")
    assert whole.sides == (["a-1", "a-2"], ["b-1", "b-2"])
    assert (whole.a, whole.a_interval, whole.b) == ("82.02", "[79.93, 83.88]", "80.97")
    assert (whole.difference, whole.interval) == ("+1.05", ("-0.32", "1.80"))
    assert (whole.leave_out, whole.is_shown) == (None, False)
    assert (without.leave_out, without.pairs_left_out, without.is_shown) == ("pairs", 1010, True)
    cut = COMPARED[: COMPARED.index(" b-1 --leave_out")]
    for text in (COMPARED.replace("B: cosine", "B:"), COMPARED.replace("-0.32", "low"), cut):
        (tmp_path / "v2.txt").write_text(text)
        with pytest.raises(UserError, match=r"v2\.txt: no output of benchmark\.py --compare"):
            experiment_log.read_comparisons(tmp_path / "v2.txt")
    (tmp_path / "v2.txt").write_bytes(COMPARED.encode() + b"\xff")
    with pytest.raises(UserError, match=r"v2\.txt: damaged: not UTF-8"):
        experiment_log.read_comparisons(tmp_path / "v2.txt")


def test_nothing_is_shown_of_what_was_not_measured(tmp_path: Path) -> None:
    parts = experiment_log.generated_parts(tmp_path, tmp_path)
    assert {name for name, text in parts.items() if text == NOT_MEASURED} == PARTS
    logs = {f"log-{group}" for group in experiment_log.GROUPS}
    assert {name for name, text in parts.items() if text == "Not measured yet."} == logs


def test_the_tables_of_v2() -> None:
    rows = experiment_log.read_rows(RESULTS)
    parts = experiment_log.generated_parts(RESULTS, MEASUREMENTS)
    assert set(parts) == PARTS | {f"log-{group}" for group in experiment_log.GROUPS}
    original, v2, *differences = parts["v2"].splitlines()[2:]
    assert "| 85.27, 85.70, 85.51 |" in original and "| 80.97 [78.78, 82.92] |" in original
    assert original.endswith("| 4,156 (스레드 2개), 2,463, 2,636 |")
    assert "| 82.40, 81.85, 81.82 | **82.02** [79.93, 83.88] |" in v2
    assert [line.split(" | ")[3] for line in differences] == [
        "**+1.05** [0.32, 1.80]", "**+1.05** [0.29, 1.80]", "**+1.14** [0.26, 2.02]",
    ]  # fmt: skip
    ablation = parts["ablation"].splitlines()[2:]
    assert len(ablation) == len(experiment_log.ABLATION) + 2
    assert set(experiment_log.ABLATION) == {
        run for run, row in rows.items() if row["group"] == "ablation"
    }
    # Without the start weight dev would have chosen the mean of checkpoints.
    assert ablation[-2:] == [
        "| `--start_weight` 없이 | 85.78 | 376 |",
        "| `--average_checkpoints` 없이 | 86.05 | 376 |",
    ]


def test_the_original_stands_beside_ours_epoch_by_epoch() -> None:
    rows = experiment_log.generated_parts(RESULTS, MEASUREMENTS)["original"].splitlines()
    assert rows[2:] == [
        "| 원본 스크립트 (sentence-transformers 2.7) |  | 85.12 | 85.80 | 85.87 | 85.62 | 85.73 "
        "| 81.20 |",
        "| 이 저장소 (sentence-transformers 6.2) | 79.31 | 85.00 | **85.27** | 85.01 | 85.15 "
        "| 85.24 | 80.77 [78.52, 82.80] |",
    ]


def test_the_log_marks_read_runs_and_shows_each_command_once() -> None:
    parts = experiment_log.generated_parts(RESULTS, MEASUREMENTS)
    lines = parts["log-original"].splitlines()
    assert lines[2].startswith("|  |  | original-2.7-777 (read) | 777 | 2 |")
    assert "- cosine-777, cosine-778, cosine-779: `python training_sts.py " in "\n".join(lines)
    assert parts["log-v2"].count("--save_steps 30") == 2  # with and without --no_test
    assert "[0.39, 1.80]" not in parts["log-nli"] and "+1.45 [0.39, 2.54]" in parts["log-nli"]


def test_the_log_needs_no_torch() -> None:
    code = "import sys, common.experiment_log; print({'torch', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
