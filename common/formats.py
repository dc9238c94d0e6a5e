"""Reads pairs and triplets of a person's own files: what form a file has, its content and name say.

    KorSTS TSV, KLUE-STS JSON or Parquet    as `data` reads them; scores up to 5
    CSV, TSV, JSON Lines, JSON, Parquet     sentence1, sentence2, score from 0 to --max_score
    KorNLI TSV                              triplets drawn as `data` draws them
    CSV, TSV, JSON Lines, JSON, Parquet     anchor, positive and, in all rows or none, negative

Columns stand in any order, and other columns are left alone. CSV has quotes, as spreadsheets write
it; in TSV they are text. Blank rows of CSV, TSV and JSON Lines are passed over. Text stays as it
is. Defects are told as in `data`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.command_line import UserError
from common.data import (
    MAX_SCORE,
    NLI_COLUMNS,
    STS_COLUMNS,
    decode,
    file_record,
    parse_json,
    places,
    read_bytes,
    read_klue_sts,
    read_kornli_triplets,
    read_korsts,
    read_parquet,
    text_problem,
)

PAIR_COLUMNS = ("sentence1", "sentence2", "score")
TRIPLET_COLUMNS = ("anchor", "positive", "negative")


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a file holds, unchecked.

    Attributes:
        path: the file.
        frame: all columns, values as the form has them; index: number of the line, item or row.
        problems: what is wrong with the lines or items that are not in `frame`, by their number.
        form: csv, tsv, jsonl, json or parquet.
        header: number of the line that names the columns, in CSV and TSV.
    """

    path: Path
    frame: pd.DataFrame
    problems: pd.Series
    form: str
    header: int | None = None

    @property
    def unit(self) -> str:
        """What the index counts where it is not lines."""
        return {"json": "item", "parquet": "row"}.get(self.form, "")


# --- Forms: one reader each ------------------------------------------------------------------


def _form(path: Path, content: bytes) -> str:
    """Returns csv, tsv, jsonl, json or parquet: what the content begins with, else the name."""
    start = content[:100].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    suffix = path.suffix.lower().removeprefix(".")
    if content.startswith(b"PAR1") or suffix == "parquet":
        return "parquet"
    if start in (b"[", b"{"):
        return "json" if start == b"[" else "jsonl"
    if suffix in ("csv", "tsv", "json", "jsonl"):
        return suffix
    return "tsv" if b"\t" in io.BytesIO(content).readline() else "csv"


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of its first line, fields) of each record."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = f"{path}:{line}: not CSV: {error}: is a quote left open, or one not doubled?"
            raise UserError(message) from None
        yield line, fields


def _tsv_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r").split("\t")


def _read_lines(path: Path, text: str, form: str) -> Rows:
    """Reads CSV or TSV with a header, past blank lines and those of nothing but separators."""
    lines = _csv_lines(text, path) if form == "csv" else _tsv_lines(text)
    filled = [(number, fields) for number, fields in lines if any(map(str.strip, fields))]
    if not filled:  # a BOM alone
        raise UserError(f"{path}: the file is empty")
    (top, header), *filled = filled
    header = [name.strip() for name in header]
    if not filled:
        raise UserError(f"{path}:{top}: a header and no rows")
    hint = ": quote text that has commas" if form == "csv" else ""
    rows = {number: fields for number, fields in filled if len(fields) == len(header)}
    problems = {
        number: f"{len(fields)} fields, not {len(header)}{hint}"
        for number, fields in filled
        if len(fields) != len(header)
    }
    frame = pd.DataFrame(rows.values(), index=list(rows), columns=header, dtype="str")
    return Rows(path, frame, pd.Series(problems, dtype="str"), form, top)


def _read_json(path: Path, text: str, form: str) -> Rows:
    """Reads a JSON list of objects, or one object a line."""
    if form == "json":
        items = parse_json(text, path)
        if not isinstance(items, list) or not items:
            raise UserError(f"{path}: should be a JSON list of objects, or an object a line")
        found = dict(enumerate(items, start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)
        found = {n: parse_json(line, path, n) for n, line in lines if line.strip()}
    objects = {number: item for number, item in found.items() if isinstance(item, dict)}
    problems = {number: "not an object" for number in found if number not in objects}
    names = list(dict.fromkeys(name for item in objects.values() for name in item))
    columns = {name: [item.get(name) for item in objects.values()] for name in names}
    frame = pd.DataFrame(columns, index=list(objects), dtype="object")
    return Rows(path, frame, pd.Series(problems, dtype="str"), form)


def _read_rows(path: Path, content: bytes) -> Rows:
    form = _form(path, content)
    if form == "parquet":
        frame = read_parquet(path)
        if frame.empty:
            raise UserError(f"{path}: no rows")
        frame.index = pd.RangeIndex(1, len(frame) + 1)
        return Rows(path, frame.astype("object"), pd.Series(dtype="str"), form)
    text = decode(content, path)
    return (_read_json if form in ("json", "jsonl") else _read_lines)(path, text, form)


def _has_header(path: Path, content: bytes, columns: Sequence[str]) -> bool:
    """Tells whether a file is a TSV with these columns: those forms are read by `data`."""
    if _form(path, content) != "tsv":
        return False
    header = decode(io.BytesIO(content).readline(), path).rstrip("\r\n")
    return set(columns) <= set(header.split("\t"))


# --- Checked tables --------------------------------------------------------------------------


def _checked(rows: Rows, columns: Sequence[str], expected: str) -> pd.DataFrame:
    """Returns these columns, text and (where one is `score`) float64, with a new index.

    Raises:
        UserError: a column that is not there (`expected` says what should be), text that is blank,
            a score that is not a number from 0 up.
    """
    path, frame = rows.path, rows.frame
    missing = [name for name in columns if name not in frame.columns]
    if missing and (len(frame) or rows.header):
        where = path if rows.header is None else f"{path}:{rows.header}"
        raise UserError(f"{where}: no column {', '.join(missing)}; it should have {expected}")
    if twice := [name for name in columns if list(frame.columns).count(name) > 1]:
        raise UserError(f"{path}:{rows.header}: column {', '.join(twice)} more than once")
    problems, checked = [rows.problems], {}
    for name in columns if len(frame) else ():
        values = checked[name] = frame[name]
        if name == "score":
            checked[name] = values.map(_number).astype("float64")
            wrong = values[~(checked[name] >= 0)]
            problems.append(wrong.map(lambda value: f"score {value!r} is not a number from 0 up"))
        elif rows.header is None:
            found = {number: text_problem(name, value) for number, value in values.items()}
            problems.append(pd.Series(found, dtype="object").dropna())
        else:
            blank = values[values.str.strip() == ""]
            problems.append(blank.map(lambda _, name=name: f"{name} is blank"))
    found = pd.concat(problems)
    if len(found):
        raise UserError(places(path, found, rows.unit))
    table = pd.DataFrame(checked).reset_index(drop=True)
    return table.astype({name: "str" for name in columns if name != "score"})


def _number(value: object) -> float:
    """Returns a number, also one in text, as float, and NaN for all else."""
    if isinstance(value, bool | np.bool_):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def read_pairs(path: str | Path, max_score: float | None) -> tuple[pd.DataFrame, float]:
    """Reads scored pairs in any form: columns sentence1, sentence2 (str), score (float in [0, 1]).

    Args:
        max_score: the highest score of forms without a known scale; 0 is the lowest.

    Returns:
        The table, and what its scores were divided by.

    Raises:
        UserError: defects, each as `file:line`; a form without a known scale and no max_score.
    """
    path = Path(path)
    content = read_bytes(path)
    if _has_header(path, content, STS_COLUMNS):
        return read_korsts(path), MAX_SCORE
    rows = _read_rows(path, content)
    if rows.unit and "labels" in rows.frame.columns:
        has_objects = rows.frame["labels"].map(lambda value: isinstance(value, dict)).any()
        if has_objects or "score" not in rows.frame.columns:  # else a column that is not ours
            return read_klue_sts(path).drop(columns="label"), MAX_SCORE
    expected = f"{', '.join(PAIR_COLUMNS)} (any order), or be a KorSTS or KLUE-STS file"
    table = _checked(rows, PAIR_COLUMNS, expected)
    if max_score is None:
        highest = f"{table['score'].max():g}"
        raise UserError(
            f"{path}: of what scale are its scores? Give the highest one possible (0 is the "
            f"lowest) as --max_score; the highest in the file is {highest}"
        )
    above = table["score"][table["score"] > max_score]
    if len(above):
        above.index = rows.frame.index[above.index]
        problems = above.map(lambda score: f"score {score:g} is above --max_score {max_score:g}")
        raise UserError(places(path, problems, rows.unit))
    _say_quoted(rows, PAIR_COLUMNS)
    return table.assign(score=table["score"] / max_score), max_score


def read_triplets(path: str | Path) -> pd.DataFrame:
    """Reads columns anchor, positive and, where the file has it, negative (all str)."""
    path = Path(path)
    rows = _read_rows(path, read_bytes(path))
    columns = TRIPLET_COLUMNS if "negative" in rows.frame.columns else TRIPLET_COLUMNS[:2]
    table = _checked(rows, columns, "anchor, positive and, for triplets, negative (any order), or "
                     f"be a KorNLI file: TSV with {', '.join(NLI_COLUMNS)}")  # fmt: skip
    _say_quoted(rows, columns)
    return table


def _say_quoted(rows: Rows, columns: Sequence[str]) -> None:
    """Says how many texts of a TSV begin and end with a quote: a spreadsheet's quotes are none."""
    if rows.form != "tsv":
        return
    texts = rows.frame[[name for name in columns if name != "score"]]
    quoted = int(texts.map(lambda text: len(text) > 1 and text[0] == text[-1] == '"').sum().sum())
    if quoted:
        print(
            f"note: {rows.path}: {quoted:,} texts stand in quotes, which are text in a TSV; "
            "if they are a spreadsheet's, save it as CSV",
            file=sys.stderr,
        )


def read_nli_triplets(
    paths: Sequence[str | Path], seed: int
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Reads KorNLI files, pairs or triplets; returns them, one file after the other, and records.

    Each KorNLI file is treated alone, as in the original. Raises `UserError` for a file without
    triplet, and for pairs beside triplets.
    """
    generator = np.random.default_rng(seed)
    tables, records = [], []
    for path in map(Path, paths):
        if _has_header(path, read_bytes(path), NLI_COLUMNS):
            table, record = read_kornli_triplets(path, generator)
        else:
            table = read_triplets(path)
            record = file_record(path, len(table))
        if tables and len(table.columns) != len(tables[0].columns):
            kinds = [f"{len(found.columns)} columns" for found in (table, tables[0])]
            raise UserError(
                f"{path}: {kinds[0]}, and {paths[0]} has {kinds[1]}: pairs and triplets do not mix"
            )
        tables.append(table)
        records.append(record)
    return pd.concat(tables, ignore_index=True), records
