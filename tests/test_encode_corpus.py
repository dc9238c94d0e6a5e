"""examples/encode_corpus.py: its real command on small files, kills, and errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import REPOSITORY, SAMPLES, Started
from encoders import edit_json, write_plain_encoder
from filelock import FileLock
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

pytest.importorskip(
    "ray", reason="examples/encode_corpus.py needs ray[data]: examples/requirements"
)
SCRIPT = REPOSITORY / "examples/encode_corpus.py"
sys.path.append(str(SCRIPT.parent))

import encode_corpus  # noqa: E402

pytestmark = pytest.mark.slow
MARK = f"ENCODE_CORPUS_TEST_{uuid.uuid4().hex}"  # a variable of what these tests start


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def processes() -> list[int]:
    """Returns what Ray started for these tests, zombies left out."""
    mark, found = f"{MARK}=".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # ended, or another user's
            continue
    return found


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    end = time.monotonic() + 20
    while processes() and time.monotonic() < end:
        time.sleep(0.2)
    assert not processes()


def start(*options: object, cwd: Path, encoding: str = "utf-8") -> Started:
    return Started(SCRIPT, *options, cwd=cwd, environment={MARK: "1"}, encoding=encoding)


def run(*options: object, cwd: Path, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    process = start(*options, cwd=cwd, encoding=encoding)
    said = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def sentences() -> list[str]:
    table = pd.read_csv(SAMPLES / "KorSTS/sts-train.tsv", sep="\t", quoting=3)
    return [*table["sentence1"], *table["sentence2"]]


def embeddings(table: pd.DataFrame) -> np.ndarray:
    return np.stack(table["embedding"].dropna())


def read_parts(folder: Path, stem: str = "corpus") -> pa.Table:
    parts = sorted(folder.glob(f"part-{stem}-*.parquet"))
    assert [part.name for part in parts] == [
        f"part-{stem}-{number:06d}.parquet" for number in range(len(parts))
    ]
    return pa.concat_tables(pq.read_table(part, partitioning=None) for part in parts)


# --- What comes out --------------------------------------------------------------------------


def test_parquet_gets_the_embeddings_of_a_plain_encode(tiny: Path, tmp_path: Path) -> None:
    texts: list[str | None] = sentences()[:150]
    texts[7] = texts[149] = None
    texts[50:100] = [None] * 50  # one part without any text
    texts[3] = ""
    table = pa.table(
        {
            "id": pa.array(range(150), pa.int16()),
            "문장": pa.array(texts).dictionary_encode(),
            "tags": [["a", None], None, []] * 50,
            "when": pa.array(range(150), pa.timestamp("ns", tz="Asia/Seoul")),
            "vector": pa.array([[1.5, 2.5]] * 150, pa.list_(pa.float16(), 2)),
        }
    ).replace_schema_metadata({"made by": "a test"})
    pq.write_table(table, tmp_path / "corpus.parquet", row_group_size=40)
    options = ["corpus.parquet", "--text_column", "문장", "--rows_per_part", 50, "--output", "out"]
    done = run(*options, "--model", tiny, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"corpus.parquet: 150 rows, 52 of them without a text\n"
        r"98 texts in \d+\.\d s, [\d,]+ a second \(\d+\.\d s with Ray's start\): out\n",
        done.stdout,
    )
    assert "Traceback" not in done.stderr
    assert "WARNING" not in done.stderr
    assert "150/150" in done.stderr  # the progress bar

    found = read_parts(tmp_path / "out")
    assert found.drop_columns("embedding").equals(table.combine_chunks())
    assert found.schema.metadata[b"made by"] == b"a test"
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    has_text = [text is not None for text in texts]
    assert found["embedding"].is_valid().to_pylist() == has_text
    expected = SentenceTransformer(str(tiny)).encode([text for text in texts if text is not None])
    in_pandas = pd.read_parquet(tmp_path / "out")
    np.testing.assert_allclose(embeddings(in_pandas), expected, atol=1e-5)

    # Again: nothing is done.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = run(*options, "--model", tiny, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith("all 150 rows are there, nothing to do: out\n")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_json_lines_become_columns_and_int8_has_one_scale(tiny: Path, tmp_path: Path) -> None:
    texts = sentences()[:120]
    rows: list[dict] = [{"text": text, "n": number} for number, text in enumerate(texts)]
    rows[2]["text"], rows[3]["text"], rows[4] = None, ["가", 1], {"n": 4}
    rows[100] |= {"n": 0.5, "more": {"a": "나"}}  # seen late: a wider type, a new column
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines.insert(1, "")
    (tmp_path / "corpus.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    (tmp_path / "second.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    done = run("corpus.jsonl", "second.jsonl", "--model", tiny, "--rows_per_part", 30, "--output",
               "out", "--dim", 16, "--normalize", "--embedding_precision", "int8",
               "--threads", 2, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "corpus.jsonl: 120 rows, 3 of them without a text\n"
        "second.jsonl: 1 rows, 0 of them without a text\n118 texts in "
    )
    found = read_parts(tmp_path / "out")
    assert found.column_names == ["text", "n", "more", "embedding"]
    assert found["n"].to_pylist() == [float(row["n"]) for row in rows]
    assert found["more"].to_pylist() == [row.get("more") for row in rows]
    strings = [*texts[:2], None, '["가", 1]', None, *texts[5:]]
    assert found["text"].to_pylist() == strings
    assert found.schema.field("embedding").type == pa.list_(pa.int8(), 16)

    table = found.to_pandas()
    assert table.index[table["embedding"].isna()].tolist() == [2, 3, 4]
    model = SentenceTransformer(str(tiny), truncate_dim=16)
    kept = [*texts[:2], *texts[5:]]
    plain = model.encode(kept, normalize_embeddings=True)
    ranges = np.array(json.loads((tmp_path / "out/_manifest.json").read_text())["ranges"])
    np.testing.assert_allclose(ranges, [plain.min(0), plain.max(0)], atol=1e-6)
    expected = quantize_embeddings(plain, "int8", ranges=ranges)
    # A value on the edge of a step may fall to either side.
    assert np.abs(embeddings(table).astype(int) - expected).max() <= 1
    assert (embeddings(table) == expected).mean() > 0.99
    second = read_parts(tmp_path / "out", "second")
    assert second.schema.equals(found.schema)
    assert second["embedding"].to_pylist() == found["embedding"].to_pylist()[:1]


def write_prompted(source: Path, folder: Path, prompts: dict, default: str | None = None) -> None:
    model = SentenceTransformer(str(source), prompts=prompts, default_prompt_name=default)
    model.save_pretrained(str(folder), create_model_card=False)


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({"query": "질문 ", "document": "문서 "}, None, "문서 "),
        ({"query": "질문 ", "passage": "글 "}, None, "글 "),
        ({"sts": "비슷한 글 ", "document": "문서 "}, "sts", "문서 "),
        ({"sts": "비슷한 글 "}, "sts", "비슷한 글 "),
        ({"query": "질문 "}, None, ""),
    ],
)
def test_texts_get_the_prompt_of_documents_or_the_default_one(
    prompts: dict[str, str], default: str | None, expected: str, tiny: Path, tmp_path: Path
) -> None:
    texts = sentences()[:40]
    pq.write_table(pa.table({"text": texts}), tmp_path / "corpus.parquet")
    write_prompted(tiny, tmp_path / "model", prompts, default)
    args = Namespace(files=[tmp_path / "corpus.parquet"], text_column="text", rows_per_part=40,
                     model=str(tmp_path / "model"), output=tmp_path, batch_size=32, dim=None,
                     normalize=False, embedding_precision="float32")  # fmt: skip
    model = encode_corpus.load_model(args)
    probe = model.encode_document(encode_corpus.PROBE).tolist()
    manifest = {"dimension": 32, "ranges": None, "probe": probe, "model": "model"}
    corpus = encode_corpus.Corpus(args)
    encoder = encode_corpus.Encoder(args, corpus, manifest, torch.get_num_threads())
    assert encoder(corpus.parts[0])["texts"] == 40
    plain = SentenceTransformer(str(tiny)).encode([expected + text for text in texts])
    np.testing.assert_allclose(embeddings(read_parts(tmp_path).to_pandas()), plain, atol=1e-5)


# --- Stopped and begun again -----------------------------------------------------------------


def start_and_stop(how: signal.Signals, after: int, *options: object, cwd: Path) -> tuple[int, str]:
    """Sends the signal once so many parts are there. Returns exit status and stderr."""
    process = start(*options, cwd=cwd)
    end = time.monotonic() + 100
    while len(list(cwd.glob("out/part-*"))) < after and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(how)
    _, stderr = process.communicate()
    return process.returncode, stderr


def test_killed_or_stopped_it_goes_on_without_losing_or_doubling_a_row(
    tiny: Path, tmp_path: Path
) -> None:
    texts = (40 * sentences())[:6000]
    table = pa.table({"text": texts, "id": range(6000)})
    pq.write_table(table, tmp_path / "corpus.parquet")
    options = ["corpus.parquet", "--model", tiny, "--output", "out", "--rows_per_part", 40,
               "--workers", 2, "--threads", 1]  # fmt: skip
    out, seen = tmp_path / "out", {}
    for how, after in ((signal.SIGKILL, 5), (signal.SIGINT, 20)):
        status, stderr = start_and_stop(how, after, *options, cwd=tmp_path)
        assert status == (130 if how == signal.SIGINT else -signal.SIGKILL), stderr
        if how == signal.SIGINT:
            assert stderr.splitlines()[-1] == "stopped: the same command goes on"
            assert "Traceback" not in stderr
        end = time.monotonic() + 20
        while processes() and time.monotonic() < end:
            time.sleep(0.2)
        parts = {part: part.stat().st_mtime_ns for part in out.glob("part-*")}
        assert after <= len(parts) < 150
        assert seen.items() <= parts.items()  # a finished part is not written again
        assert all(pq.read_metadata(part).num_rows == 40 for part in parts)  # and it is whole
        seen = parts
    # What a kill may leave: a file that never got its name.
    (out / f".part-corpus-000149.parquet.{uuid.uuid4().hex}").write_bytes(b"PAR1")

    done = run(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{6000 - 40 * len(seen):,} texts in " in done.stdout
    assert seen.items() <= {part: part.stat().st_mtime_ns for part in out.glob("part-*")}.items()
    assert {path.name[0] for path in out.iterdir()} == {"_", "p"}
    found = read_parts(out)
    assert found["id"].to_pylist() == list(range(6000))
    expected = SentenceTransformer(str(tiny)).encode(texts[:200])
    np.testing.assert_allclose(embeddings(found.to_pandas())[:200], expected, atol=1e-5)


def test_a_full_disk_is_one_line_and_takes_nothing(tiny: Path, tmp_path: Path) -> None:
    # A disk of 512 KB of our own: eight parts of more than 100 KB do not fit.
    generator = np.random.default_rng(777)
    noise = pa.array([generator.bytes(1000) for _ in range(800)])
    table = pa.table({"text": (9 * sentences())[:800], "noise": noise})
    pq.write_table(table, tmp_path / "corpus.parquet")
    (tmp_path / "out").mkdir()
    options = f"corpus.parquet --model {tiny} --output out --rows_per_part 100"
    script = f"""
        mount -t tmpfs -o size=512k none out || exit 77
        {sys.executable} {SCRIPT} {options}; echo "status $?"; ls -A out; umount out"""
    namespace = ["unshare", "--mount", "--map-root-user", "bash", "-c", script]
    environment = os.environ | {MARK: "1"}
    done = subprocess.run(namespace, capture_output=True, text=True, env=environment, cwd=tmp_path)
    if "status" not in done.stdout:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    printed, names = done.stdout.split("status 1\n")
    assert "texts in" not in printed
    left = names.split()
    assert left[0] == "_manifest.json"
    assert 2 <= len(left) < 9
    assert all(name.startswith("part-corpus-") for name in left[1:])  # nothing unfinished
    assert re.fullmatch(
        r"error: part-corpus-00000\d.parquet: .*No space left on device.*",
        done.stderr.splitlines()[-1],
    )
    assert "Traceback" not in done.stderr


# --- What is refused -------------------------------------------------------------------------


class Run:
    """Calls the script in this process: nothing that it refuses may come as far as Ray."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr(encode_corpus, "start_ray", lambda *_: pytest.fail("Ray is started"))

    def refuse(self, *options: object) -> tuple[object, str]:
        """Returns exit status and the last line on stderr."""
        self.monkeypatch.setattr(sys, "argv", ["encode_corpus.py", *map(str, options)])
        with pytest.raises(SystemExit) as end:
            encode_corpus.main()
        stderr = self.capsys.readouterr().err
        assert "Traceback" not in stderr
        return end.value.code, stderr.splitlines()[-1]

    def begin(self, *options: object) -> None:
        """Begins an output folder, or goes on in it, and is stopped before anything is encoded."""

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with self.monkeypatch.context() as monkeypatch:
            monkeypatch.setattr(encode_corpus, "start_ray", stop)
            assert self.refuse(*options) == (130, "stopped: the same command goes on")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    return Run(tmp_path, monkeypatch, capsys)


NOT_UTF8 = pa.array([b"\xb0\xa1"], pa.binary()).view(pa.string())
GOOD = '{"text": "가", "n": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", None, "a.parquet: No such file or directory"),
        ("a.csv", b"text\n", "a.csv: all names must end in .parquet, or all in .jsonl"),
        ("a.parquet", b"PAR1 this is none", "a.parquet: Parquet magic bytes not found"),
        ("a.parquet", b"", "a.parquet: Parquet file size is 0 bytes"),
        ("a.parquet", {"body": ["가"]}, "a.parquet: no --text_column 'text' in ['body']"),
        ("a.parquet", {"text": [1]}, "a.parquet: column 'text' holds int64, not strings"),
        ("a.parquet", {"text": ["가"], "embedding": [0]}, "a.parquet: there is a column 'embedd"),
        (
            "a.parquet",
            pa.table([["가"], ["나"]], names=["text", "text"]),
            "a.parquet: 2 --text_column 'text' in ['text', 'text']",
        ),
        ("a.parquet", {"text": NOT_UTF8}, "a.parquet: In column 0: Invalid: Invalid UTF8 sequence"),
        ("\udcb0\udca1.jsonl", GOOD, "??.jsonl: 'utf-8' codec can't encode characters in position"),
        ("a.jsonl", b"", "a.jsonl: no --text_column 'text' in []"),
        ("a.jsonl", GOOD * 2 + '{"text": "나', "a.jsonl:3: not JSON: Unterminated string"),
        ("a.jsonl", GOOD + "\n[1]\n", "a.jsonl:3: not a JSON object"),
        ("a.jsonl", GOOD.encode("cp949"), "a.jsonl:1: not JSON: 'utf-8' codec can't decode"),
        ("a.jsonl", GOOD * 3 + '{"n": "가"}', "a.jsonl:3-4: Could not convert '가' with type str"),
        ("a.jsonl", GOOD * 2 + '{"n": "가"}', "a.jsonl:3-3: Unable to merge: Field n has"),
        ("a.jsonl", GOOD + '{"text": "\\ud800"}', "a.jsonl:1-2: 'utf-8' codec can't encode"),
        ("a.jsonl", '{"text": "가", "n": {}}', "a.jsonl: Cannot write struct type 'n' with no"),
    ],
)
def test_a_bad_file_is_named(
    name: str, content: str | bytes | dict | pa.Table | None, says: str, script: Run
) -> None:
    if isinstance(content, (dict, pa.Table)):
        pq.write_table(pa.table(content), script.folder / name)
    elif content is not None:
        (script.folder / name).write_bytes(
            content.encode() if isinstance(content, str) else content
        )
    status, line = script.refuse(name, "--output", "out", "--model", "none", "--rows_per_part", 2)
    assert status == 2
    assert line.startswith(f"error: {says}")
    assert not (script.folder / "out").exists()


@pytest.mark.parametrize("kind", encode_corpus.STRINGS)
def test_each_kind_of_strings_is_read(kind: str, script: Run) -> None:
    texts = [None, None, None] if kind == "null" else ["가", None, ""]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), "a.parquet")
    args = Namespace(files=[Path("a.parquet")], text_column="text", rows_per_part=2)
    corpus = encode_corpus.Corpus(args)
    found = [corpus.read(part) for part in corpus.parts]
    assert [text for _, _, part in found for text in part] == [t for t in texts if t is not None]
    assert np.concatenate([has for _, has, _ in found]).tolist() == [t is not None for t in texts]


def test_another_run_does_not_go_into_the_same_output(script: Run, tiny: Path) -> None:
    rows = [{"text": text, "other": text[::-1]} for text in sentences()[:8]]
    lines = [json.dumps(row) + "\n" for row in rows]
    Path("corpus.jsonl").write_text("".join(lines))
    shutil.copytree(tiny, "model")
    out, same = script.folder / "out", ["corpus.jsonl", "--output", "out"]
    script.begin(*same, "--model", "model")
    before = (out / "_manifest.json").read_bytes()
    for options, says in [
        (["--dim", 16], "dimension 32, not 16"),
        (["--normalize"], "normalize False, not True"),
        (["--embedding_precision", "int8"], "embedding_precision float32, not int8"),
        (["--text_column", "other"], "text_column text, not other"),
        (["--rows_per_part", 7], "rows_per_part 2048, not 7"),
    ]:
        status, line = script.refuse(*same, "--model", "model", *options)
        assert (status, line) == (2, f"error: out: begun with {says}: give another --output")
    script.begin(*same, "--model", tiny)  # the same model at another place

    Path("corpus.jsonl").write_text("".join(lines[::-1]))
    status, line = script.refuse(*same, "--model", "model")
    assert (status, line.split(" files ")[0]) == (2, "error: out: begun with")
    Path("corpus.jsonl").write_text("".join(lines))
    write_plain_encoder(script.folder / "model", seed=1)  # another model in the same place
    says = "begun with another model, model: give another --output"
    assert script.refuse(*same, "--model", "model") == (2, f"error: out: {says}")
    shutil.rmtree("model")
    shutil.copytree(tiny, "model")
    edit_json(script.folder / "model/tokenizer_config.json", model_max_length=16)
    assert script.refuse(*same, "--model", "model") == (2, f"error: out: {says}")
    assert (out / "_manifest.json").read_bytes() == before


def test_an_output_that_is_no_place_for_it_stays_as_it_is(script: Run, tiny: Path) -> None:
    Path("corpus.jsonl").write_text(GOOD, encoding="utf-8")
    same = ["corpus.jsonl", "--model", tiny, "--output"]
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    says = "error: mine: something else is there: give another --output"
    assert script.refuse(*same, "mine") == (2, says)
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]
    status, line = script.refuse(*same, "mine/notes.txt/out")
    assert (status, "Not a directory" in line) == (1, True)
    assert Path("mine/notes.txt").read_text() == "mine"
    script.begin(*same, "out")
    with FileLock("out/.lock"):
        says = "error: out: another run is writing there"
        assert script.refuse(*same, "out") == (2, says)
    assert Path("out/.lock").exists()  # as a killed run leaves it
    script.begin(*same, "out")
    assert [path.name for path in Path("out").iterdir()] == ["_manifest.json"]


def test_a_manifest_of_something_else_is_one_line(script: Run, tiny: Path) -> None:
    Path("corpus.jsonl").write_text(GOOD, encoding="utf-8")
    same = ["corpus.jsonl", "--model", tiny, "--output", "out"]
    script.begin(*same)
    file = Path("out/_manifest.json")
    whole = file.read_bytes()
    begun = json.loads(whole)
    needed = [name for name in begun if name != "model"]  # which only tells whose it is
    without = [json.dumps({k: v for k, v in begun.items() if k != name}) for name in needed]
    probes = (
        3,
        "x" * 32,
        [None] * 32,
        [10**400] * 32,
        [[1], [1, 2]] * 16,
        {str(n): 1 for n in range(32)},
    )
    others = [json.dumps(begun | {"probe": probe}) for probe in probes]
    texts = [
        "",
        "[]",
        "3",
        "null",
        '"x"',
        "{}",
        100_000 * "[",
        json.dumps(begun | {"model_bytes": "x"}),
    ]
    cut = [whole[: len(whole) // 2], whole.replace(b"text", b"\xff")]
    says = "error: out: begun with something else, or its _manifest.json is damaged: give another"
    for content in [*cut, *(text.encode() for text in (*texts, *without, *others))]:
        file.write_bytes(content)
        assert script.refuse(*same) == (2, f"{says} --output")
        assert file.read_bytes() == content and len(list(Path("out").iterdir())) == 1
    file.write_bytes(whole)
    script.begin(*same)


def test_another_prompt_is_another_model(script: Run, tiny: Path) -> None:
    Path("corpus.jsonl").write_text(GOOD, encoding="utf-8")
    same = ["corpus.jsonl", "--output", "out", "--model", "model"]
    write_prompted(tiny, Path("model"), {"document": "문서 "})
    script.begin(*same)
    write_prompted(tiny, Path("model"), {"document": "글 "})
    says = "error: out: begun with another model, model: give another --output"
    assert script.refuse(*same) == (2, says)


def test_a_git_lfs_pointer_in_place_of_the_weights_is_named(script: Run, tiny: Path) -> None:
    Path("corpus.jsonl").write_text(GOOD, encoding="utf-8")
    shutil.copytree(tiny, "model")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 123\n"
    Path("model/model.safetensors").write_text(pointer)
    status, line = script.refuse("corpus.jsonl", "--output", "out", "--model", "model")
    assert status == 2
    assert line.startswith("error: model: model.safetensors is a Git-LFS pointer")
    assert not Path("out").exists()


def test_weights_that_do_not_fit_are_one_line(script: Run, tiny: Path) -> None:
    Path("corpus.jsonl").write_text(GOOD, encoding="utf-8")
    edit_json(Path(shutil.copytree(tiny, "model")) / "config.json", intermediate_size=96)
    status, line = script.refuse("corpus.jsonl", "--output", "out", "--model", "model")
    assert status == 2 and line.startswith("error: model: ") and "mismatched" in line
    Path("model/config.json").write_text("3")
    status, line = script.refuse("corpus.jsonl", "--output", "out", "--model", "model")
    assert status == 2 and line.startswith("error: model: ") and "'int'" in line
    assert not Path("out").exists()


def test_a_name_that_the_console_cannot_show_does_not_end_it(tmp_path: Path) -> None:
    (tmp_path / "여우🦊.jsonl").write_text(GOOD, encoding="utf-8")
    options = ["여우🦊.jsonl", "--output", "out", "--model", "models/nowhere"]
    done = run(*options, cwd=tmp_path, encoding="cp949")
    assert done.stdout == "여우?.jsonl: 1 rows, 0 of them without a text\n"
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: models/nowhere: no such folder")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--model", "models/nowhere"],
            "error: models/nowhere: no such folder, and not from the H",
        ),
        (["--dim", 33], "error: --dim 33: "),
        (["--dim", 0], "error: argument --dim: '0' is not a whole number above 0"),
        (["--embedding_precision", "int8"], "error: --embedding_precision int8: there is no text"),
        (["b.parquet"], "error: a.parquet: columns unlike those of b.parquet: give it an own run"),
        (["b/a.parquet"], "error: two files have the same name, and parts are named by it"),
    ],
)
def test_a_bad_option_is_one_line(options: list, says: str, script: Run, tiny: Path) -> None:
    Path("b").mkdir()
    table = pa.table({"text": pa.array([None], pa.string())})
    for name, other in (("a.parquet", table), ("b/a.parquet", table)):
        pq.write_table(other, name)
    pq.write_table(pa.table({"text": ["가"], "n": [1]}), "b.parquet")
    status, line = script.refuse("--output", "out", "--model", tiny, *options, "a.parquet")
    assert status == 2
    assert says in line
    assert not Path("out/_manifest.json").exists()
