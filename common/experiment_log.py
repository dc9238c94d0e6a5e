"""The log of training runs: rows, groups, and the tables that are made of them.

Each run has one row, results/experiments/NAME.json, which measurements/collect_experiments.py
writes from a run folder. Null is what was not recorded. Keys:

    run, group      the run folder's name; the question it belongs to, one of `GROUPS`
    source          "measured" or, for a run that was not made here, "read"
    read_from       {what: where} of figures that were not in the run folder
    command         without folders and --seed, each option once: as it took effect
    options, seed   all options as they took effect, but for those that only say where
    save_steps      --save_steps, or null
    git_commit, started, finished, data, versions
    device, threads, precision      the processor, PyTorch's threads, fp32, bf16 or fp16
    steps, startup_seconds, training_wall_seconds, training_cpu_seconds, evaluation_wall_seconds,
    evaluation_cpu_seconds, total_wall_seconds, peak_memory_mb      as in run.json
    weights         {file: sha256} of the finished model
    before_training, evaluations    dev cosine Spearman, -1 to 1; evaluations is {step: score}
    tried           {name: dev score} of the best checkpoint and of the means of weights
    chosen, dev     the name in `tried` of the finished model, and its dev score
    test            its eight KorSTS-test scores

The tables also read measurements/: the printed comparisons (v2.txt), the cost of a training step
(training.json) and exported files beside OpenVINO (openvino.json).
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.command_line import UserError, form_of, read_json
from common.results import NOT_MEASURED

GROUPS = ("original", "v2", "ablation", "short", "nli", "other")
FIGURES = (
    "device", "threads", "precision", "steps", "startup_seconds", "training_wall_seconds",
    "training_cpu_seconds", "evaluation_wall_seconds", "evaluation_cpu_seconds",
    "total_wall_seconds", "peak_memory_mb", "weights",
)  # fmt: skip
KEYS = (
    "run", "group", "source", "read_from", "command", "options", "seed", "save_steps", "git_commit",
    "started", "finished", "data", "versions", *FIGURES, "before_training", "evaluations", "tried",
    "chosen", "dev", "test",
)  # fmt: skip
JOINED = ("--train_file", "--train_files")  # options whose values add up
LOG_COLUMNS = {  # name: how it is aligned
    "Date": "---", "Commit": "---", "Run": "---", "Seed": "---:", "Threads": "---:",
    "Processor": "---", "Precision": "---", "Steps": "---:", "Training CPU s": "---:",
    "Evaluation CPU s": "---:", "Whole run s": "---:", "Dev by evaluation": "---",
    "Chosen": "---", "Dev": "---:", "Test": "---:",
}  # fmt: skip

# The rows of the README's tables, by run. The original's own run stands beside ours of its seed,
# whose model results/e5-small-ko-sts.json scores with an interval.
ORIGINAL, OURS, OURS_RESULT = "original-2.7-777", "cosine-777", "e5-small-ko-sts"
WHOLE = "quick-v2"
ABLATION = {
    WHOLE: "그대로",
    "quick-cosine": "`--loss cosine` (Pearson 대신 원본의 손실)",
    "quick-no-prompt": "`--prompt` 없이",
    "quick-260": "`--hidden_dropout` 0.1 (인코더의 값; 시작 가중치 0.2, 평균 6개)",
    "quick-attention-dropout": "`--attention_dropout` 0.1 (인코더의 값)",
    "quick-fp32": "`--precision fp32`",
    "quick-batch-8": "`--batch_size 8` (1,040스텝, 같은 쌍 수)",
    "quick-learning-rate": "`--learning_rate 2e-5` (원본의 값)",
}
STEPS = {
    "old": "sentence-transformers 2.7",
    "new": "이 저장소",
    "new without dropout": "이 저장소, 드롭아웃 없이",
    "matrix products": "행렬 곱만",
}
RUNTIMES = {
    "SentenceTransformer fp32": "SentenceTransformer fp32",
    "onnxruntime fp32": "이 저장소의 파일, fp32",
    "OpenVINO fp32": "OpenVINO fp32",
    "OpenVINO default precision": "OpenVINO, 기본 정밀도",
    "onnxruntime int8": "이 저장소의 파일, int8",
    "OpenVINO int8": "OpenVINO int8",
}


# --- Rows ------------------------------------------------------------------------------------


def read_rows(results_dir: Path) -> dict[str, dict]:
    """Returns the log's rows by run, read ones first, then the oldest first."""
    rows = []
    for path in sorted((results_dir / "experiments").glob("*.json")):
        with form_of(path, "no row of the log of training runs"):
            row = read_json(path)
            missing = [key for key in KEYS if key not in row]
            if missing or row["group"] not in GROUPS or row["run"] != path.stem:
                raise ValueError
        rows.append(row)
    rows.sort(key=lambda row: (row["started"] or "", row["run"]))
    return {row["run"]: row for row in rows}


def without_repeats(arguments: Iterable[str], leave_out: Sequence[str] = ()) -> list[str]:
    """Returns a command line with each option once, as argparse takes it.

    With its last values; `JOINED` ones with all of them.

    Args:
        arguments: the interpreter, the script, its options.
        leave_out: options that are not wanted at all.
    """
    head: list[str] = []
    options: dict[str, list[str]] = {}
    values = head
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            values = options[name] = options.get(name, []) if name in JOINED else []
            values += [value] * bool(equals)
        else:
            values.append(argument)
    kept = [[name, *values] for name, values in options.items() if name not in leave_out]
    return [*head, *(part for option in kept for part in option)]


# --- Comparisons -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `benchmark.py --compare` printed of cosine Spearman; texts as printed, x100.

    Attributes:
        sides: the runs of A and of B.
        leave_out: what --leave_out says, or None.
        pairs_left_out: how many pairs it left out.
        a, b, difference: the scores.
        a_interval, b_interval, interval: their ends.
    """

    sides: tuple[list[str], list[str]]
    leave_out: str | None
    pairs_left_out: int
    a: str
    b: str
    difference: str
    a_interval: str
    b_interval: str
    interval: tuple[str, str]

    @property
    def is_shown(self) -> bool:
        """Whether the interval of the difference leaves 0 out."""
        low, high = map(float, self.interval)
        return low > 0 or high < 0


def read_comparisons(path: Path) -> list[Comparison]:
    """Returns the comparisons in a file of commands (`$ python benchmark.py ...`) and outputs."""
    if not path.is_file():
        return []
    found = []
    with form_of(path, "damaged: not UTF-8"):
        text = path.read_text(encoding="utf-8")
    for block in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, output = block.partition("\n")
        sides = re.search(r" --compare (\S+) (\S+)(?: --leave_out (\S+))?$", command)
        score = r"([-+]?\d+\.\d+)"
        row = re.search(f"^cosine_spearman +{' +'.join([score] * 4)} to {score}$", output, re.M)
        ends = re.findall(r"^[AB]: cosine Spearman \S+ (\[.+\])$", output, re.M)
        if sides is None or row is None or len(ends) != 2:
            raise UserError(f"{path}: no output of benchmark.py --compare: {command}")
        left_out = re.search(r"^left out, .*: ([\d,]+) pairs$", output, re.M)
        found.append(
            Comparison(
                sides=(sides[1].split(","), sides[2].split(",")),
                leave_out=sides[3],
                pairs_left_out=int(left_out[1].replace(",", "")) if left_out else 0,
                a=row[1],
                b=row[2],
                difference=row[3],
                a_interval=ends[0],
                b_interval=ends[1],
                interval=(row[4].lstrip("+"), row[5].lstrip("+")),
            )
        )
    return found


# --- Tables ----------------------------------------------------------------------------------


def table(columns: dict[str, str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; columns are {header: how it is aligned}."""
    lines = [columns.keys(), columns.values(), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _score(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _dev_scores(row: dict) -> list[str]:
    return [*map(_score, [row["before_training"], *row["evaluations"].values()])]


def _test_score(row: dict) -> str:
    return _score((row["test"] or {}).get("cosine_spearman"))


def whole_run_seconds(row: dict) -> float | None:
    """Returns the wall time of the process; of old rows from `started` on, imports left out."""
    if row["total_wall_seconds"] is not None or not row["finished"]:
        return row["total_wall_seconds"]
    start, end = map(datetime.datetime.fromisoformat, (row["started"], row["finished"]))
    return (end - start).total_seconds()


def log_row(row: dict) -> list[str]:
    """Returns a run's cells in the log, in the order of `LOG_COLUMNS`."""
    is_read = row["source"] == "read"
    unfinished = not (row["finished"] or is_read)
    return [
        (row["started"] or "")[:10],
        (row["git_commit"] or "")[:7],
        f"{row['run']} (read)" if is_read else row["run"],
        str(row["seed"]),
        _count(row["threads"]),
        row["device"] or "",
        row["precision"] or "",
        _count(row["steps"]),
        "not finished" if unfinished else _count(row["training_cpu_seconds"]),
        _count(row["evaluation_cpu_seconds"]),
        _count(whole_run_seconds(row)),
        " ".join(filter(None, _dev_scores(row))),
        row["chosen"] or "",
        _score(row["dev"]),
        _test_score(row),
    ]


def shown_command(row: dict) -> str:
    """Returns a run's command; --save_steps that is known from elsewhere stands at its end."""
    options = shlex.split(row["command"])
    if row["save_steps"] is not None and "--save_steps" not in options:
        options += ["--save_steps", str(row["save_steps"])]
    return shlex.join(options)


def log_part(rows: Sequence[dict], comparisons: Iterable[Comparison]) -> str:
    """Returns a group's table; below it comparisons, commands, and what comes from elsewhere."""
    if not rows:
        return "Not measured yet."
    commands: dict[str, list[str]] = {}
    sources: dict[str, list[str]] = {}
    for row in rows:
        if row["command"]:
            commands.setdefault(f"`{shown_command(row)}`", []).append(row["run"])
        for what, where in row["read_from"].items():
            sources.setdefault(f"{what} from {where}", []).append(row["run"])
    lines = [table(LOG_COLUMNS, map(log_row, rows)), ""]
    for each in comparisons:
        seen = {
            None: "",
            "pairs": f", without {each.pairs_left_out} pairs that are in train or dev",
            "sentences": f", without {each.pairs_left_out} pairs with a sentence of train or dev",
        }[each.leave_out]
        a, b = (", ".join(side) for side in each.sides)
        lines.append(
            f"- Test{seen}: {each.a} {each.a_interval} ({a}) and {each.b} {each.b_interval} ({b}), "
            f"difference {each.difference} [{', '.join(each.interval)}]"
        )
    lines += [f"- {', '.join(runs)}: {command}" for command, runs in commands.items()]
    lines += [f"- {', '.join(runs)}, read: {source}" for source, runs in sources.items()]
    return "\n".join(lines)


def original_part(rows: dict[str, dict], results_dir: Path) -> str:
    """Returns the table of the original's run and ours of the same seed, epoch by epoch."""
    if not {ORIGINAL, OURS} <= rows.keys():
        return NOT_MEASURED
    result = read_json(results_dir / f"{OURS_RESULT}.json")
    low, high = result["intervals"]["cosine_spearman"]
    cells = []
    for name, run, ends in (
        ("원본 스크립트", ORIGINAL, ""),
        ("이 저장소", OURS, f" [{_score(low)}, {_score(high)}]"),
    ):
        row = rows[run]
        version = ".".join(row["versions"]["sentence-transformers"].split(".")[:2])
        best = _score(row["dev"]) or None
        scores = [f"**{text}**" if text == best else text for text in _dev_scores(row)]
        label = f"{name} (sentence-transformers {version})"
        cells.append([label, *scores, _test_score(row) + ends])
    epochs = range(2, 1 + len(rows[OURS]["evaluations"]))
    names = ["dev 학습 전", "1에포크", *map(str, epochs), "KorSTS-test"]
    return table({"코사인 Spearman x100": "---"} | dict.fromkeys(names, "---:"), cells)


def v2_part(rows: dict[str, dict], comparisons: list[Comparison]) -> str:
    """Returns the table of v2 beside the original: seeds, means, paired differences."""
    if not comparisons or not {run for side in comparisons[0].sides for run in side} <= rows.keys():
        return NOT_MEASURED
    whole = comparisons[0]
    v2, original = ([rows[run] for run in side] for side in whole.sides)

    def side(label: str, seeds: list[dict], mean: str, ends: str, is_best: bool) -> list[str]:
        usual = min(row["threads"] for row in seeds)
        seconds = [
            _count(row["training_cpu_seconds"])
            + (f" (스레드 {row['threads']}개)" if row["threads"] != usual else "")
            for row in seeds
        ]
        mean = f"**{mean}**" if is_best else mean
        return [
            label,
            ", ".join(_score(row["dev"]) for row in seeds),
            ", ".join(map(_test_score, seeds)),
            f"{mean} {ends}",
            ", ".join(seconds),
        ]

    v2_wins = whole.is_shown and float(whole.difference) > 0
    original_wins = whole.is_shown and not v2_wins
    script = "원본: `python training_sts.py`"
    cells = [
        side(script, original, whole.b, whole.b_interval, original_wins),
        side("v2: 아래 첫 명령", v2, whole.a, whole.a_interval, v2_wins),
    ]
    for each in comparisons:
        label = {
            None: "짝지은 95% 구간",
            "pairs": f"train이나 dev에도 있는 {each.pairs_left_out}쌍을 빼고",
            "sentences": f"train이나 dev의 문장이 든 {each.pairs_left_out}쌍을 빼고",
        }[each.leave_out]
        difference = f"**{each.difference}**" if each.is_shown else each.difference
        cells.append([f"차이, {label}", "", "", f"{difference} [{', '.join(each.interval)}]", ""])
    columns = {"코사인 Spearman x100": "---", "dev (시드별)": "---", "KorSTS-test (시드별)": "---"}
    columns |= {"KorSTS-test (시드 평균)": "---:", "학습 루프 CPU초 (시드별)": "---"}
    return table(columns, cells)


def ablation_part(rows: dict[str, dict]) -> str:
    """Returns the table of the runs that lack one thing each.

    What dev would have chosen without the means of weights is known from what it tried.
    """
    cells = [
        [label, _score(rows[run]["dev"]), _count(rows[run]["training_cpu_seconds"])]
        for run, label in ABLATION.items()
        if run in rows
    ]
    whole = rows.get(WHOLE)
    if whole and whole["tried"]:
        for label, is_without in (
            ("`--start_weight` 없이", lambda name: not name.endswith(" of the start")),
            ("`--average_checkpoints` 없이", lambda name: not name.startswith("mean of ")),
        ):
            best = max(score for name, score in whole["tried"].items() if is_without(name))
            cells.append([label, _score(best), _count(whole["training_cpu_seconds"])])
    columns = {"v2, 260스텝": "---", "dev": "---:", "학습 루프 CPU초": "---:"}
    return table(columns, cells) if cells else NOT_MEASURED


def training_part(path: Path) -> str:
    """Returns the table of what a training step costs, from measure_training.py's report."""
    if not path.is_file():
        return NOT_MEASURED
    with form_of(path, "no report of measure_training.py"):
        report, cells = read_json(path), []
        for size in report["steps"]:
            old = report["medians"][f"old, batch {size}"]["cpu_seconds_per_step"]
            for way, label in STEPS.items():
                median = report["medians"][f"{way}, batch {size}"]
                cpu = median["cpu_seconds_per_step"]
                ratio = "" if way == "old" else f" ({cpu / old:.2f}x)"
                figures = [f"{cpu:.2f}{ratio}", f"{median['wall_seconds_per_step']:.2f}"]
                figures.append(_count(median.get("peak_memory_mb")))
                if way == "new":
                    figures = [f"**{figure}**" for figure in figures]
                cells.append([f"배치 {size}, {label}", *figures])
        names = ("CPU초", "경과 시간(초)", "최대 메모리 MB")
        return table({"한 스텝": "---"} | dict.fromkeys(names, "---:"), cells)


def openvino_part(path: Path) -> str:
    """Returns the table of exported files beside OpenVINO, from measure_openvino.py's report."""
    if not path.is_file():
        return NOT_MEASURED
    with form_of(path, "no report of measure_openvino.py"):
        medians = read_json(path)["sentences_per_second"]
        first, *_ = medians.values()
        cells = [
            [
                RUNTIMES[name],
                *(f"{value:,.0f} ({value / first[key]:.1f}x)" for key, value in row.items()),
            ]
            for name, row in medians.items()
        ]
        return table({"문장/초": "---", "배치 32": "---:", "배치 1": "---:"}, cells)


def generated_parts(results_dir: Path, measurements: Path) -> dict[str, str]:
    """Returns the parts of Markdown pages that come from the log and from measurements/."""
    rows = read_rows(results_dir)
    comparisons = read_comparisons(measurements / "v2.txt")

    def group_of(comparison: Comparison) -> str | None:
        return rows.get(comparison.sides[0][0], {}).get("group")

    parts = {
        "original": original_part(rows, results_dir),
        "v2": v2_part(rows, [each for each in comparisons if group_of(each) == "v2"]),
        "ablation": ablation_part(rows),
        "training": training_part(measurements / "training.json"),
        "openvino": openvino_part(measurements / "openvino.json"),
        "openvino-avx2": openvino_part(measurements / "openvino-avx2.json"),
    }
    for group in GROUPS:
        parts[f"log-{group}"] = log_part(
            [row for row in rows.values() if row["group"] == group],
            (each for each in comparisons if group_of(each) == group),
        )
    return parts
