"""Files of a person's own: each form through the real command lines, and its defects."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import SAMPLES, keep_every_checkpoint, run, run_script, weights
from encoders import edit_json

from common.checkpoints import checkpoints, step_of
from common.command_line import UserError
from common.data import blob_id, read_korsts
from common.formats import read_nli_triplets, read_pairs, read_triplets
from common.splits import overlap, split_off

FORMS = ("csv", "tsv", "jsonl", "json", "parquet")


def sample_pairs(*splits: str) -> pd.DataFrame:
    """Returns sample pairs, with scores from 0 to 10 and a column of no meaning."""
    tables = [read_korsts(SAMPLES / f"KorSTS/sts-{split}.tsv") for split in splits]
    table = pd.concat(tables, ignore_index=True)
    return table.assign(score=(10 * table["score"]).round(2), note="a, b")


def write(table: pd.DataFrame, path: Path) -> Path:
    """Writes a table in the form that the name says, columns turned round."""
    table = table[table.columns[::-1]]
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif path.suffix in (".json", ".jsonl"):
        is_lines = path.suffix == ".jsonl"
        table.to_json(path, orient="records", lines=is_lines, force_ascii=False)
    else:
        options = {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        table.to_csv(path, index=False, **options)
    return path


def write_klue_sts(table: pd.DataFrame, path: Path) -> Path:
    """Writes pairs with scores from 0 to 10 in the form of KLUE-STS, whose scores end at 5."""
    items = [
        {"guid": f"sample-{n}", "source": "sample", "sentence1": row.sentence1,
         "sentence2": row.sentence2,
         "labels": {"label": row.score / 2, "real-label": row.score / 2,
                    "binary-label": int(row.score >= 6)}}
        for n, row in enumerate(table.itertuples())
    ]  # fmt: skip
    path.write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    return path


def sample_triplets(rows: int, kind: str = "triplets") -> pd.DataFrame:
    texts = sample_pairs("train")
    table = texts.rename(columns={"sentence1": "anchor", "sentence2": "positive"})
    table["negative"] = [f"{text} 아니다" for text in texts["sentence2"]]
    return table[["anchor", "positive", *["negative"] * (kind == "triplets")]].head(rows)


# --- Forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_pairs(form: str, tmp_path: Path) -> None:
    pairs = sample_pairs("train")
    table, scale = read_pairs(write(pairs, tmp_path / f"mine.{form}"), 10)
    expected = pairs[["sentence1", "sentence2"]].assign(score=pairs["score"] / 10)
    pd.testing.assert_frame_equal(table, expected.astype(table.dtypes))
    assert scale == 10 and table["score"].dtype == np.float64


@pytest.mark.parametrize("form", FORMS)
def test_other_columns_are_left_alone_whatever_their_name(form: str, tmp_path: Path) -> None:
    pairs = sample_pairs("train")
    other = pairs.assign(labels="x", source="mine", anchor="y", guid=1)
    expected, _ = read_pairs(write(pairs, tmp_path / f"mine.{form}"), 10)
    table, _ = read_pairs(write(other, tmp_path / f"other.{form}"), 10)
    pd.testing.assert_frame_equal(table, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_each_form_gives_the_same_triplets(kind: str, form: str, tmp_path: Path) -> None:
    expected = sample_triplets(20, kind)
    table = read_triplets(write(expected.assign(note=1), tmp_path / f"mine.{form}"))
    assert table.values.tolist() == expected.values.tolist()
    assert list(table.columns) == list(expected.columns)


def test_korsts_and_klue_sts_are_known_by_their_content(tmp_path: Path) -> None:
    korsts = shutil.copy(SAMPLES / "KorSTS/sts-dev.tsv", tmp_path / "any.txt")
    table, scale = read_pairs(korsts, None)
    pd.testing.assert_frame_equal(table, read_korsts(korsts))
    assert scale == 5
    klue, scale = read_pairs(write_klue_sts(sample_pairs("dev"), tmp_path / "klue.json"), 10)
    pd.testing.assert_frame_equal(klue, table, atol=1e-3)
    assert scale == 5


def test_what_a_spreadsheet_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    text = (
        "\ufeffscore,번호, sentence1 ,sentence2,\r\n\r\n"
        '4.5,1,"안녕, 하세요","그는 ""네""라고\n했다",\r\n'
        ",,,,\r\n 0 ,2,키 5' 9\" 사람,NA,\r\n\r\n"
    )
    path.write_bytes(text.encode())
    table, _ = read_pairs(path, 5)
    assert table.values.tolist() == [
        ["안녕, 하세요", '그는 "네"라고\n했다', 0.9],
        ["키 5' 9\" 사람", "NA", 0.0],
    ]


def test_quotes_are_text_in_a_tsv_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text('score\tsentence1\tsentence2\n1\t"가, 나"\t다\n\n2\t라 "마"\t바\n')
    table, _ = read_pairs(path, 5)
    assert table["sentence1"].tolist() == ['"가, 나"', '라 "마"']
    assert f"note: {path}: 1 texts stand in quotes" in capsys.readouterr().err


HEADER = "sentence1,sentence2,score\n"
COLUMNS = (
    "; it should have sentence1, sentence2, score (any order), or be a KorSTS or KLUE-STS file"
)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "", ": the file is empty"),
        ("a.csv", "\ufeff\r\n", ": the file is empty"),
        ("a.csv", HEADER, ":1: a header and no rows"),
        ("a.csv", HEADER + "\n,,\n", ":1: a header and no rows"),
        ("a.csv", "sentence1;sentence2;score\na;b;1\n",
         f":1: no column sentence1, sentence2, score{COLUMNS}"),
        ("a.csv", "\nsentence1,Score,sentence2\na,1,b\n", f":2: no column score{COLUMNS}"),
        ("a.csv", "score," + HEADER + "1,a,b,1\n", ":1: column score more than once"),
        ("a.csv", HEADER + "가, 나,다,1\n", ":2: 4 fields, not 3: quote text that has commas"),
        ("a.csv", HEADER + "\n가,나,높음\n", ":3: score '높음' is not a number from 0 up"),
        ("a.csv", HEADER + '"가\n가",나,1\n가,나,-1\n', ":4: score '-1' is not a number from 0 up"),
        ("a.csv", HEADER + "가,나,nan\n", ":2: score 'nan' is not a number from 0 up"),
        ("a.csv", HEADER + "가,나,1\n가,나,5.5\n", ":3: score 5.5 is above --max_score 5"),
        ("a.csv", HEADER + "가,나,inf\n", ":2: score inf is above --max_score 5"),
        ("a.csv", HEADER + "가, ,1\n", ":2: sentence2 is blank"),
        ("a.csv", HEADER + '가,나,1\n"가,나,1\n다,라,1\n',
         ":3: not CSV: unexpected end of data: is a quote left open, or one not doubled?"),
        ("a.csv", HEADER + '"가" 나,다,1\n',
         ":2: not CSV: ',' expected after '\"': is a quote left open, or one not doubled?"),
        ("a.csv", (HEADER + "가,나,1\n").encode("cp949"), ":2: byte 0xb0 is not UTF-8"),
        ("a.tsv", "sentence1\tsentence2\tscore\na\tb\n", ":2: 2 fields, not 3"),
        ("a.tsv", "sentence1\tsentence2\na\tb\n", f":1: no column score{COLUMNS}"),
        ("a.jsonl", '{"sentence1": "a"}\n\n{"sentence1"\n',
         ":3: not JSON: Expecting ':' delimiter"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "score": "4"}\n[]\n',
         ":2: not an object"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "score": true}\n',
         ":1: score True is not a number from 0 up"),
        ("a.jsonl", '{"sentence1": 3, "sentence2": "b", "score": 1}\n',
         ":1: sentence1 is missing, blank or not text"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a"}',
         ":2: sentence2 is missing, blank or not text\n"
         "FILE:2: score None is not a number from 0 up"),
        ("a.json", '[{"sentence1": "a", "sentence2": "\\ud83d", "score": 1}]',
         ": item 1: sentence2 is not Unicode text: half of a surrogate pair"),
        ("a.json", "[]", ": should be a JSON list of objects, or an object a line"),
        ("a.json", '[{"sentence1": "a"}]', f": no column sentence2, score{COLUMNS}"),
        ("a.parquet", b"PAR1 none", ": not Parquet: "),
    ],
)  # fmt: skip
def test_defects_of_pairs(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_pairs(path, 5)
    said = str(error.value).replace(str(path), "FILE")
    assert said.startswith(f"FILE{says}") if says.endswith("Parquet: ") else said == f"FILE{says}"


def test_defects_of_parquet_are_told_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = {"sentence1": ["a", None], "sentence2": ["b", "c"], "score": [1.0, None]}
    pd.DataFrame(rows).to_parquet(path)
    with pytest.raises(UserError) as error:
        read_pairs(path, 5)
    assert str(error.value).splitlines() == [
        f"{path}: row 2: sentence1 is missing, blank or not text",
        f"{path}: row 2: score nan is not a number from 0 up",
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("sentence1,sentence2\na,b\n", ":1: no column anchor, positive; it should have anchor, "),
        ("anchor,positive,negative\na,b,\n", ":2: negative is blank"),
    ],
)
def test_defects_of_triplets(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_nli_triplets([path], 1)
    assert str(error.value).startswith(f"{path}{says}")


def test_kornli_joins_triplets_and_no_pairs(tmp_path: Path) -> None:
    kornli = SAMPLES / "KorNLI/multinli.train.ko.tsv"
    own = write(sample_triplets(5), tmp_path / "own.jsonl")
    alone, _ = read_nli_triplets([kornli], 777)
    table, records = read_nli_triplets([own, kornli], 777)
    assert table[5:].values.tolist() == alone.values.tolist()  # the seed draws what it drew
    assert records[0]["rows"] == 5
    pairs = write(sample_triplets(5, "pairs"), tmp_path / "pairs.csv")
    with pytest.raises(UserError, match=r"pairs\.csv: 2 columns, and .* has 3 columns"):
        read_nli_triplets([kornli, pairs], 777)


# --- Splits ----------------------------------------------------------------------------------


def test_a_dev_share_shares_no_sentence_and_is_the_seeds() -> None:
    generator = np.random.default_rng(0)
    names = np.array([f"문장 {number}" for number in range(300)])
    drawn = generator.integers(0, 300, size=(200, 2))
    table = pd.DataFrame(names[drawn], columns=["sentence1", "sentence2"]).assign(score=0.5)
    train, dev = split_off(table, 0.1, 777)
    assert len(dev) == 20 and len(train) == 180
    texts = [{*part["sentence1"], *part["sentence2"]} for part in (train, dev)]
    assert not texts[0] & texts[1]
    assert split_off(table, 0.1, 777)[1].equals(dev)
    assert not split_off(table, 0.1, 778)[1].equals(dev)
    # One group of all pairs cannot be split.
    table["sentence1"] = "같은 문장"
    assert split_off(table, 0.5, 777)[1].empty


def test_overlap_tells_pairs_in_either_order_from_sentences() -> None:
    dev = pd.DataFrame({"sentence1": ["a", "e"], "sentence2": ["b", "e"], "score": 0.5})
    rows = [["b", "a"], ["a", "c"], ["c", "d"], ["a", "e"], ["e", "e"]]
    table = pd.DataFrame(rows, columns=["sentence1", "sentence2"]).assign(score=0.1)
    pairs, sentences = overlap(table, [dev])
    assert pairs.tolist() == [True, False, False, False, True]
    assert sentences.tolist() == [True, True, False, True, True]
    triplets = pd.DataFrame([["a", "c", "b"], ["c", "a", "b"]], columns=list("apn"))
    assert overlap(triplets, [dev])[0].tolist() == [True, False]


# --- Through the command lines ---------------------------------------------------------------

SHORT = ["--max_steps", 2, "--run_dir", "run"]


# Of the forms, which above give the same tables, one of text and one of bytes.
@pytest.mark.parametrize("name", ["mine.csv", "mine.parquet", "klue.json", "korsts.tsv"])
def test_files_of_pairs_train(name: str, encoder: Path, tmp_path: Path) -> None:
    paths = {}
    for split in ("train", "dev", "test"):
        path = paths[split] = tmp_path / f"{split}-{name}"
        if name == "korsts.tsv":
            shutil.copy(SAMPLES / f"KorSTS/sts-{split}.tsv", path)
        else:
            (write_klue_sts if name == "klue.json" else write)(sample_pairs(split), path)
    options = [*SHORT, "--data_dir", tmp_path / "nowhere"]
    options += [] if name in ("klue.json", "korsts.tsv") else ["--max_score", 10]
    for split, path in paths.items():
        options += [f"--{split}_file", path]
    done = run("training_sts.py", encoder, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stored = (tmp_path / "run/run.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in stored
    content = json.loads(stored)
    assert content["options"]["train_file"] == [f"train-{name}"]
    assert f"--train_file train-{name} --dev_file dev-{name}" in content["command"]
    assert [(r["split"], r["file"], r["blob_id"], r["rows"]) for r in content["data"]] == [
        (split, f"{split}-{name}", blob_id(path), 96 if split == "train" else 48)
        for split, path in paths.items()
    ]
    for line in done.stdout.splitlines():
        if "pearman" in line and not line.startswith("cosine_pearson"):
            assert f"dev-{name}" in line or f"test-{name}" in line
    assert f"test-{name}, 48 pairs, x100:" in done.stdout
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert (scores["dev_file"], scores["test_file"]) == (f"dev-{name}", f"test-{name}")
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    assert f"Training data: `train-{name}` (96 rows).\n" in card
    assert "cc-by-sa" not in card and "KorSTS test" not in card


def test_each_form_gives_the_same_weights(encoder: Path, tmp_path: Path) -> None:
    ends = []
    for name in ("mine.csv", "mine.parquet"):
        path = write(sample_pairs("train"), tmp_path / name)
        options = ["--train_file", path, "--max_score", 10, "--max_steps", 2, "--no_test"]
        done = run("training_sts.py", encoder, *options, "--run_dir", tmp_path / path.suffix)
        assert done.returncode == 0, done.stderr
        ends.append(weights(tmp_path / path.suffix))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize(("kind", "form"), [("pairs", "jsonl"), ("triplets", "parquet")])
def test_files_for_nli_train(kind: str, form: str, encoder: Path, tmp_path: Path) -> None:
    path = write(sample_triplets(90, kind), tmp_path / f"{kind}.{form}")
    options = [*SHORT, "--batch_size", 16, "--no_test", "--train_files", path]
    done = run("training_nli.py", encoder, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/run.json").read_text())["data"][0]
    assert (record["file"], record["rows"], record["split"]) == (path.name, 90, "train")
    assert "sts-dev.tsv, best" in done.stdout


def test_both_tasks_take_files_and_dev_is_split_off_for_both(encoder: Path, tmp_path: Path) -> None:
    pairs = write(sample_pairs("train"), tmp_path / "pairs.csv")
    triplets = write(sample_triplets(90), tmp_path / "triplets.jsonl")
    options = [*SHORT, "--train_file", pairs, "--max_score", 10, "--train_files", triplets]
    options += ["--nli_batch_size", 16, "--dev_share", 0.2, "--no_test"]
    done = run("training_multi-task.py", encoder, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "19 of 96 pairs are split off as dev" in done.stderr
    # Dev's sentences stand in the triplets, which come from the same pairs.
    assert "note: triplets.jsonl: of 90 rows 1" in done.stderr
    assert "0.2 of pairs.csv, best" in done.stdout
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert (scores["dev_file"], scores["dev_pairs"]) == ("0.2 of pairs.csv", 19)


def test_korsts_and_klue_sts_train_together(encoder: Path, tmp_path: Path) -> None:
    """Small files in the forms of the two: what docs/own_data.md says of them."""
    klue = write_klue_sts(sample_pairs("dev"), tmp_path / "klue-sts-v1.1_train.json")
    korsts = SAMPLES / "KorSTS/sts-train.tsv"
    options = [*SHORT, "--train_file", korsts, klue, "--dev_file", SAMPLES / "KorSTS/sts-test.tsv"]
    done = run("training_sts.py", encoder, *options, "--no_test", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "run/run.json").read_text())["data"]
    assert [(r["file"], r["rows"]) for r in records] == [
        ("sts-train.tsv", 96), ("klue-sts-v1.1_train.json", 48), ("sts-test.tsv", 48),
    ]  # fmt: skip
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    assert "license: cc-by-sa-4.0" in card and "`klue-sts-v1.1_train.json` (48 rows)" in card


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--train_file", "a.csv"], "a.csv: of what scale are its scores? Give the highest one "),
        (["--train_file", "a.csv", "--max_score", 3], "a.csv:2: score 7 is above --max_score 3"),
        (["--train_file", "none.csv"], "none.csv: no such file"),
        (["--max_score", 10], "--max_score 10: no file here needs it"),
        (["--max_score", 0], "--max_score 0.0: must be above 0"),
        (["--dev_share", 1], "--dev_share 1.0: must be above 0 and below 1"),
        (["--dev_share", 0.1, "--dev_file", "a.csv"], "--dev_share and --dev_file: one of them"),
        (["--dev_share", 0.01], "0.01 of sts-train.tsv: "),
        (["--data_dir", "."], "KorSTS/sts-train.tsv: no such file; --train_file gives others"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_asked_for(
    options: list, says: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(HEADER + "가,나,7\n다,라,1\n")
    model = tmp_path / "nowhere/model"
    done = run("training_sts.py", model, *options, *SHORT, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    *notes, line = done.stderr.splitlines()
    assert line.startswith(f"error: {says}")
    assert all(note.startswith(("note: ", "1 of 96", "0 of 96")) for note in notes)
    assert not (tmp_path / "run").exists()


def test_what_is_in_dev_or_test_is_counted_and_left_out(encoder: Path, tmp_path: Path) -> None:
    dev, test = (sample_pairs(split).drop(columns="note") for split in ("dev", "test"))
    turned = dev.head(3).rename(columns={"sentence1": "sentence2", "sentence2": "sentence1"})
    mixed = pd.DataFrame({"sentence1": test["sentence1"][:4], "sentence2": "새 문장", "score": 1})
    train = pd.concat([sample_pairs("train").drop(columns="note"), turned, mixed])
    path = write(train, tmp_path / "train.csv")
    options = ["--train_file", path, "--max_score", 10, "--max_steps", 2]
    said = {}
    for what in (None, "pairs", "sentences"):
        more = ["--leave_out", what] if what else []
        done = run("training_sts.py", encoder, *options, *more, "--run_dir", tmp_path / str(what))
        assert done.returncode == 0, done.stderr
        said[what] = next(line for line in done.stderr.splitlines() if "train.csv: " in line)
    files = "of sts-dev.tsv or sts-test.tsv"
    assert said == {
        None: f"note: train.csv: of 103 rows 3 hold a pair and 7 a sentence {files}; --leave_out "
        "pairs or sentences leaves them out",
        "pairs": f"train.csv: 3 of 103 rows left out: a pair {files}",
        "sentences": f"train.csv: 7 of 103 rows left out: a sentence {files}",
    }
    # Without the test set other rows stay: that is another run.
    edit_json(tmp_path / "pairs/run.json", finished=None)
    options += ["--leave_out", "pairs", "--run_dir", tmp_path / "pairs", "--resume", "--no_test"]
    done = run("training_sts.py", encoder, *options)
    assert done.returncode == 2 and "--no_test is True now and was False" in done.stderr


def test_a_resume_wants_the_same_contents_under_any_name(encoder: Path, tmp_path: Path) -> None:
    first = write(sample_pairs("train"), tmp_path / "first.csv")
    other = write(sample_pairs("test"), tmp_path / "other.csv")
    options = ["--max_score", 10, "--max_steps", 2, "--no_test", "--run_dir", tmp_path / "run"]
    done = run("training_sts.py", encoder, "--train_file", first, *options)
    assert done.returncode == 0, done.stderr
    edit_json(tmp_path / "run/run.json", finished=None)
    for files, status in (([other], 2), ([first, other], 2), ([tmp_path / "moved.csv"], 0)):
        if status == 0:
            first.rename(*files)
        more = ["--train_file", *files, "--resume"]
        done = run("training_sts.py", encoder, *more, *options)
        assert done.returncode == status, done.stderr
        assert ("other.csv: another content than the run in " in done.stderr) == (status == 2)


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("training_sts.py", "--train_file"),
        ("training_nli.py", "--train_files"),
        ("training_multi-task.py", "--train_file"),
        ("training_multi-task.py", "--train_files"),
    ],
)
def test_of_train_files_given_one_by_one_each_is_read(
    script: str, option: str, encoder: Path, tmp_path: Path
) -> None:
    rows = sample_pairs("train") if option == "--train_file" else sample_triplets(20)
    good = write(rows, tmp_path / "good.csv")
    bad = write(rows.replace({rows.columns[1]: {rows.iloc[2, 1]: " "}}), tmp_path / "bad.csv")
    scale = ["--max_score", 10] if option == "--train_file" else []
    for files in ((good, bad), (bad, good)):
        more = [part for file in files for part in (option, file)]
        done = run(script, encoder, *more, *scale, "--run_dir", tmp_path / "run")
        says = f"error: {bad}:4: {rows.columns[1]} is blank"
        assert done.returncode == 2 and done.stderr.splitlines()[-1] == says


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """A CSV of 200 rows as a spreadsheet leaves it: BOM, CRLF, quotes, commas, blank lines."""
    path = tmp_path / "내 표.csv"
    pairs = sample_pairs("train", "dev", "test")
    more = pairs.head(8).assign(sentence2=['그는 "네, 그래요"라고 했다', "줄이\n바뀐다"] * 4)
    more["sentence1"] = [f"{number}번, 새 문장" for number in range(8)]
    lines = pd.concat([pairs, more]).to_csv(index=False).split("\n")
    lines[50:50] = ["", ",,,"]
    content = "\r\n".join([*lines, ",,,", ""])
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    return path


def test_a_spreadsheet_of_200_rows_trains_v2_goes_on_and_is_delivered(
    sheet: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_checkpoint(monkeypatch)
    table, _ = read_pairs(sheet, 10)
    assert len(table) == 200 and '그는 "네, 그래요"라고 했다' in set(table["sentence2"])
    options = ["--train_file", sheet, "--max_score", 10, "--dev_share", 0.1, "--no_test"]
    options += ["--loss", "pearson", "--batch_size", 32, "--learning_rate", 1e-3]
    options += ["--prompt", "문장: ", "--save_steps", 2, "--average_checkpoints", 3]
    options += ["--start_weight", 0.25, "--max_steps", 12]
    whole, folder = tmp_path / "whole", tmp_path / "mine"
    done = run("training_sts.py", encoder, *options, "--run_dir", whole)
    assert done.returncode == 0, done.stderr
    assert "20 of 200 pairs are split off as dev" in done.stderr
    assert "0.1 of 내 표.csv before training" in done.stdout
    assert json.loads((whole / "scores.json").read_text())["dev_pairs"] == 20
    # What a kill behind step 8 leaves.
    shutil.copytree(whole, folder)
    for checkpoint in checkpoints(folder / "checkpoints"):
        if step_of(checkpoint) > 8:
            shutil.rmtree(checkpoint)
    edit_json(folder / "run.json", finished=None)
    (folder / "modules.json").unlink()
    done = run("training_sts.py", encoder, *options, "--run_dir", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr and "checkpoint-8" in done.stderr
    assert all(torch.equal(v, weights(whole)[name]) for name, v in weights(folder).items())

    results = ["--data_dir", SAMPLES, "--results_dir", tmp_path / "results"]
    done = run_script("benchmark.py", folder, *results)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results/mine.json").read_text())
    assert result["prompt"] == "문장: " and result["data"]["rows"] == 48
    target = tmp_path / "onnx/mine.onnx"
    done = run_script("onnx/export_onnx.py", "--model", folder, "--output", target)
    assert done.returncode == 0, done.stderr
    assert target.is_file()
