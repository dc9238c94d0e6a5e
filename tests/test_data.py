import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.command_line import REPOSITORY as REPO
from common.command_line import UserError, command_line
from common.data import (
    NLI_LABELS,
    PUBLISHED_BLOB_IDS,
    blob_id,
    file_record,
    is_korsts_test,
    nli_triplets,
    read_klue_sts,
    read_kornli,
    read_korsts,
)
from common.formats import read_nli_triplets

# A warning of pandas on odd data would be a defect of the readers.
pytestmark = pytest.mark.filterwarnings("error")

SAMPLES = REPO / "tests" / "samples"
PUBLISHED = REPO.parent / "shared" / "KorNLUDatasets"
needs_published = pytest.mark.skipif(
    not PUBLISHED.exists(), reason="KorNLUDatasets is not in ../shared of this checkout"
)

STS_HEADER = "genre\tfilename\tyear\tid\tscore\tsentence1\tsentence2\n"
STS_ROW = "main\tfile\t2026\t1\t2.5\t첫째 문장\t둘째 문장\n"
NLI_HEADER = "sentence1\tsentence2\tgold_label\n"
NLI_ROW = "전제\t가설\tentailment\n"
STS_EXPECTED = "; the header should be genre filename year id score sentence1 sentence2"


def sts_row(score: str = "2.5", sentence1: str = "첫째 문장", sentence2: str = "둘째 문장") -> str:
    return f"main\tfile\t2026\t1\t{score}\t{sentence1}\t{sentence2}\n"


def klue_item(score: object = 3.5, label: object = 1, **sentences: object) -> dict:
    """One item in the form of KLUE-STS."""
    return {
        "guid": "sample-00000",
        "source": "sample",
        "sentence1": "첫째 문장",
        "sentence2": "둘째 문장",
        **sentences,
        "labels": {"label": 3.5, "real-label": score, "binary-label": label},
        "annotations": {},
    }


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes bytes, text as UTF-8, or a value as JSON."""

    def write_file(content: object, name: str = "file.tsv") -> Path:
        if not isinstance(content, str | bytes):
            content = json.dumps(content, ensure_ascii=False)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def error_of(reader, path: Path) -> str:
    """Returns the reader's message, without the folder of the file."""
    with pytest.raises(UserError) as error:
        reader(path)
    return str(error.value).replace(f"{path.parent}{os.sep}", "")


def plain_rows(path: Path) -> list[dict[str, str]]:
    """The rows as the original read them."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


# --- defects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [read_korsts, read_kornli, read_klue_sts])
def test_missing_and_unreadable_files(reader, tmp_path):
    assert error_of(reader, tmp_path / "none.tsv") == "none.tsv: no such file"
    (tmp_path / "folder").mkdir()
    assert error_of(reader, tmp_path / "folder") == "folder: cannot be read: Is a directory"


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n \n\t\n"])
@pytest.mark.parametrize("reader", [read_korsts, read_kornli, read_klue_sts])
def test_empty_files(reader, content, write):
    assert error_of(reader, write(content)) == "file.tsv: the file is empty"


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("reader", [read_korsts, read_kornli])
def test_a_file_with_nothing_but_a_bom_is_empty(reader, content, write):
    assert error_of(reader, write(content)) == "file.tsv: the file is empty"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (STS_HEADER, "1: a header and no rows"),
        (STS_HEADER + "\n\r\n", "1: a header and no rows"),
        (STS_ROW, f"1: no column {', '.join(STS_HEADER.split())}{STS_EXPECTED}"),
        (
            STS_HEADER.replace("score", "Score") + STS_ROW,
            f"1: no column score{STS_EXPECTED}",
        ),
        (
            "genre\tscore\tsentence1\na\t1\tb\n",
            f"1: no column filename, year, id, sentence2{STS_EXPECTED}",
        ),
        (
            STS_HEADER.replace("\tsentence2", "\tsentence2\tscore") + STS_ROW,
            "1: column score more than once",
        ),
        (STS_HEADER + STS_ROW + "a\tb\n", "3: 2 fields, not 7"),
        (STS_HEADER + STS_ROW + STS_ROW.replace("\n", "\tmore\n"), "3: 8 fields, not 7"),
        (STS_HEADER + STS_ROW + "\n" + STS_ROW, "3: 1 fields, not 7"),
        (STS_HEADER + "a\tb\n", "2: 2 fields, not 7"),
        (STS_HEADER + sts_row("four"), "2: score 'four' is not a number"),
        (STS_HEADER + STS_ROW + sts_row(""), "3: score '' is not a number"),
        (STS_HEADER + STS_ROW + sts_row("3,5"), "3: score '3,5' is not a number"),
        (STS_HEADER + STS_ROW + sts_row("True"), "3: score 'True' is not a number"),
        (STS_HEADER + STS_ROW + sts_row("nan"), "3: score 'nan' is not a number"),
        (STS_HEADER + STS_ROW + sts_row("NA"), "3: score 'NA' is not a number"),
        (STS_HEADER + STS_ROW + sts_row("5.001"), "3: score '5.001' is outside 0 to 5"),
        (STS_HEADER + STS_ROW + sts_row("-0.1"), "3: score '-0.1' is outside 0 to 5"),
        (STS_HEADER + STS_ROW + sts_row("inf"), "3: score 'inf' is outside 0 to 5"),
        (STS_HEADER + STS_ROW + sts_row(sentence1=""), "3: sentence1 is blank"),
        (STS_HEADER + STS_ROW + sts_row(sentence2=" \u3000"), "3: sentence2 is blank"),
    ],
)
def test_defects_of_korsts(content, message, write):
    assert error_of(read_korsts, write(content)) == f"file.tsv:{message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NLI_HEADER, "1: a header and no rows"),
        (
            "sentence1\tlabel\n" + NLI_ROW,
            "1: no column sentence2, gold_label; "
            "the header should be sentence1 sentence2 gold_label",
        ),
        (
            "sentence1\tsentence2\tgold_label\tsentence1\n" + NLI_ROW,
            "1: column sentence1 more than once",
        ),
        (
            NLI_HEADER + NLI_ROW + NLI_ROW.replace("entailment", "Entailment"),
            "3: label 'Entailment', not entailment, neutral, contradiction",
        ),
        (
            NLI_HEADER + NLI_ROW + "a\tb\t\n",
            "3: label '', not entailment, neutral, contradiction",
        ),
    ],
)
def test_defects_of_kornli(content, message, write):
    assert error_of(read_kornli, write(content)) == f"file.tsv:{message}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("전제 가설 entailment\n", "1 fields, not 3"),
        ("전제\t가설\tentailment\t\n", "4 fields, not 3"),
        ("전제\t가설\t-\n", "label '-'"),
        ("전제\t \tneutral\n", "a sentence is blank"),
        ("\t가설\tneutral\n", "a sentence is blank"),
    ],
)
def test_odd_rows_of_kornli_stop_above_one_percent(row, message, write, capsys):
    path = write(NLI_HEADER + 98 * NLI_ROW + row + NLI_ROW)
    table, left_out = read_kornli(path)
    assert (len(table), left_out) == (99, 1)
    assert set(table["sentence2"]) == {"가설"}
    warning = capsys.readouterr().err
    assert warning == f"warning: 1 rows left out:\n{path}:100: {message}\n"

    path = write(NLI_HEADER + 97 * NLI_ROW + row + NLI_ROW)
    assert error_of(read_kornli, path) == (
        f"file.tsv:99: {message}\n"
        "file.tsv: 1 of 99 rows cannot be used; more than 1% is a broken file"
    )
    assert capsys.readouterr().err == ""


def test_a_kornli_file_of_odd_rows_alone_stops(write):
    message = error_of(read_kornli, write(NLI_HEADER + "a\tb\n"))
    assert message.endswith("1 of 1 rows cannot be used; more than 1% is a broken file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"sentence1":\n}]', ":3: not JSON: Expecting value"),
        ("sentence1\tsentence2\n", ":1: not JSON: Expecting value"),
        ({"sentence1": []}, ": should be a JSON list of KLUE-STS items"),
        ([], ": should be a JSON list of KLUE-STS items"),
        (["text"], ": item 1: not an object with labels"),
        ([klue_item(), {"sentence1": "a"}], ": item 2: not an object with labels"),
        (
            [klue_item(), {"sentence2": "b", "labels": {}}],
            ": item 2: sentence1 is missing, blank or not text",
        ),
        ([klue_item(sentence2=" ")], ": item 1: sentence2 is missing, blank or not text"),
        ([klue_item(sentence1=None)], ": item 1: sentence1 is missing, blank or not text"),
        ([klue_item(None)], ": item 1: real-label None is not a number from 0 to 5"),
        ([klue_item("3.5")], ": item 1: real-label '3.5' is not a number from 0 to 5"),
        ([klue_item(float("nan"))], ": item 1: real-label nan is not a number from 0 to 5"),
        ([klue_item(float("inf"))], ": item 1: real-label inf is not a number from 0 to 5"),
        ([klue_item(), klue_item(5.1)], ": item 2: real-label 5.1 is not a number from 0 to 5"),
        ([klue_item(-1)], ": item 1: real-label -1 is not a number from 0 to 5"),
        ([klue_item(3.0, 2)], ": item 1: binary-label 2 is not 0 or 1"),
        ([klue_item(3.0, 0.5)], ": item 1: binary-label 0.5 is not 0 or 1"),
        ([klue_item(3.0, float("inf"))], ": item 1: binary-label inf is not 0 or 1"),
        ([klue_item(3.0, None)], ": item 1: binary-label None is not 0 or 1"),
    ],
)
def test_defects_of_klue_sts(content, message, write):
    assert error_of(read_klue_sts, write(content)) == f"file.tsv{message}"


def test_half_a_surrogate_pair_in_klue_sts_is_a_defect(write):
    content = json.dumps([klue_item(sentence1="반쪽 \ud83d")])
    assert error_of(read_klue_sts, write(content)) == (
        "file.tsv: item 1: sentence1 is not Unicode text: half of a surrogate pair"
    )


def test_json_beyond_python_s_limits_is_a_defect(write):
    assert error_of(read_klue_sts, write("[" * 100_000)).startswith("file.tsv: not JSON: ")
    assert error_of(read_klue_sts, write("[" + "1" * 5000)).startswith("file.tsv: not JSON: ")


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("reader", "content", "line"),
    [
        (read_korsts, (STS_HEADER + STS_ROW + "g\tf\ty\t1\t3\t").encode(), 3),
        (read_kornli, (NLI_HEADER + NLI_ROW).encode(), 3),
        (read_klue_sts, b'[\n\n{"sentence1": "', 3),
        (read_klue_sts, b"", 1),
    ],
)
def test_bytes_that_are_not_utf8(reader, content, line, bom, write):
    path = write(bom + content + "한국어".encode("cp949") + b"\tb\n")
    assert error_of(reader, path) == f"file.tsv:{line}: byte 0xc7 is not UTF-8"


def test_the_first_ten_defects_and_their_count(write):
    bad = STS_HEADER + STS_ROW + 10 * sts_row("six")
    ten = [f"file.tsv:{line}: score 'six' is not a number" for line in range(3, 13)]
    assert error_of(read_korsts, write(bad)) == "\n".join(ten)
    # A row without a number and without sentences, and a short one, make 14 in all.
    bad += sts_row("7", "", "") + "short\n"
    count = "file.tsv: 14 problems in all, the first 10 shown"
    assert error_of(read_korsts, write(bad)) == "\n".join([*ten, count])

    bad = NLI_HEADER + NLI_ROW + 1200 * "a\tb\tmaybe\n"
    shown = [
        f"file.tsv:{line}: label 'maybe', not entailment, neutral, contradiction"
        for line in range(3, 13)
    ]
    count = "file.tsv: 1,200 problems in all, the first 10 shown"
    assert error_of(read_kornli, write(bad)) == "\n".join([*shown, count])

    items = [klue_item(), *(10 * [klue_item(9)])]
    shown = [
        f"file.tsv: item {item}: real-label 9 is not a number from 0 to 5" for item in range(2, 12)
    ]
    assert error_of(read_klue_sts, write(items)) == "\n".join(shown)
    count = "file.tsv: 11 problems in all, the first 10 shown"
    assert error_of(read_klue_sts, write([*items, klue_item(9)])) == "\n".join([*shown, count])


def test_defects_of_one_file_are_in_the_order_of_its_lines(write):
    content = STS_HEADER + sts_row(sentence2="") + "short\n" + sts_row("6", "") + sts_row("x")
    assert error_of(read_korsts, write(content)).splitlines() == [
        "file.tsv:2: sentence2 is blank",
        "file.tsv:3: 1 fields, not 7",
        "file.tsv:4: score '6' is outside 0 to 5",
        "file.tsv:4: sentence1 is blank",
        "file.tsv:5: score 'x' is not a number",
    ]


def test_the_first_ten_odd_rows_are_warned_of(write, capsys):
    odd = 4 * ["a\tb\n", "a\tb\t-\n", " \tb\tneutral\n"]
    path = write(NLI_HEADER + "".join(odd) + 1500 * NLI_ROW)
    table, left_out = read_kornli(path)
    assert (len(table), left_out) == (1500, 12)
    first, *places, count = capsys.readouterr().err.splitlines()
    assert first == "warning: 12 rows left out:"
    reasons = 4 * ["2 fields, not 3", "label '-'", "a sentence is blank"]
    assert places == [f"{path}:{line}: {reasons[line - 2]}" for line in range(2, 12)]
    assert count == f"{path}: 12 problems in all, the first 10 shown"


@pytest.mark.parametrize(
    "rows",
    [
        "a\tb\tneutral\n",
        "a\tb\tentailment\nc\td\tcontradiction\n",
        "a\tb\tentailment\na\tc\tneutral\n",
    ],
)
def test_a_file_without_a_triplet_stops(rows, write):
    good = write(NLI_HEADER + "a\tb\tentailment\na\tc\tcontradiction\n", "good.tsv")
    bad = write(NLI_HEADER + rows)
    assert error_of(lambda path: read_nli_triplets([good, path], 777), bad) == (
        "file.tsv: no triplet: no sentence has both an entailment and a contradiction"
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("file.tsv:2: wrong"), 2, "error: file.tsv:2: wrong\n"),
        (OSError(28, "No space left on device", "run"), 1, "run: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_end_a_script_with_their_status(error, status, message, capsys):
    with pytest.raises(SystemExit) as end, command_line():
        raise error
    output = capsys.readouterr()
    assert end.value.code == status
    assert output.err.endswith(message) and "Traceback" not in output.err
    assert output.out == ""


def test_a_full_disk_in_a_thread_is_one_line_too(capsys):
    def write() -> None:
        raise OSError(28, "No space left on device", "events")

    with command_line():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert capsys.readouterr().err == "error: events: No space left on device\n"


def test_a_name_that_is_no_text_is_refused_before_anything_is_done(monkeypatch, capsys):
    name = os.fsdecode("한글".encode("cp949"))  # of a Windows zip, on a UTF-8 console
    monkeypatch.setattr(sys, "argv", ["script.py", "--run_dir", f"runs/{name}"])
    with pytest.raises(SystemExit) as end, command_line():
        raise AssertionError("the script began")
    assert end.value.code == 2
    expected = f"error: {f'runs/{name}'!r}: not utf-8 text: rename what has this name"
    assert "\\udcc7" in expected and capsys.readouterr().err.startswith(expected)


PRINTS = """
from common.command_line import command_line
with command_line():
    print("a score")
"""


def test_an_output_that_takes_nothing_is_one_line_and_status_1():
    reader, writer = os.pipe()
    os.close(reader)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", PRINTS],
        cwd=REPO, stdout=writer, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "error: stdout: Broken pipe\n")


def test_a_closed_output_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with command_line():
        print("a score")


# --- what is read past, and what stays text --------------------------------------------------


@pytest.mark.parametrize("change", ["BOM", "CRLF", "order", "end", "blank end"])
def test_read_past(change, write):
    sts, nli = STS_HEADER + STS_ROW + sts_row("5"), NLI_HEADER + NLI_ROW
    klue = json.dumps([klue_item()], ensure_ascii=False, indent=1)
    changed = {
        "BOM": lambda text: "\ufeff" + text,
        "CRLF": lambda text: text.replace("\n", "\r\n"),
        "order": lambda text: "".join(
            "\t".join([*reversed(line.split("\t")), "one more"]) + "\n"
            for line in text.splitlines()
        ),
        "end": lambda text: text.removesuffix("\n"),
        "blank end": lambda text: text + "\n\r\n",
    }[change]
    table = read_korsts(write(changed(sts)))
    assert list(table.columns) == ["sentence1", "sentence2", "score"]
    assert table.values.tolist() == [
        ["첫째 문장", "둘째 문장", 0.5],
        ["첫째 문장", "둘째 문장", 1.0],
    ]
    table, left_out = read_kornli(write(changed(nli)))
    assert list(table.columns) == ["sentence1", "sentence2", "gold_label"]
    assert table.values.tolist() == [["전제", "가설", "entailment"]] and left_out == 0
    if change != "order":
        table = read_klue_sts(write(changed(klue)))
        assert list(table.columns) == ["sentence1", "sentence2", "score", "label"]
        assert table.values.tolist() == [["첫째 문장", "둘째 문장", 0.7, 1]]


ODD_TEXT = [
    '"닫지 않은 따옴표',
    '그는 "안녕"이라고 했다.""',
    "'",
    "안\r녕",
    "a\0b",
    "줄\u2028문단\u2029줄\x85",
    "\x0b\x0c\x1c\x1d\x1e",
    "\\t\\n\\",
    "#",
    "NA",
    "nan",
    "null",
    "0012",
    "가\u1100\u1161",
    "😀",
    "\ufeff",
]


@pytest.mark.parametrize("text", ODD_TEXT, ids=ascii)
def test_odd_text_stays_text(text, write):
    text = f"앞 {text} 뒤"
    korsts = read_korsts(write(STS_HEADER + sts_row("1", text, text + "\r!") + STS_ROW))
    assert korsts["sentence1"].tolist() == [text, "첫째 문장"]
    assert korsts["sentence2"].tolist() == [text + "\r!", "둘째 문장"]
    kornli, _ = read_kornli(write(NLI_HEADER + f"{text}\t{text}2\tneutral\n" + NLI_ROW))
    assert kornli["sentence1"].tolist() == [text, "전제"]
    assert kornli["sentence2"].tolist() == [text + "2", "가설"]
    klue = read_klue_sts(write([klue_item(sentence1=text)]))
    assert klue["sentence1"].tolist() == [text]


def test_words_for_missing_values_are_text(write):
    table = read_korsts(write(STS_HEADER + sts_row("0", "NA", "nan") + sts_row("5", '"', "None")))
    assert table.values.tolist() == [["NA", "nan", 0.0], ['"', "None", 1.0]]


def test_only_nli_sentences_are_stripped(write):
    korsts = read_korsts(write(STS_HEADER + sts_row("1", " 첫째 ", "둘째\u3000")))
    assert korsts.iloc[0, :2].tolist() == [" 첫째 ", "둘째\u3000"]
    kornli, _ = read_kornli(write(NLI_HEADER + "\u3000 전제\u2028 \t가설\x1c\xa0\tneutral\n"))
    assert kornli.iloc[0].tolist() == ["전제", "가설", "neutral"]
    klue = read_klue_sts(write([klue_item(sentence1=" 첫째 ")]))
    assert klue.loc[0, "sentence1"] == " 첫째 "


def test_sentences_that_differ_after_a_nul_are_different(write):
    rows = "a\0b\tx\tentailment\na\0c\ty\tcontradiction\n"
    rows += "d\0e\tx\tentailment\nd\0e\ty\tcontradiction\n"
    triplets, _ = read_nli_triplets([write(NLI_HEADER + rows)], 777)
    assert set(triplets.iloc[0]) == {"d\0e", "x", "y"} and len(triplets) == 2


def test_dtypes_of_the_tables(write):
    klue = read_klue_sts(write([klue_item(0, 0), klue_item(5, 1)]))
    assert klue["score"].tolist() == [0.0, 1.0] and klue["score"].dtype == np.float64
    assert klue["label"].tolist() == [0, 1] and klue["label"].dtype == np.int64
    assert read_korsts(write(STS_HEADER + sts_row("4")))["score"].dtype == np.float64


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("KorSTS/*.tsv")), ids=lambda path: path.name)
def test_samples_of_korsts_are_read_as_csv_reads_them(path):
    rows, table = plain_rows(path), read_korsts(path)
    assert table["sentence1"].tolist() == [row["sentence1"] for row in rows]
    assert table["sentence2"].tolist() == [row["sentence2"] for row in rows]
    assert table["score"].tolist() == [float(row["score"]) / 5 for row in rows]


# --- triplets --------------------------------------------------------------------------------


def original_candidates(path: Path) -> dict[str, dict[str, set[str]]]:
    """The original's loop: sentence -> label -> partners, each row in both directions."""
    partners = defaultdict(lambda: {label: set() for label in NLI_LABELS})
    for row in plain_rows(path):
        sentence1, sentence2 = row["sentence1"].strip(), row["sentence2"].strip()
        partners[sentence1][row["gold_label"]].add(sentence2)
        partners[sentence2][row["gold_label"]].add(sentence1)
    return {
        sentence: others
        for sentence, others in partners.items()
        if others["entailment"] and others["contradiction"]
    }


def check_against_original(triplets: pd.DataFrame, path: Path) -> None:
    candidates = original_candidates(path)
    assert list(triplets.columns) == ["anchor", "positive", "negative"]
    rows = triplets.values.tolist()
    first, second = rows[0::2], rows[1::2]
    assert sorted(anchor for anchor, _, _ in first) == sorted(candidates)
    assert [anchor for anchor, _, _ in first] == [anchor for _, anchor, _ in second]
    for sentence, entailment, contradiction in first:
        assert entailment in candidates[sentence]["entailment"]
        assert contradiction in candidates[sentence]["contradiction"]
    for entailment, sentence, contradiction in second:
        assert entailment in candidates[sentence]["entailment"]
        assert contradiction in candidates[sentence]["contradiction"]


@pytest.fixture
def shuffled_nli(write):
    """Rows over few sentences: repeated ones, contradictory labels, sentences with themselves."""
    generator = random.Random(0)
    sentences = [f"문장 {number}" for number in range(60)] + [" 문장 1 ", "문장 2\u3000"]
    rows = [
        "\t".join([*generator.choices(sentences, k=2), generator.choice(NLI_LABELS)])
        for _ in range(150)
    ]
    return write(NLI_HEADER + "\n".join([*rows, *rows[:20], "문장 3\t문장 3\tentailment"]) + "\n")


def test_triplets_are_those_of_the_original(shuffled_nli):
    triplets, records = read_nli_triplets([shuffled_nli], 777)
    check_against_original(triplets, shuffled_nli)
    assert len(triplets) == 2 * len(original_candidates(shuffled_nli)) > 50
    assert records[0]["rows"] == 171 and records[0]["rows_left_out"] == 0


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("KorNLI/*.tsv")), ids=lambda path: path.name)
def test_triplets_of_the_samples_are_those_of_the_original(path):
    triplets, _ = read_nli_triplets([path], 777)
    check_against_original(triplets, path)


def test_each_file_is_treated_alone(write):
    first = write(NLI_HEADER + "a\tb\tentailment\na\tc\tcontradiction\nx\ty\tentailment\n", "1")
    second = write(NLI_HEADER + "d\te\tentailment\nd\tf\tcontradiction\nx\tz\tcontradiction\n", "2")
    triplets, records = read_nli_triplets([first, str(second)], 777)
    assert triplets.values.tolist() == [
        ["a", "b", "c"],
        ["b", "a", "c"],
        ["d", "e", "f"],
        ["e", "d", "f"],
    ]
    assert list(triplets.index) == [0, 1, 2, 3]
    assert [record["file"] for record in records] == ["1", "2"]


def test_every_candidate_is_drawn_and_the_seed_decides(write):
    rows = [f"a\te{number}\tentailment\n" for number in range(3)]
    rows += [f"a\tc{number}\tcontradiction\n" for number in range(4)]
    path = write(NLI_HEADER + "".join(rows))
    table, _ = read_kornli(path)
    drawn = [
        nli_triplets(table, np.random.default_rng(seed)).values.tolist() for seed in range(100)
    ]
    expected = {(f"e{e}", f"c{c}") for e in range(3) for c in range(4)}
    assert {(positive, negative) for ((_, positive, negative), _) in drawn} == expected
    assert {(anchor, negative) for (_, (anchor, _, negative)) in drawn} == expected
    # The two triplets of a sentence are drawn one by one.
    assert any(first[2] != second[2] for first, second in drawn)
    assert read_nli_triplets([path], 7)[0].values.tolist() == drawn[7]


def test_triplets_do_not_depend_on_the_hash_seed_folder_or_locale(shuffled_nli, tmp_path):
    code = (
        "import sys; from common import formats; path, = sys.argv[1:];"
        "table, _ = formats.read_nli_triplets([path], 777);"
        "sys.stdout.buffer.write(table.to_csv(index=False).encode())"
    )
    outputs = []
    for hash_seed, folder, locale in (("1", REPO, "C.UTF-8"), ("2", tmp_path, "C")):
        environment = os.environ | {
            "PYTHONPATH": str(REPO),
            "PYTHONHASHSEED": hash_seed,
            "PYTHONUTF8": "0",
            "LC_ALL": locale,
        }
        command = [sys.executable, "-c", code, str(shuffled_nli)]
        done = subprocess.run(command, capture_output=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    here, _ = read_nli_triplets([shuffled_nli], 777)
    assert outputs[0].decode() == here.to_csv(index=False)
    candidates = original_candidates(shuffled_nli).values()
    assert max(len(others["entailment"]) for others in candidates) >= 2


def test_a_table_without_a_pair_gives_no_triplets():
    table = pd.DataFrame({"sentence1": ["a"], "sentence2": ["b"], "gold_label": ["neutral"]})
    triplets = nli_triplets(table, np.random.default_rng(0))
    assert triplets.empty and list(triplets.columns) == ["anchor", "positive", "negative"]


# --- blob ids and the published files --------------------------------------------------------


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize("content", [b"", b"text\n", b"\xef\xbb\xbfa\r\n\0", b"x" * 70_000])
def test_blob_ids_are_those_of_git(content, write):
    path = write(content)
    command = ["git", "hash-object", "--no-filters", path]
    assert blob_id(path) == subprocess.check_output(command, text=True).strip()


def test_file_records(write, capsys):
    content = STS_HEADER + STS_ROW
    other = file_record(write(content, "mine.tsv"), 1)
    assert other["published"] is None and capsys.readouterr().err == ""
    path = write(content, "sts-dev.tsv")
    record = file_record(path, 1, left_out=3)
    assert record == {
        "file": "sts-dev.tsv",
        "blob_id": blob_id(path),
        "published": False,
        "rows": 1,
        "rows_left_out": 3,
    }
    note = f"note: {path}: not the published file (git blob {blob_id(path)[:12]})\n"
    assert capsys.readouterr().err == note


@needs_published
@pytest.mark.parametrize(("split", "count"), [("train", 5749), ("dev", 1500), ("test", 1379)])
def test_published_korsts(split, count, capsys):
    path = PUBLISHED / "KorSTS" / f"sts-{split}.tsv"
    table, rows = read_korsts(path), plain_rows(path)
    assert len(table) == count
    assert table["sentence1"].tolist() == [row["sentence1"] for row in rows]
    assert table["sentence2"].tolist() == [row["sentence2"] for row in rows]
    assert table["score"].tolist() == [float(row["score"]) / 5 for row in rows]
    assert file_record(path, count)["published"] is True
    assert blob_id(path) == PUBLISHED_BLOB_IDS[path.name]
    assert capsys.readouterr().err == ""


@needs_published
def test_published_xnli(capsys):
    paths = [PUBLISHED / "KorNLI" / f"xnli.{split}.ko.tsv" for split in ("dev", "test")]
    for path, count in zip(paths, (2490, 5010), strict=True):
        table, left_out = read_kornli(path)
        assert (len(table), left_out) == (count, 0)
        rows = plain_rows(path)
        assert table["sentence2"].tolist() == [row["sentence2"].strip() for row in rows]
        check_against_original(read_nli_triplets([path], 777)[0], path)
    triplets, records = read_nli_triplets(paths, 777)
    assert len(triplets) == 5000
    assert [record["published"] for record in records] == [True, True]
    assert [record["rows"] for record in records] == [2490, 5010]
    assert capsys.readouterr().err == ""


def test_klue_sts_as_parquet_passes_the_same_checks(tmp_path):
    items = [klue_item(), klue_item(score=5.5), klue_item(sentence1=" ")]
    for item in items:
        item.pop("annotations", None)  # Parquet holds no empty object
    path = tmp_path / "validation.parquet"
    pd.DataFrame(items).to_parquet(path)
    as_json = tmp_path / "validation.json"
    as_json.write_text(json.dumps(items), encoding="utf-8")
    said = [error_of(read_klue_sts, file).replace(file.name, "FILE") for file in (path, as_json)]
    assert said[0] == said[1] and "FILE: item 2: real-label 5.5" in said[0]
    pd.DataFrame(items[:1]).to_parquet(path)
    as_json.write_text(json.dumps(items[:1]), encoding="utf-8")
    pd.testing.assert_frame_equal(read_klue_sts(path), read_klue_sts(as_json))
    path.write_bytes(b"PAR1 no parquet")
    assert "not Parquet" in error_of(read_klue_sts, path)


def test_a_console_that_cannot_show_a_character_shows_another(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp949", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with command_line():
        print("끝 😀")
    assert stream.buffer.getvalue().decode("cp949") == "끝 ?\n"


def test_every_script_runs_inside_command_line():
    scripts = [*REPO.glob("*.py"), *REPO.glob("onnx/*.py"), *REPO.glob("measurements/collect*.py")]
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            assert "with command_line():" in text or "reconfigure(errors=" in text, path


def test_a_published_file_is_known_by_windows_line_ends_too(monkeypatch, write, capsys):
    content = STS_HEADER + STS_ROW
    path = write(content, "sts-test.tsv")
    identity = blob_id(path)
    monkeypatch.setitem(PUBLISHED_BLOB_IDS, path.name, identity)
    for ends, published in (("\n", True), ("\r\n", True), (" \n", False)):
        path.write_bytes(content.replace("\n", ends).encode())
        record = file_record(path, 1)
        assert record["published"] == published == (record["blob_id"] == identity)
        assert bool(capsys.readouterr().err) != published


def test_korsts_test_is_a_name_and_its_published_content() -> None:
    def record(file: str, published: bool | None) -> dict[str, object]:
        return {"file": file, "published": published}

    published = [record("sts-dev.tsv", True), record("sts-test.tsv", True)]
    assert is_korsts_test("sts-test.tsv", published)
    assert not is_korsts_test("sts-dev.tsv", published)  # published, and another file
    assert not is_korsts_test("mine.csv", [*published, record("mine.csv", None)])
    assert not is_korsts_test("sts-test.tsv", [record("sts-test.tsv", False)])
    assert not is_korsts_test("sts-test.tsv", [])
