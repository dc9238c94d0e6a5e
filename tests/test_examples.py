"""The Python examples: their real commands, what they print, and what they say of bad input."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import run_script
from encoders import SAMPLES, write_plain_encoder
from hub import Hub
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
sys.path.append(str(EXAMPLES))

import semantic_search  # noqa: E402
import semantic_search_onnx  # noqa: E402

OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
HEADER = "sentence1,sentence2,score\n"
# What git leaves of a large file where Git-LFS is not installed.
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 123\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def run(
    name: str, *options: object, env: dict[str, str] = OFFLINE, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    if env is OFFLINE:
        return run_script(EXAMPLES / name, *options, cwd=cwd)
    line = [sys.executable, str(EXAMPLES / name), *map(str, options)]
    return subprocess.run(line, capture_output=True, text=True, env=env, cwd=cwd)


# --- semantic_search.py ----------------------------------------------------------------------


def ranking(text: str) -> list[tuple[str, list[tuple[str, float]]]]:
    """Reads printed results: for each query its sentences and scores, in their order."""
    found = []
    for line in text.strip().splitlines():
        if hit := re.fullmatch(r"  (-?\d\.\d{4})  (.+)", line):
            found[-1][1].append((hit[2], float(hit[1])))
        else:
            found.append((line, []))
    return found


def test_the_search_finds_what_it_found_before(offline_encoder: Path, tmp_path: Path) -> None:
    done = run("semantic_search.py", "--model", offline_encoder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (REPOSITORY / "tests/expected/semantic_search.txt").read_text(encoding="utf-8")
    found, expected = ranking(done.stdout), ranking(text)
    assert [query for query, _ in found] == semantic_search.QUERIES
    for (_, hits), (_, expected_hits) in zip(found, expected, strict=True):
        assert [sentence for sentence, _ in hits] == [sentence for sentence, _ in expected_hits]
        scores = [score for _, score in expected_hits]
        assert [score for _, score in hits] == pytest.approx(scores, abs=1e-4)


def test_both_searches_and_the_page_hold_the_same_sentences() -> None:
    assert semantic_search.CORPUS == semantic_search_onnx.CORPUS
    assert semantic_search.QUERIES == semantic_search_onnx.QUERIES
    page = (REPOSITORY / "docs/use.md").read_text(encoding="utf-8")
    published = ranking(re.search(r"```\n(한 남자가 파스타.+?)```", page, re.DOTALL)[1])
    assert [query for query, _ in published] == semantic_search.QUERIES
    for _, hits in published:
        assert len(hits) == 5
        assert {sentence for sentence, _ in hits} <= set(semantic_search.CORPUS)


def test_the_command_of_the_docstring_takes_the_published_model(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "hub/jhgan/ko-sroberta-multitask")
    with Hub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment(tmp_path / "cache")
        done = run("semantic_search.py", env=environment)
        assert done.returncode == 0, done.stderr
        assert [len(hits) for _, hits in ranking(done.stdout)] == [5, 5, 5]
        unknown = run("semantic_search.py", "--model", "jhgan/unknown", env=environment)
    assert unknown.returncode == 2
    assert unknown.stderr.splitlines()[-1].startswith("error: jhgan/unknown: ")
    assert "Traceback" not in unknown.stderr


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("models/nowhere", "no such folder, and not from the Hub: "),
        ("empty", "Unrecognized model"),
        ("cut", "deserializing header"),
        ("pointer", "model.safetensors is a Git-LFS pointer"),
    ],
)
def test_the_search_says_what_is_wrong_with_a_model(
    model: str, says: str, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    weights = shutil.copytree(tiny, tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(tiny, tmp_path / "pointer")
    (tmp_path / "pointer/model.safetensors").write_text(POINTER)
    done = run("semantic_search.py", "--model", model, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {model}: ") and says in line


@pytest.mark.parametrize(
    ("prompts", "default", "of_queries", "of_corpus"),
    [
        ({"query": "질문 ", "document": "문서 "}, None, "질문 ", "문서 "),
        ({"query": "질문 ", "passage": "글 "}, None, "질문 ", "글 "),
        ({"sts": "비슷한 글 "}, "sts", "비슷한 글 ", "비슷한 글 "),
        ({"query": "질문 ", "sts": "비슷한 글 "}, "sts", "질문 ", "비슷한 글 "),
        ({"query": "질문 "}, None, "질문 ", ""),
    ],
)
def test_queries_and_corpus_get_the_prompts_of_the_model(
    prompts: dict[str, str],
    default: str | None,
    of_queries: str,
    of_corpus: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    plain = SentenceTransformer(str(tiny))
    model = SentenceTransformer(str(tiny), prompts=prompts, default_prompt_name=default)
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    monkeypatch.setattr(sys, "argv", ["semantic_search.py", "--model", str(tmp_path / "model")])
    capsys.readouterr()
    semantic_search.main()
    queries = [of_queries + query for query in semantic_search.QUERIES]
    corpus = [of_corpus + sentence for sentence in semantic_search.CORPUS]
    expected = np.sort(plain.similarity(plain.encode(queries), plain.encode(corpus)).numpy())
    for (_, hits), scores in zip(ranking(capsys.readouterr().out), expected, strict=True):
        assert [score for _, score in hits] == pytest.approx(scores[::-1][:5], abs=1e-4)


@pytest.mark.parametrize("example", [semantic_search, semantic_search_onnx])
def test_a_console_without_korean_gets_its_scores(
    example: object, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", ["example", "--model", str(tiny)])
    # No .onnx file is needed to print what was found in it.
    monkeypatch.setattr(semantic_search_onnx, "load", lambda path: (None, None))
    monkeypatch.setattr(semantic_search_onnx, "embed", lambda *given: np.eye(9)[: len(given[2])])
    example.main()
    console.flush()
    printed = console.buffer.getvalue().decode("ascii")
    assert len(re.findall(r"\d\.\d{4}", printed)) == 15
    assert "? ??? ???? ???." in printed


def test_a_pointer_in_place_of_an_onnx_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text(POINTER)
    done = run("semantic_search_onnx.py", "--model", "model.onnx", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model.onnx: a Git-LFS pointer")
    assert len(done.stderr.splitlines()) == 1


# --- fine_tune_your_own.py -------------------------------------------------------------------


def sample_pairs() -> pd.DataFrame:
    """Returns the 192 sample pairs; scores from 0 to 5."""
    files = [SAMPLES / f"KorSTS/sts-{name}.tsv" for name in ("train", "dev", "test")]
    tables = [pd.read_csv(file, sep="\t", quoting=csv.QUOTE_NONE) for file in files]
    return pd.concat(tables)[["sentence1", "sentence2", "score"]]


def test_training_moves_the_dev_score_and_leaves_the_model(
    offline_encoder: Path, tmp_path: Path
) -> None:
    # Scores upside down: what the encoder cannot know yet, so that six steps show.
    pairs = sample_pairs()
    pairs["score"] = 5 - pairs["score"]
    # As Excel writes it: a BOM, CRLF, and another column.
    pairs.assign(note="a, b").to_csv(
        tmp_path / "pairs.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n"
    )
    options = ["pairs.csv", "--model", offline_encoder, "--num_epochs", 1, "--output", "new/model"]
    done = run("fine_tune_your_own.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(
        r"(\d+) training pairs, (\d+) dev pairs\nbefore: (-\S+)\n(?s:.*)after: (-\S+)\n",
        done.stdout,
    )
    assert found, done.stdout
    dev = pairs.reset_index(drop=True).sample(frac=0.1, random_state=777)
    assert int(found[2]) == len(dev) == 19
    assert 150 < int(found[1]) <= len(pairs) - len(dev)
    before, after = float(found[3]), float(found[4])
    assert after > before + 2

    evaluator = EmbeddingSimilarityEvaluator(
        list(dev["sentence1"]),
        list(dev["sentence2"]),
        list(dev["score"] / 5),
        main_similarity="cosine",
    )
    folder = tmp_path / "new/model"
    scores = [
        100 * evaluator(SentenceTransformer(str(path)))["spearman_cosine"]
        for path in (offline_encoder, folder)
    ]
    assert scores == pytest.approx([before, after], abs=0.006)
    assert list(folder.parent.iterdir()) == [folder]  # nothing is left beside it
    assert not (folder / "README.md").exists()  # a card would quote the pairs

    again = run("fine_tune_your_own.py", *options, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: new/model: [Errno 17] File exists")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ": [Errno 2] No such file"),
        ("sentence1,score\na,1\n", ": needs the columns sentence1, sentence2, score"),
        (HEADER + "가,나,1\n\n다,라,높음\n", ":4: could not convert string to float: '높음'"),
        (HEADER + "가, ,nan\n", ":2: needs two sentences and a score from 0 to 5"),
        (HEADER + '"가\n가",나,1\n가,나,-1\n', ":4: needs two sentences and a score from 0"),
        (HEADER + "안녕, 하세요,다,1\n", ":2: not as many fields as the header: quote"),
        (HEADER.encode() + "가,나,1\n".encode("cp949"), ": 'utf-8' codec can't decode"),
        (HEADER + "가,나,1\n" * 50, ":51: too few pairs: 0 for training, 5 for dev"),
    ],
)
def test_a_bad_file_is_named_with_its_line(
    content: str | bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    # A model that is not there: it must not be asked for before the file is right.
    options = [path, "--output", tmp_path / "model", "--model", tmp_path / "nowhere/model"]
    done = run("fine_tune_your_own.py", *options)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}{says}")
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_not_there_ends_training_before_it_begins(tmp_path: Path) -> None:
    sample_pairs().to_csv(tmp_path / "pairs.csv", index=False)
    options = ["pairs.csv", "--output", "model", "--model", "nowhere/a/model"]
    done = run("fine_tune_your_own.py", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nowhere/a/model: ")
    assert os.listdir(tmp_path) == ["pairs.csv"]


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_place_of_the_weights_ends_training_before_it_begins(
    weights: str, tiny: Path, tmp_path: Path
) -> None:
    sample_pairs().to_csv(tmp_path / "pairs.csv", index=False)
    shutil.copytree(tiny, tmp_path / "pointer")
    (tmp_path / "pointer/model.safetensors").unlink()
    (tmp_path / "pointer" / weights).write_text(POINTER)
    options = ["pairs.csv", "--output", "model", "--model", "pointer"]
    done = run("fine_tune_your_own.py", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: pointer: {weights} is a Git-LFS pointer")
    assert not (tmp_path / "model").exists()


def test_training_minds_precision_prompt_and_similarity_of_the_model(
    tiny: Path, tmp_path: Path
) -> None:
    """A half-precision model with a prompt and dot products trains as its plain float32 twin does
    on sentences that begin with the prompt."""
    pairs, prompt = sample_pairs(), "문장: "
    pairs.to_csv(tmp_path / "plain.csv", index=False)
    columns = ["sentence1", "sentence2"]
    pairs.assign(**{name: prompt + pairs[name] for name in columns}).to_csv(
        tmp_path / "prompted.csv", index=False
    )
    model = SentenceTransformer(str(tiny)).to(torch.bfloat16)
    model.to(torch.float32).save_pretrained(str(tmp_path / "twin"))
    model.prompts, model.default_prompt_name = {"default": prompt}, "default"
    model.similarity_fn_name = "dot"
    model.to(torch.bfloat16).save_pretrained(str(tmp_path / "half"))
    said, ends = [], []
    for name, file in (("half", "plain.csv"), ("twin", "prompted.csv")):
        options = [file, "--model", name, "--num_epochs", 1, "--output", f"{name}-trained"]
        done = run("fine_tune_your_own.py", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said.append([line for line in done.stdout.splitlines() if line[0] in "ab"])
        ends.append(load_file(tmp_path / f"{name}-trained/model.safetensors"))
    assert said[0] == said[1] and len(said[0]) == 2
    for name, value in ends[1].items():
        assert ends[0][name].dtype == torch.float32
        assert torch.equal(ends[0][name], value)
