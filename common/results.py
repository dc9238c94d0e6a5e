"""Result files, their tables, and the generated parts of Markdown files.

Each model gets one file in results/: NAME.json with slashes as `--`; NAME.int8.json or
NAME.binary.json for quantised embeddings, NAME.klue-sts.json for the other data set, and
NAME.published.json for a result that was read, not measured. Keys:

    name, link      the row's name; its page on the Hub, or null for a local model
    source          "measured" or "published"
    published_in    address where a published result was read
    dataset         "korsts" (test) or "klue-sts" (dev)
    scores          cosine_pearson, cosine_spearman, euclidean_..., manhattan_..., dot_...: -1 to 1
                    at full precision; for klue-sts also f1 (positive from 5 x cosine >= 3.0 on),
                    which no table shows: where all cosines are above 0.6, as those of E5, it is the
                    same for every model
    dims            {dimension: {scores, intervals}} of a Matryoshka model's slices
and where it was measured
    intervals       for each score, the ends of its 95% bootstrap interval over the pairs
    data            file, blob_id (git's), published (is it the published file), rows,
                    distinct_sentences
    model           revision (the Hub's commit, or null), weights {file: sha256}, size_bytes,
                    parameters (null for ONNX), dimension, max_seq_length, pooling, pooling_added
                    (true: a plain encoder, here given that pooling)
    prompt, embedding_precision, precision (of the computation), device, threads
    sentences_per_second    distinct sentences, tokenising included, loading left out
    versions, date (UTC), command (paths cut to their last part)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

from common.command_line import UserError, form_of, read_json, write_json, write_text
from common.evaluation import SCORE_KEYS

COSINE_KEYS = ("cosine_pearson", "cosine_spearman")
MEASURED_KEYS = ("intervals", "model", "data", "prompt", "embedding_precision", "device", "threads")
NOT_MEASURED = "아직 측정하지 않았습니다."
# Markdown pages speak Korean. What the benchmark prints is English, and these are its words.
KOREAN = {
    "Model": "모델",
    "Cosine": "코사인",
    "Euclidean": "유클리드",
    "Manhattan": "맨해튼",
    "Dot": "내적",
    "95% interval": "95% 구간",
    "pooling added": "pooling 추가",
    "prompt": "프롬프트",
    "embeddings": "임베딩",
}
# The original's models are named ko-ENCODER-TASK, and those with Matryoshka dims end in -mrl.
ENCODERS = {"sroberta": "klue/roberta-base", "sbert": "klue/bert-base"}
SCRIPTS = {
    "multitask": "training_multi-task.py",
    "nli": "training_nli.py",
    "sts": "training_sts.py",
}
MATRYOSHKA = " --matryoshka_dims 768,512,256,128,64,32"
ONNX_HEADER = "| 파일 | MB | 문장/초, 배치 32 | 배치 1 | 첫 임베딩(초) | KorSTS-test | 손실 [95%] |"


# --- Result files ----------------------------------------------------------------------------


def result_file(results_dir: Path, result: dict) -> Path:
    """Returns where a result goes: see the top of this file."""
    parts = [result["name"].replace("/", "--"), result["embedding_precision"], result["dataset"]]
    name = ".".join([parts[0], *(part for part in parts[1:] if part not in ("float32", "korsts"))])
    return results_dir / f"{name}.json"


def check_file(results_dir: Path, result: dict) -> None:
    """Raises `UserError` where the file of a result holds another one's, or none.

    Says on stderr that it holds one of other weights: trained again, they take its place.

    Args:
        result: name, embedding_precision, dataset and model of what is to be measured.
    """
    path = result_file(results_dir, result)
    if not path.is_file():
        return
    with form_of(path, "no result of benchmark.py"):
        before = read_json(path)
        if any(before[key] != result[key] for key in ("name", "embedding_precision", "dataset")):
            raise UserError(
                f"{path}: holds the {before['embedding_precision']} result of {before['name']}: "
                f"give this {result['name']} another --name, or remove the file"
            )
        if before["model"]["weights"] != result["model"]["weights"]:
            print(f"note: {path}: is of other weights: replaced", file=sys.stderr)


def write_result(results_dir: Path, result: dict) -> None:
    """Writes a measured result."""
    write_json(result_file(results_dir, result), result)


def read_results(results_dir: Path) -> list[dict]:
    """Reads the results of a folder, best cosine Spearman first.

    Measured ones count where the data was the published file, so that a stand-in never does.
    """
    results = []
    for path in sorted(results_dir.glob("*.json")):
        with form_of(path, "no result of benchmark.py"):
            result = read_json(path)
            is_published, scores = result["source"] == "published", result["scores"]
            for key in SCORE_KEYS if result["dataset"] == "korsts" else COSINE_KEYS:
                scores[key]
            result["name"], result["link"], -scores["cosine_spearman"]
            for key in MEASURED_KEYS if not is_published else ("published_in",):
                result[key]
            for dim, part in result.get("dims", {}).items():
                int(dim), part["scores"]["cosine_spearman"]
            if not is_published:
                result["intervals"]["cosine_spearman"]
                result["model"]["size_bytes"], result["model"]["pooling_added"]
            if is_published or result["data"]["published"] is not False:
                results.append(result)
    return sorted(results, key=lambda row: (-row["scores"]["cosine_spearman"], row["name"]))


def nearest_published(results_dir: Path, score: float, count: int = 3) -> list[tuple[str, float]]:
    """Returns (name, cosine Spearman) of the published KorSTS results nearest to a score."""
    rows = []
    for path in sorted(results_dir.glob("*.published.json")):
        with form_of(path, "no result of benchmark.py"):
            row = read_json(path)
            if row["dataset"] == "korsts":
                rows.append((row["name"], float(row["scores"]["cosine_spearman"])))
    nearest = sorted(rows, key=lambda row: (abs(row[1] - score), row[0]))[:count]
    return sorted(nearest, key=lambda row: -row[1])


# --- Tables ----------------------------------------------------------------------------------


def _word(english: str, korean: bool) -> str:
    return KOREAN[english] if korean else english


def label(result: dict, korean: bool = False) -> str:
    """Returns the row's name, linked, with what sets it apart from the model as it comes."""
    remarks = []
    if result["source"] == "measured":
        if result["model"]["pooling_added"]:
            pooling = result["model"].get("pooling", "mean")
            remarks += [f"{pooling} {_word('pooling added', korean)}"]
        prompt, precision = result["prompt"], result["embedding_precision"]
        remarks += [f"{_word('prompt', korean)} `{prompt}`"] * bool(prompt)
        remarks += [f"{precision} {_word('embeddings', korean)}"] * (precision != "float32")
    name = f"[{result['name']}]({result['link']})" if result["link"] else result["name"]
    return f"{name} ({', '.join(remarks)})" if remarks else name


def markdown_table(
    results: list[dict], columns: dict[str, list[float | str | None]], korean: bool = False
) -> str:
    """Returns a table of results: numbers are scores, shown x100, the best of a column bold."""
    shown = [[label(result, korean) for result in results]]
    for values in columns.values():
        texts = [
            f"{100 * value:.2f}" if isinstance(value, float) else value or "" for value in values
        ]
        scores = [
            float(text) for text, v in zip(texts, values, strict=True) if isinstance(v, float)
        ]
        best = f"{max(scores):.2f}" if len(scores) > 1 else None
        shown.append([f"**{text}**" if text == best else text for text in texts])
    rows = [[_word("Model", korean), *columns], ["---", *["---:"] * len(columns)]]
    rows += zip(*shown, strict=True)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def score_table(
    results: list[dict], korean: bool = False, keys: tuple[str, ...] | None = None
) -> str:
    """Returns the table of scores; where they were measured with interval and size.

    Pages leave the speed out: rows that were measured on different days do not compare.
    """
    measured = results[0]["source"] == "measured"
    keys = keys or (SCORE_KEYS if results[0]["dataset"] == "korsts" else COSINE_KEYS)
    columns: dict[str, list] = {}
    for key in keys:
        similarity, _, coefficient = key.title().partition("_")
        name = f"{_word(similarity, korean)} {coefficient}"
        columns[name] = [row["scores"][key] for row in results]
        if measured and key == "cosine_spearman":
            form = "[{:.2f}, {:.2f}]" if korean else "{:.2f} to {:.2f}"
            ends = [100 * np.array(row["intervals"][key]) for row in results]
            columns[_word("95% interval", korean)] = [form.format(*pair) for pair in ends]
    if measured and not korean:
        columns["Sentences/s"] = [f"{row['sentences_per_second']:.0f}" for row in results]
    if measured:
        columns["MB"] = [f"{row['model']['size_bytes'] / 1e6:.0f}" for row in results]
    return markdown_table(results, columns, korean)


def dims_table(results: list[dict], korean: bool = False) -> str:
    """Returns the table of cosine Spearman by dimension."""
    dims = sorted({int(dim) for row in results for dim in row["dims"]}, reverse=True)
    columns = {
        str(dim): [
            row["dims"].get(str(dim), {}).get("scores", {}).get("cosine_spearman")
            for row in results
        ]
        for dim in dims
    }
    return markdown_table(results, columns, korean)


def two_corpora_table(results: list[dict]) -> str:
    """Returns the table of measured models: cosine Spearman on both corpora, with intervals."""
    cells: dict[str, dict[str, str]] = {}
    for row in results:
        low, high = (100 * end for end in row["intervals"]["cosine_spearman"])
        text = f"{100 * row['scores']['cosine_spearman']:.2f} [{low:.2f}, {high:.2f}]"
        cells.setdefault(label(row, korean=True), {})[row["dataset"]] = text
    lines = ["| 모델 | KorSTS-test | KLUE-STS dev |", "| --- | ---: | ---: |"]
    for name, texts in cells.items():
        lines.append(f"| {name} | {texts.get('korsts', '')} | {texts.get('klue-sts', '')} |")
    return "\n".join(lines)


def recipe_of(name: str) -> tuple[str, str] | None:
    """Returns the recipe of a published model of the original, and the command that trains it."""
    found = re.fullmatch(r"jhgan/(ko-(\w+)-(multitask|nli|sts)(-mrl)?)", name)
    if found is None or found[2] not in ENCODERS:
        return None
    command = f"python {SCRIPTS[found[3]]} --model_name_or_path {ENCODERS[found[2]]}"
    return found[1], command + MATRYOSHKA * bool(found[4])


def recipe_table(published: list[dict]) -> str:
    """Returns the table of the published models: recipe, command, cosine Spearman."""
    lines = [
        "| `bash train.sh` 뒤에 | 같은 일을 하는 명령 | KorSTS-test (발표) |",
        "| --- | --- | ---: |",
    ]
    for row in published:
        recipe, command = recipe_of(row["name"])
        lines.append(f"| `{recipe}` | `{command}` | {100 * row['scores']['cosine_spearman']:.2f} |")
    return "\n".join(lines)


def tables(results: list[dict]) -> dict[str, str]:
    """Returns the generated parts of the pages by marker; published and measured stay apart."""
    names = ("recipes", "measured", "all", "matryoshka", "klue-sts")
    parts: dict[str, list[str]] = {name: [] for name in names}
    for source, name in (("published", "발표된 값"), ("measured", "여기서 측정한 값")):
        rows = [row for row in results if row["source"] == source and row["dataset"] == "korsts"]
        if not rows:
            continue
        origin = {
            row.get("published_in") or f"{row['device']}, 스레드 {row['threads']}개" for row in rows
        }
        title = f"{name} ({'; '.join(sorted(origin))})"
        intervals = ", 구간은 테스트 문장 쌍의 부트스트랩" if source == "measured" else ""
        parts["all"] += [
            f"{title}, KorSTS-test x100{intervals}:",
            score_table(rows, korean=True),
        ]
        if source == "published" and (recipes := [row for row in rows if recipe_of(row["name"])]):
            parts["recipes"] += [recipe_table(recipes)]
        if rows := [row for row in rows if "dims" in row]:
            parts["matryoshka"] += [
                f"{title}, 차원별 코사인 Spearman x100:",
                dims_table(rows, korean=True),
            ]
    if rows := [row for row in results if row["source"] == "measured"]:
        parts["measured"] += [two_corpora_table(rows)]
    if rows := [row for row in results if row["dataset"] == "klue-sts"]:
        parts["klue-sts"] += [score_table(rows, korean=True)]
    return {marker: "\n\n".join(texts or [NOT_MEASURED]) for marker, texts in parts.items()}


def onnx_table(rows: list[dict]) -> list[str]:
    """Returns the table of an export's measured files, line by line; scores x100."""
    lines = [ONNX_HEADER, "|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        speeds = []
        for key in ("sentences_per_second_32", "sentences_per_second_1"):
            speeds.append(f"{row[key]:,.0f} ({row[key] / rows[0][key]:.1f}x)")
        low, high = (100 * end for end in row["lost_interval"])
        lost = f"{100 * row['lost']:.2f} [{low:.2f}, {high:.2f}]"
        cells = [
            row["encoder"],
            f"{row['size_bytes'] / 1e6:.1f}",
            *speeds,
            f"{row['first_embedding_seconds']:.2f}",
            f"{100 * row['cosine_spearman']:.2f}",
            "-" if row is rows[0] else lost,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def onnx_part(results_dir: Path) -> str:
    """Returns the tables of results_dir/onnx/*.json, each behind its command and machine."""
    sections = []
    for path in sorted((results_dir / "onnx").glob("*.json")):
        with form_of(path, "no report of export_onnx.py"):
            result = read_json(path)
            result["model"]
            machine = ", ".join([result["machine"], *result["instruction_sets"]])
            versions = result["versions"]
            sections += [
                f"`{result['command']}`",
                f"({machine}, 스레드 {result['threads']}개, {result['date']}, "
                f"onnxruntime {versions['onnxruntime']}, torch {versions['torch']})",
                "",
                *onnx_table(result["rows"]),
                "",
            ]
    return "\n".join(sections).rstrip("\n") or NOT_MEASURED


# --- Markdown --------------------------------------------------------------------------------


def markdown_files(repository: Path) -> list[Path]:
    """Returns the repository's Markdown files that have generated parts."""
    patterns = ("*.md", "docs/*.md", "examples/*.md", "onnx/*.md", "results/*.md")
    files = sorted(path for pattern in patterns for path in repository.glob(pattern))
    return [path for path in files if b"<!-- results:" in path.read_bytes()]


def write_parts(file: Path, parts: dict[str, str]) -> None:
    """Writes each part between its `<!-- results:NAME -->` and `<!-- /results:NAME -->`.

    A file may hold any of the parts, each once.

    Raises:
        UserError: no such file, no marker in it, a marker of no part or not in its place.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    with form_of(file, "not UTF-8"):
        text = file.read_text(encoding="utf-8")
    names = sorted(set(re.findall(r"<!-- /?results:([\w-]+) -->", text)))
    if not names:
        raise UserError(f"{file}: no <!-- results:X --> ... <!-- /results:X --> in it")
    for name in names:
        if name not in parts:
            raise UserError(f"{file}: no part results:{name}; there are {', '.join(parts)}")
        start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        if not (text.count(start) == text.count(end) == 1 and text.index(start) < text.index(end)):
            raise UserError(f"{file}: should hold {start} ... {end} once")
        before, rest = text.split(start)
        text = f"{before}{start}\n{parts[name]}\n{end}{rest.split(end)[1]}"
    write_text(file, text)
