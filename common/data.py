"""Reads KorSTS, KorNLI and KLUE-STS into checked pandas tables, and builds NLI triplets.

`formats` reads all other forms of pairs and triplets.

KorSTS and KorNLI are the files of https://github.com/kakaobrain/KorNLUDatasets (CC BY-SA 4.0),
KLUE-STS is that of https://github.com/KLUE-benchmark/KLUE (CC BY-SA 4.0). Text is never touched:
quotes are text, and only the two ends of NLI sentences are stripped, as the original did.

A file that is not what it should be raises `UserError`, whose message holds one line
`file:line: what is wrong` for each of the first ten places.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.command_line import REPOSITORY, UserError, first_line, is_unicode

DATA_DIR = REPOSITORY / "KorNLUDatasets"
STS_COLUMNS = ("genre", "filename", "year", "id", "score", "sentence1", "sentence2")
NLI_COLUMNS = ("sentence1", "sentence2", "gold_label")
NLI_LABELS = ("entailment", "neutral", "contradiction")
NLI_TRAIN_FILES = ("KorNLI/multinli.train.ko.tsv", "KorNLI/snli_1.0_train.ko.tsv")
MAX_SCORE = 5.0
MAX_LEFT_OUT = 0.01  # of a KorNLI file's rows; more than that is a broken file, not odd rows
PLACES_SHOWN = 10

# Git blob ids at commit 0df0fe7d496eb61b092e022e238c2230b29f1cbc of KorNLUDatasets.
PUBLISHED_BLOB_IDS = {
    "multinli.train.ko.tsv": "94d26a9d0dd045928148ef8691a256bd0e7d45c3",
    "snli_1.0_train.ko.tsv": "c91761e52fca2a7420104589811346986ce94073",
    "xnli.dev.ko.tsv": "21305150d466aa35d42b14e1890b7dcd58084634",
    "xnli.test.ko.tsv": "89a0b11bffa775fafd88178b3980a1fe2d8aee52",
    "sts-dev.tsv": "3686d9394fa63bcfd6b1bc7c70a60b1dfe08d388",
    "sts-test.tsv": "d2a7c958d520ed84402c0042142a60d9a18ee3e4",
    "sts-train.tsv": "91fc16190dd0102a3cad2f0abf83317703438869",
}


def blob_id(path: Path) -> str:
    """Returns the id git gives the file's content: sha1 of `blob <size>`, a zero byte, content."""
    return _content_id(Path(path).read_bytes())


def _content_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def file_record(path: Path, rows: int, left_out: int = 0) -> dict[str, Any]:
    """Describes a data file for run.json, and says on stderr when it is not the published one.

    `published` is True or False for a file with a published name, None for any other.
    """
    path = Path(path)
    content, expected = path.read_bytes(), PUBLISHED_BLOB_IDS.get(path.name)
    identity = _content_id(content)
    # Git for Windows gives lines Windows' ends, which reading drops, and counts by its own.
    if expected not in (None, identity):
        unix = _content_id(content.replace(b"\r\n", b"\n"))
        identity = expected if unix == expected else identity
    published = None if expected is None else identity == expected
    if published is False:
        print(f"note: {path}: not the published file (git blob {identity[:12]})", file=sys.stderr)
    return {
        "file": path.name,
        "blob_id": identity,
        "published": published,
        "rows": rows,
        "rows_left_out": left_out,
    }


def is_korsts_test(file: str, records: Sequence[dict[str, Any]]) -> bool:
    """Tells whether a file, by its name among a run's records, is KorSTS-test as published."""
    return any(
        record["file"] == file == "sts-test.tsv" and record["published"] for record in records
    )


def read_bytes(path: Path) -> bytes:
    """Returns a file's content; raises `UserError` where it cannot be read or is empty."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if not content.strip():
        raise UserError(f"{path}: the file is empty")
    return content


def decode(content: bytes, path: Path) -> str:
    """Returns UTF-8 content as text, without a BOM; raises `UserError` where it is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        after_bom = error.object  # what error.start counts in
        line = after_bom.count(b"\n", 0, error.start) + 1
        bad = after_bom[error.start]
        raise UserError(f"{path}:{line}: byte 0x{bad:02x} is not UTF-8") from None


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """Returns the value of JSON text that begins at a line of a file; raises `UserError`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1}: not JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # thousands of brackets, or of digits
        raise UserError(f"{path}: not JSON: {error}") from None


def read_parquet(path: Path) -> pd.DataFrame:
    """Returns a Parquet file's columns; raises `UserError` for what is none."""
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's, too
        raise UserError(f"{path}: not Parquet: {first_line(error)}") from None


def places(path: Path, problems: pd.Series, unit: str = "") -> str:
    """Formats problems (index: number of the line, value: what is wrong) as at most ten lines.

    Args:
        unit: what is numbered where it is no line: `item` or `row`.
    """
    problems = problems.sort_index(kind="stable")
    where = f"{path}: {unit} " if unit else f"{path}:"
    shown = [f"{where}{number}: {text}" for number, text in problems.head(PLACES_SHOWN).items()]
    if len(problems) > PLACES_SHOWN:
        shown.append(f"{path}: {len(problems):,} problems in all, the first {PLACES_SHOWN} shown")
    return "\n".join(shown)


def _read_tsv(path: Path, columns: Sequence[str]) -> tuple[pd.DataFrame, pd.Series]:
    """Reads a TSV file without quoting.

    Returns the rows with the right number of fields (index: line number in the file, columns in
    any order in the file) and, for the other lines, what is wrong with each.
    """
    lines = [line.removesuffix("\r") for line in decode(read_bytes(path), path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:  # a BOM alone
        raise UserError(f"{path}: the file is empty")
    header = lines[0].split("\t")
    if missing := [column for column in columns if column not in header]:
        raise UserError(
            f"{path}:1: no column {', '.join(missing)}; the header should be {' '.join(columns)}"
        )
    if repeated := [column for column in columns if header.count(column) > 1]:
        raise UserError(f"{path}:1: column {', '.join(repeated)} more than once")
    if len(lines) == 1:
        raise UserError(f"{path}:1: a header and no rows")
    rows: dict[int, list[str]] = {}
    problems: dict[int, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) == len(header):
            rows[number] = fields
        else:
            problems[number] = f"{len(fields)} fields, not {len(header)}"
    frame = pd.DataFrame(rows.values(), index=list(rows), columns=header, dtype="str")
    return frame[list(columns)], pd.Series(problems, dtype="str")


def _is_blank(column: pd.Series) -> pd.Series:
    return column.str.strip() == ""


def read_korsts(path: str | Path) -> pd.DataFrame:
    """Reads a KorSTS file: columns sentence1, sentence2 (str) and score (float in [0, 1]).

    Scores of the file run from 0 to 5. Raises `UserError` for anything else than whole rows.
    """
    path = Path(path)
    frame, fields = _read_tsv(path, STS_COLUMNS)
    score = pd.to_numeric(frame["score"], errors="coerce")
    problems = [fields]
    for wrong, text in (
        (score.isna(), "is not a number"),
        ((score < 0) | (score > MAX_SCORE), "is outside 0 to 5"),
    ):
        problems.append(
            frame["score"][wrong].map(lambda value, text=text: f"score {value!r} {text}")
        )
    for column in ("sentence1", "sentence2"):
        blank = frame[column][_is_blank(frame[column])]
        problems.append(blank.map(lambda _, column=column: f"{column} is blank"))
    found = pd.concat(problems)
    if len(found):
        raise UserError(places(path, found))
    table = frame[["sentence1", "sentence2"]].assign(score=score / MAX_SCORE)
    return table.reset_index(drop=True)


def text_problem(name: str, value: object) -> str | None:
    """Returns what is wrong with a sentence that JSON or Parquet holds, or None."""
    if not isinstance(value, str) or not value.strip():
        return f"{name} is missing, blank or not text"
    if not is_unicode(value):  # JSON can escape half a character
        return f"{name} is not Unicode text: half of a surrogate pair"
    return None


def _klue_sts_problem(item: object) -> str | None:
    labels = item.get("labels") if isinstance(item, dict) else None
    if not isinstance(labels, dict):
        return "not an object with labels"
    for name in ("sentence1", "sentence2"):
        if problem := text_problem(name, item.get(name)):
            return problem
    score, label = labels.get("real-label"), labels.get("binary-label")
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if not is_number or not 0 <= score <= MAX_SCORE:
        return f"real-label {score!r} is not a number from 0 to 5"
    if label not in (0, 1):
        return f"binary-label {label!r} is not 0 or 1"
    return None


def read_klue_sts(path: str | Path) -> pd.DataFrame:
    """Reads klue-sts-v1.1_*.json, or the Hub's Parquet of it.

    Returns columns sentence1, sentence2, score in [0, 1], label (0 or 1): `score` is the
    real-label / 5 and `label` the binary-label (1 from real-label 3.0 on). Raises `UserError` for
    anything else; JSON has no lines of its own, so items are counted from 1.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        items = read_parquet(path).to_dict("records")
    else:
        items = parse_json(decode(read_bytes(path), path), path)
    if not isinstance(items, list) or not items:
        raise UserError(f"{path}: should be a JSON list of KLUE-STS items")
    found = {number: _klue_sts_problem(item) for number, item in enumerate(items, start=1)}
    problems = pd.Series(found, dtype="object").dropna()
    if len(problems):
        raise UserError(places(path, problems, "item"))
    return pd.DataFrame(
        {
            "sentence1": item["sentence1"],
            "sentence2": item["sentence2"],
            "score": item["labels"]["real-label"] / MAX_SCORE,
            "label": int(item["labels"]["binary-label"]),
        }
        for item in items
    )


def read_kornli(path: str | Path) -> tuple[pd.DataFrame, int]:
    """Reads a KorNLI file: columns sentence1, sentence2 (stripped) and gold_label.

    Rows with a blank sentence, the label `-` or a wrong number of fields are left out and warned
    of on stderr. Returns the table and how many rows were left out; raises `UserError` when those
    are more than 1% of the file, or when a label is none of the three.
    """
    path = Path(path)
    frame, fields = _read_tsv(path, NLI_COLUMNS)
    frame["sentence1"] = frame["sentence1"].str.strip()
    frame["sentence2"] = frame["sentence2"].str.strip()
    label = frame["gold_label"]
    unknown = label[~label.isin([*NLI_LABELS, "-"])]
    if len(unknown):
        expected = ", ".join(NLI_LABELS)
        raise UserError(places(path, unknown.map(lambda value: f"label {value!r}, not {expected}")))
    blank = (frame["sentence1"] == "") | (frame["sentence2"] == "")
    odd = pd.concat(
        [
            fields,
            label[label == "-"].map(lambda _: "label '-'"),
            label[blank & (label != "-")].map(lambda _: "a sentence is blank"),
        ]
    )
    if len(odd) > MAX_LEFT_OUT * (len(frame) + len(fields)):
        raise UserError(
            f"{places(path, odd)}\n{path}: {len(odd):,} of {len(frame) + len(fields):,} rows "
            f"cannot be used; more than {MAX_LEFT_OUT:.0%} is a broken file"
        )
    if len(odd):
        print(f"warning: {len(odd):,} rows left out:\n{places(path, odd)}", file=sys.stderr)
    return frame.drop(index=odd.index, errors="ignore").reset_index(drop=True), len(odd)


def nli_triplets(table: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """Builds (anchor, positive, negative) triplets from one KorNLI table, as the original did.

    Each row counts in both directions. A sentence with at least one entailment and one
    contradiction partner gives two triplets, (sentence, entailment, contradiction) and
    (entailment, sentence, contradiction). Partners are drawn with `generator` from candidates in
    the order of their first appearance, so that the seed alone decides.
    """
    used = table[table["gold_label"] != "neutral"]
    rows = len(used)
    codes, sentences = pd.factorize(pd.concat([used["sentence1"], used["sentence2"]]))
    first, second = codes[:rows].astype(np.int64), codes[rows:].astype(np.int64)
    is_entailment = (used["gold_label"] == "entailment").to_numpy()

    def partners(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        # Pairs in both directions as sorted, distinct numbers sentence * n + partner.
        forward = first[chosen] * len(sentences) + second[chosen]
        backward = second[chosen] * len(sentences) + first[chosen]
        pairs = np.unique(np.concatenate([forward, backward]))
        owner, start, count = np.unique(
            pairs // len(sentences), return_index=True, return_counts=True
        )
        return owner, start, count, pairs % len(sentences)

    def draw(start: np.ndarray, count: np.ndarray, partner: np.ndarray) -> np.ndarray:
        return partner[start + generator.integers(0, count)]

    entailment_owner, entailment_start, entailment_count, entailments = partners(is_entailment)
    contradiction_owner, contradiction_start, contradiction_count, contradictions = partners(
        ~is_entailment
    )
    anchors, in_entailment, in_contradiction = np.intersect1d(
        entailment_owner, contradiction_owner, assume_unique=True, return_indices=True
    )
    entailment = entailment_start[in_entailment], entailment_count[in_entailment], entailments
    contradiction = (
        contradiction_start[in_contradiction],
        contradiction_count[in_contradiction],
        contradictions,
    )
    triplets = np.empty((2 * len(anchors), 3), dtype=np.int64)
    triplets[0::2] = np.stack([anchors, draw(*entailment), draw(*contradiction)], axis=1)
    triplets[1::2] = np.stack([draw(*entailment), anchors, draw(*contradiction)], axis=1)
    return pd.DataFrame(
        {
            column: sentences.take(triplets[:, position])
            for position, column in enumerate(("anchor", "positive", "negative"))
        }
    )


def read_kornli_triplets(
    path: Path, generator: np.random.Generator
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Reads a KorNLI file; returns its triplets, partners drawn with `generator`, and its record.

    Raises `UserError` for a file without triplet.
    """
    table, left_out = read_kornli(path)
    triplets = nli_triplets(table, generator)
    if triplets.empty:
        raise UserError(
            f"{path}: no triplet: no sentence has both an entailment and a contradiction"
        )
    return triplets, file_record(path, len(table), left_out)
