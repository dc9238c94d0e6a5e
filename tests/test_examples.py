"""The Python examples: their real commands, what they print, and what they say of bad input."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import run_script
from encoders import edit_json, write_plain_encoder
from hub import Hub
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
sys.path.append(str(EXAMPLES))

import encode_corpus  # noqa: E402
import semantic_search  # noqa: E402
import semantic_search_onnx  # noqa: E402
import vector_search  # noqa: E402

# What git leaves of a large file where Git-LFS is not installed.
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 123\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def run(name: str, *options: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run_script(EXAMPLES / name, *options, cwd=cwd)


@pytest.mark.parametrize("name", ["semantic_search.py", "vector_search.py", "encode_corpus.py"])
def test_weights_kept_in_half_precision_compute_in_float32(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SentenceTransformer(str(tiny), device="cpu").half().save_pretrained(str(tmp_path / "half"))
    found, encode = [], SentenceTransformer.encode

    def noted(self: SentenceTransformer, *args: object, **kwargs: object) -> object:
        found.append(next(self.parameters()).dtype)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", noted)
    if name == "semantic_search.py":
        assert run(name, "--model", tmp_path / "half").returncode == 0
    elif name == "vector_search.py":
        vector_search.load_model(str(tmp_path / "half")).encode("하나")
    else:
        encode_corpus.load_encoder(str(tmp_path / "half")).encode("하나")
    assert set(found) == {torch.float32}


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


def test_examples_that_stand_alone_do_not_drift_apart() -> None:
    """What each of them carries, so that it can be copied alone, is the same in all."""
    texts = [*semantic_search.CORPUS, *semantic_search.QUERIES]
    for name in ("vector_search.py", "java/src/main/java/ko/sentence/SemanticSearch.java"):
        source = (EXAMPLES / name).read_text(encoding="utf-8")
        places = [source.find(f'"{text}"') for text in texts]
        assert -1 not in places and places == sorted(places), name
    normalizers = [
        re.search(
            r"^const NMT = .*?^}$", (EXAMPLES / name).read_text(encoding="utf-8"), re.M | re.S
        )
        for name in ("node/sentence-encoder.js", "web/worker.js")
    ]
    assert normalizers[0][0] == normalizers[1][0]


def test_both_searches_and_the_page_hold_the_same_sentences() -> None:
    assert semantic_search.CORPUS == semantic_search_onnx.CORPUS
    assert semantic_search.QUERIES == semantic_search_onnx.QUERIES
    page = (REPOSITORY / "docs/use.md").read_text(encoding="utf-8")
    published = ranking(re.search(r"```\n(한 남자가 파스타.+?)```", page, re.DOTALL)[1])
    assert [query for query, _ in published] == semantic_search.QUERIES
    for _, hits in published:
        assert len(hits) == 5
        assert {sentence for sentence, _ in hits} <= set(semantic_search.CORPUS)


def test_the_command_of_the_docstring_takes_the_published_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / "hub/jhgan/ko-sroberta-multitask")
    with Hub(tmp_path / "hub") as hub:
        hub.patch(monkeypatch, tmp_path / "cache")
        done = run("semantic_search.py")
        assert done.returncode == 0, done.stderr
        assert [len(hits) for _, hits in ranking(done.stdout)] == [5, 5, 5]
        unknown = run("semantic_search.py", "--model", "jhgan/unknown")
    assert unknown.returncode == 2
    assert unknown.stderr.splitlines()[-1].startswith("error: jhgan/unknown: ")
    assert "Traceback" not in unknown.stderr


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("models/nowhere", "no such folder, and not from the Hub: "),
        ("empty", "Unrecognized model"),
        ("cut", "deserializing header"),
        ("cut-bin", "failed reading zip archive"),
        ("misfit", "ignore_mismatched_sizes"),
        ("pointer", "model.safetensors is a Git-LFS pointer"),
        ("number", "argument of type 'int' is not"),
        ("list", "'list' object has no attribute"),
    ],
)
def test_the_search_says_what_is_wrong_with_a_model(
    model: str, says: str, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    weights = shutil.copytree(tiny, tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    bin_ = shutil.copytree(tiny, tmp_path / "cut-bin") / "pytorch_model.bin"
    torch.save(load_file(bin_.with_name("model.safetensors")), bin_)
    bin_.write_bytes(bin_.read_bytes()[:1000])
    bin_.with_name("model.safetensors").unlink()
    edit_json(shutil.copytree(tiny, tmp_path / "misfit") / "config.json", intermediate_size=96)
    for name, file in {"number": "config.json", "list": "tokenizer_config.json"}.items():
        content = "3" if name == "number" else "[]"
        (shutil.copytree(tiny, tmp_path / name) / file).write_text(content)
    shutil.copytree(tiny, tmp_path / "pointer")
    (tmp_path / "pointer/model.safetensors").write_text(POINTER)
    done = run("semantic_search.py", "--model", model, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    *others, line = done.stderr.splitlines()
    assert line.startswith(f"error: {model}: ") and says in line
    assert not others or model in ("misfit", "list")  # whose weights transformers lists before
    assert "Traceback" not in done.stderr


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


@pytest.mark.parametrize(
    "example", [encode_corpus, semantic_search, semantic_search_onnx, vector_search]
)
def test_a_closed_output_is_no_error(example: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of >&-
    monkeypatch.setattr(sys, "argv", ["example", "--help"])
    with pytest.raises(SystemExit) as end:
        example.main()
    assert end.value.code == 0


def test_a_proxy_that_needs_another_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_error(*_: object, **__: object) -> None:
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    for place in ("encode_corpus", "semantic_search", "sentence_transformers"):
        monkeypatch.setattr(f"{place}.SentenceTransformer", raise_error)
    monkeypatch.setattr(sys, "argv", ["example", "--model", "owner/model"])
    with pytest.raises(SystemExit) as end:
        semantic_search.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: owner/model: ") and "socksio" in line
    with pytest.raises(encode_corpus.UserError, match="socksio"):
        encode_corpus.load_model(SimpleNamespace(model="owner/model", dim=None))
    with pytest.raises(vector_search.UserError, match="socksio"):
        vector_search.load_model("owner/model")


def test_the_search_shows_one_sentence_at_least(tmp_path: Path) -> None:
    for count in ("0", "-3"):
        done = run("semantic_search_onnx.py", "--model", "no.onnx", "--top_k", count, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].endswith(f"--top_k {count}: must be above 0")


def test_a_pointer_in_place_of_an_onnx_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text(POINTER)
    done = run("semantic_search_onnx.py", "--model", "model.onnx", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model.onnx: a Git-LFS pointer")
    assert len(done.stderr.splitlines()) == 1
