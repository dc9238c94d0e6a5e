"""What whole training runs cost and give: measurements/whole_run.json, and the first page's tables.

The file is an object with a list `runs`, each of them one run from the start of its process to its
end, everything counted (imports, dev scores, checkpoints, means of weights, test):

    name                    the recipe: "original" (its own script), "v2 short, fp32", ...
    seed                    int
    points                  [{cpu_seconds, dev_cosine_spearman_x100}]: each dev score that was
                            taken, and the CPU seconds of the process until then
    whole_wall_seconds, whole_cpu_seconds
    peak_memory_mb          may be missing or null
    dev, test               cosine Spearman x100 of the finished model; test may be null

CPU seconds are those of all cores together.

measurements/size.json has what they would cost at klue/roberta-base's size: an object with what
measurements/size.py found on a `cpu` and on a `gpu`, each with machine, threads and rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from common.command_line import form_of, read_json
from common.experiment_log import Comparison, table
from common.results import NOT_MEASURED

ORIGINAL = "original"
PICTURE = "score_by_cost.png"
KOREAN = {ORIGINAL: "원본 스크립트", "v2 short": "짧은 v2", "v2 one epoch": "v2 한 에포크"}
SIZE_RECIPES = {
    "sts": "STS",
    "nli": "NLI",
    "multi-task": "멀티태스크",
    "v2 sts": "`ko-sroberta-v2`의 STS 단계",
}
BASE_ENCODER, OFFLINE_ENCODER = "klue/roberta-base, 110M", "e5-small-ko, 30M"
# The published rows of the first table, and what they were trained on.
PUBLISHED = {
    "jhgan/ko-sroberta-multitask": "KorNLI, KorSTS",
    "jhgan/ko-sroberta-sts": "KorSTS",
}


def read_whole_runs(path: Path) -> list[dict]:
    """Returns the runs of whole_run.json by name, the original's first; none where there is none.

    Raises:
        UserError: the file is not of the form that the top of this file says.
    """
    if not path.is_file():
        return []
    with form_of(path, "no report of whole runs"):
        runs = read_json(path)["runs"]
        for run in runs:
            points = [
                (point["cpu_seconds"], point["dev_cosine_spearman_x100"]) for point in run["points"]
            ]
            seconds = [cpu for cpu, _ in points]
            scores = [*(score for _, score in points), run["dev"]]
            scores += [run["test"]] * (run["test"] is not None)
            run["seed"], run["whole_wall_seconds"]
            in_order = seconds == sorted(seconds) and seconds[-1] <= run["whole_cpu_seconds"]
            # A score below 1 was not multiplied by 100.
            if not in_order or any(not 1 < score <= 100 for score in scores):
                raise ValueError
        return sorted(runs, key=lambda run: (run["name"] != ORIGINAL, run["name"], run["seed"]))


def by_name(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Returns the runs of each name, in their order."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["name"], []).append(run)
    return groups


def korean_name(name: str) -> str:
    """Returns a run's name as Korean pages have it."""
    start, comma, rest = name.partition(", ")
    return KOREAN.get(start, start) + comma + rest


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}"


def cost_part(runs: Sequence[dict]) -> str:
    """Returns the table of whole runs: scores by seed, medians of what they cost."""
    if not runs:
        return NOT_MEASURED
    groups = by_name(runs)
    with_memory = any(run.get("peak_memory_mb") for run in runs)
    cells = []
    for name, seeds in groups.items():
        cpu = median(run["whole_cpu_seconds"] for run in seeds)
        ratio = ""
        if name != ORIGINAL and ORIGINAL in groups:
            original = median(run["whole_cpu_seconds"] for run in groups[ORIGINAL])
            ratio = f" ({cpu / original:.2f}x)"
        tests = [run["test"] for run in seeds if run["test"] is not None]
        row = [
            korean_name(name),
            ", ".join(str(run["seed"]) for run in seeds),
            ", ".join(f"{run['dev']:.2f}" for run in seeds),
            ", ".join(f"{test:.2f}" for test in tests),
            f"{cpu:,.0f}{ratio}",
            f"{median(run['whole_wall_seconds'] for run in seeds):,.0f}",
        ]
        if with_memory:
            memory = [run["peak_memory_mb"] for run in seeds if run.get("peak_memory_mb")]
            row.append(f"{max(memory):,.0f}" if memory else "")
        cells.append(row)
    columns = {"전체 실행": "---", "시드": "---", "dev": "---", "KorSTS-test": "---"}
    columns |= {"CPU초 (중앙값)": "---:", "경과 시간(초, 중앙값)": "---:"}
    if with_memory:
        columns["최대 메모리 MB"] = "---:"
    return table(columns, cells)


def picture_part(runs: Sequence[dict]) -> str:
    """Returns the picture's line for the page at the top, or nothing where no run was measured."""
    if not runs:
        return ""
    alt = "실행 전체의 CPU초와 dev 코사인 Spearman: 원본 스크립트와 v2"
    return f'<img src="results/{PICTURE}" alt="{alt}" width="640">'


def first_part(
    results: Sequence[dict], comparisons: Sequence[Comparison], runs: Sequence[dict]
) -> str:
    """Returns the first table: the best published rows, and what was measured here.

    Args:
        results: as `results.read_results` gives them.
        comparisons: of v2 (A) with the original's recipe (B), the one of all pairs first.
        runs: whole runs; all but the original's are shown.
    """
    published = {row["name"]: row for row in results if row["source"] == "published"}
    cells = [
        [
            f"`{name.partition('/')[2]}` (발표된 값)",
            BASE_ENCODER,
            data,
            f"{100 * published[name]['scores']['cosine_spearman']:.2f}",
        ]
        for name, data in PUBLISHED.items()
        if name in published
    ]
    if comparisons:
        whole = comparisons[0]
        for label, seeds, score, ends in (
            ("원본의 STS 학습법", whole.sides[1], whole.b, whole.b_interval),
            ("v2", whole.sides[0], whole.a, whole.a_interval),
        ):
            label += f" (시드 {len(seeds)}개 평균)"
            cells.append([label, OFFLINE_ENCODER, "KorSTS", f"{score} {ends}"])
    for name, seeds in by_name(runs).items():
        tests = [run["test"] for run in seeds if run["test"] is not None]
        if name != ORIGINAL and tests:
            how_many = f"시드 {len(tests)}개 평균" if len(tests) > 1 else "시드 하나"
            label = f"{korean_name(name)} ({how_many})"
            cells.append([label, OFFLINE_ENCODER, "KorSTS", _mean(tests)])
    columns = {"모델, 학습법": "---", "인코더, 파라미터": "---", "학습 데이터": "---"}
    return table(columns | {"KorSTS-test": "---:"}, cells) if cells else NOT_MEASURED


def size_part(path: Path) -> str:
    """Returns the table of size.json: recipes by precision, on a GPU and on a CPU.

    A line below it names what was not measured on a GPU.
    """
    with form_of(path, "no report of size.py"):
        report, cells = read_json(path) if path.is_file() else {}, []
        missing: dict[str, list[str]] = {}  # of each recipe, the precisions
        for kind, precisions in (("gpu", ("fp32", "tf32", "bf16")), ("cpu", ("fp32", "bf16"))):
            side = report.get(kind, {"rows": {}})
            machine = (
                f"{side['machine']}, 스레드 {side['threads']}개" if side["rows"] else kind.upper()
            )
            memory = "peak_gpu_memory_mb" if kind == "gpu" else "peak_memory_mb"
            for recipe, precision in itertools.product(SIZE_RECIPES, precisions):
                name = f"{recipe}, {precision}"
                label = [machine, SIZE_RECIPES[recipe], precision]
                if row := side["rows"].get(name):
                    figures = [f"{row['hours_of_the_whole_recipe']:,.2f}", f"{row[memory]:,}"]
                    cells.append([*label, *figures, f"{row['steps_a_second']:#,.3g}"])
                elif kind == "gpu":
                    missing.setdefault(SIZE_RECIPES[recipe], []).append(precision)
                if row := side["rows"].get(f"{name}, library"):
                    label[1] += ", 라이브러리만"
                    cells.append([*label, "", f"{row[memory]:,}", f"{row['steps_a_second']:#,.3g}"])
        columns = {"장치": "---", "레시피": "---", "정밀도": "---", "전체 시간(시간)": "---:"}
        found = table(columns | {"최대 메모리 MB": "---:", "스텝/초": "---:"}, cells)
        names = ", ".join(f"{name}({', '.join(each)})" for name, each in missing.items())
        return f"{found}\n\nGPU에서 측정하지 않음: {names}." if names else found


def int8_part(path: Path) -> str:
    """Returns the table of what int8 loses, from measurements/int8.json."""
    if not path.is_file():
        return NOT_MEASURED
    with form_of(path, "no report of measure_int8.py"):
        cells = []
        for row in read_json(path)["rows"]:
            cells.append(
                [row["name"], f"{100 * row['size_ratio']:.1f}%", row["float32_layers"] or "-"]
            )
            for part in (row["dev"], row["test"]):
                low, high = part["lost_interval"]
                cells[-1] += [f"{part['fp32']:.2f}", f"{part['lost']:.2f} [{low:.2f}, {high:.2f}]"]
        columns = {"모델": "---", "크기": "---:", "float32 층": "---"}
        columns |= {"dev fp32": "---:", "dev 손실": "---:", "KorSTS-test fp32": "---:"}
        return table(columns | {"KorSTS-test 손실 [95%]": "---:"}, cells)


def generated_parts(
    path: Path, results: Sequence[dict], comparisons: Sequence[Comparison]
) -> dict[str, str]:
    """Returns the parts of Markdown pages that come from whole_run.json and the files beside it."""
    runs = read_whole_runs(path)
    return {
        "first": first_part(results, comparisons, runs),
        "cost": cost_part(runs),
        "size": size_part(path.with_name("size.json")),
        "int8": int8_part(path.with_name("int8.json")),
        "cost-picture": picture_part(runs),
    }
