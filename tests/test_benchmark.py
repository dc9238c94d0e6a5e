"""The benchmark's command line on tiny encoders and the samples (which are not KorSTS)."""

import functools
import getpass
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from commands import Started
from encoders import SAMPLES, edit_json, tiny_tokenizer, write_plain_encoder
from hub import Hub
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sklearn.metrics import f1_score

import benchmark
from common import results, scoring
from common.command_line import REPOSITORY, UserError, command_line, file_sha256
from common.data import read_korsts
from common.encoders import load_encoder, save_encoder
from common.evaluation import SCORE_KEYS, bootstrap, correlations, interval
from common.exported import OnnxEncoder

README = """# Title
<!-- results:all -->
old
<!-- /results:all -->
between <!-- results:matryoshka --><!-- /results:matryoshka -->
<!-- results:klue-sts -->
<!-- /results:klue-sts -->
end
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_plain_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Another encoder, in the layout of a run folder."""
    folder = tmp_path_factory.mktemp("runs")
    model = load_encoder(str(write_plain_encoder(folder / "plain", seed=1)))
    save_encoder(model, folder / "run")
    return folder / "run"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process; returns exit status, stdout and stderr."""

    def call(*arguments: object, data_dir: Path = SAMPLES) -> tuple[int, str, str]:
        where = ["--data_dir", data_dir, "--results_dir", tmp_path / "results"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, [*arguments, *where])])
        status = 0
        try:
            with command_line():
                benchmark.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def read(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / "results" / f"{name}.json").read_text(encoding="utf-8"))


def written(tmp_path: Path) -> list[str]:
    folder = tmp_path / "results"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def evaluator_scores(folder: Path, **options: object) -> dict[str, float]:
    """What sentence-transformers' own evaluator says, encoding both columns whole."""
    table = read_korsts(SAMPLES / "KorSTS" / "sts-test.tsv")
    names = ["cosine", "euclidean", "manhattan", "dot"]
    evaluator = EmbeddingSimilarityEvaluator(
        *(table[column].tolist() for column in ("sentence1", "sentence2", "score")),
        similarity_fn_names=names,
        write_csv=False,
        **options,
    )
    metrics = evaluator(load_encoder(str(folder)))
    return {
        f"{name}_{kind}": metrics[f"{kind}_{name}"]
        for name in names
        for kind in ("pearson", "spearman")
    }


# --- What is written -------------------------------------------------------------------------


def test_scores_are_the_evaluators_and_the_file_says_what_was_measured(run, plain, tmp_path):
    status, out, err = run(plain)
    assert status == 0, err
    result = read(tmp_path, "tiny")
    assert result["scores"] == pytest.approx(evaluator_scores(plain), abs=1e-6)
    assert list(result["scores"]) == list(SCORE_KEYS) == list(result["intervals"])
    for key, (low, high) in result["intervals"].items():
        assert low < result["scores"][key] < high
    assert (result["name"], result["link"], result["source"]) == ("tiny", None, "measured")
    assert result["data"] == {
        "file": "sts-test.tsv",
        "blob_id": benchmark.file_record(SAMPLES / "KorSTS" / "sts-test.tsv", 1)["blob_id"],
        "published": False,
        "rows": 48,
        "distinct_sentences": result["data"]["distinct_sentences"],
    }
    model = result["model"]
    assert model["pooling_added"] and model["dimension"] == 32 and model["revision"] is None
    assert model["size_bytes"] == (plain / "model.safetensors").stat().st_size
    assert model["parameters"] == sum(w.numel() for w in load_encoder(str(plain)).parameters())
    assert result["sentences_per_second"] > 0
    assert result["versions"]["sentence-transformers"].startswith("6.")
    assert "| tiny (mean pooling added) |" in out
    assert "sts-test.tsv: 48 pairs" in out


def test_no_path_and_no_user_is_stored(run, plain, tmp_path):
    assert run(plain, f"--prompt={plain.name}")[0] == 0
    text = (tmp_path / "results" / "tiny.json").read_text(encoding="utf-8")
    for private in (str(tmp_path), str(plain.parent), str(REPOSITORY), str(Path.home()) + "/"):
        assert private not in text
    command = read(tmp_path, "tiny")["command"]
    assert command == (
        "python benchmark.py tiny --prompt=tiny --data_dir samples --results_dir results"
    )
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text


def test_each_distinct_sentence_is_encoded_once_for_all_dims(run, plain, tmp_path, monkeypatch):
    seen = []
    encode = SentenceTransformer.encode

    def counting(self, sentences, **options):
        seen.extend(sentences)
        return encode(self, sentences, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", counting)
    status, out, _ = run("--matryoshka_model", plain, "--matryoshka_dims", "32,16,8")
    assert status == 0
    table = read_korsts(SAMPLES / "KorSTS" / "sts-test.tsv")
    assert sorted(seen) == sorted({*table["sentence1"], *table["sentence2"]})
    result = read(tmp_path, "tiny")
    assert len(seen) == result["data"]["distinct_sentences"]
    assert list(result["dims"]) == ["32", "16", "8"]
    for dim in (16, 8):
        expected = evaluator_scores(plain, truncate_dim=dim)
        assert result["dims"][str(dim)]["scores"] == pytest.approx(expected, abs=1e-6)
    assert result["dims"]["32"]["scores"] == result["scores"]
    assert "| Model | 32 | 16 | 8 |" in out


def test_the_batch_size_changes_nothing_beyond_rounding(plain):
    model = load_encoder(str(plain))
    table = read_korsts(SAMPLES / "KorSTS" / "sts-test.tsv")
    sentences = table["sentence1"].tolist()
    expected = model.encode(sentences, batch_size=3)
    for batch_tokens in (50, 10_000):
        vectors = scoring.encode_distinct(model, sentences, batch_tokens=batch_tokens)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        second = scoring.encode_distinct(model, table["sentence2"].tolist())
        scores = correlations(vectors, second, table["score"])
        assert scores == pytest.approx(correlations(expected, second, table["score"]), abs=1e-6)


def test_each_model_that_is_to_be_scored_at_several_dims_is(run, plain, trained, tmp_path):
    models = ("--matryoshka_model", plain, "--matryoshka_model", trained)
    status, _, err = run(*models, "--matryoshka_dims", "32,16")
    assert status == 0, err
    assert [list(read(tmp_path, name)["dims"]) for name in ("tiny", "run")] == [["32", "16"]] * 2


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_quantised_embeddings_are_rows_of_their_own(run, plain, tmp_path, precision, monkeypatch):
    # One at a time on both sides: another batch rounds differently, on some CPUs by just what puts
    # a value on the next int8 step.
    alone = functools.partial(scoring.encode_distinct, batch_tokens=1)
    monkeypatch.setattr(scoring, "encode_distinct", alone)
    status, out, _ = run(plain, "--embedding_precision", precision)
    assert status == 0 and written(tmp_path) == [f"tiny.{precision}.json"]
    result = read(tmp_path, f"tiny.{precision}")
    expected = evaluator_scores(plain, precision=precision, batch_size=1)
    assert result["scores"] == pytest.approx(expected, abs=1e-6)
    assert f"tiny (mean pooling added, {precision} embeddings)" in out


def test_prompts_declared_and_given_are_used_and_recorded(run, trained, tmp_path):
    declaring = shutil.copytree(trained, tmp_path / "declaring")
    config = declaring / "config_sentence_transformers.json"
    edit_json(config, prompts={"query": "비 "}, default_prompt_name=None)
    status, _, err = run(declaring)
    assert status == 0 and "no prompt is its default, none used of {'query': '비 '}" in err
    without = read(tmp_path, "declaring")
    assert without["prompt"] == ""
    edit_json(config, default_prompt_name="query")
    _, out, _ = run(declaring)
    declared = read(tmp_path, "declaring")
    assert declared["prompt"] == "비 " and "(prompt `비 `)" in out
    assert run(declaring, "--prompt", "비 ", "--name", "given")[0] == 0
    assert read(tmp_path, "given")["scores"] == declared["scores"] != without["scores"]
    assert run(declaring, "--prompt", "", "--name", "none")[0] == 0
    assert read(tmp_path, "none")["scores"] == without["scores"]


# --- ONNX ------------------------------------------------------------------------------------


def write_onnx(folder: Path, dimension: int = 16) -> np.ndarray:
    """Writes an .onnx model that averages word vectors, and returns the vectors."""
    tokenizer = tiny_tokenizer()
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(32)
    tokenizer.save(str(folder / "words.tokenizer.json"))
    edit_json(folder / "words.json", max_seq_length=32, pooling="mean", dimension=dimension)
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(tokenizer.get_vocab_size(), dimension)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["vectors", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["tokens", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["column", "middle"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["sentence_embedding"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info(
        "sentence_embedding", TensorProto.FLOAT, ["batch", dimension]
    )
    constants = [
        numpy_helper.from_array(vectors, "vectors"),
        numpy_helper.from_array(np.array([2]), "last"),
        numpy_helper.from_array(np.array([1]), "middle"),
    ]
    graph = helper.make_graph(nodes, "words", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "words.onnx")
    return vectors


def test_an_onnx_file_is_a_model_like_any_other(run, tmp_path):
    vectors = write_onnx(tmp_path)
    status, _, err = run(tmp_path / "words.onnx")
    assert status == 0, err
    table = read_korsts(SAMPLES / "KorSTS" / "sts-test.tsv")
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(32)
    sides = [
        np.stack([vectors[tokenizer.encode(sentence).ids].mean(axis=0) for sentence in column])
        for column in (table["sentence1"], table["sentence2"])
    ]
    result = read(tmp_path, "words")
    assert result["scores"] == pytest.approx(correlations(*sides, table["score"]), abs=1e-6)
    assert result["model"]["dimension"] == 16 and result["model"]["max_seq_length"] == 32
    assert result["model"]["parameters"] is None and result["link"] is None


def test_weights_beside_an_onnx_file_count(run, tmp_path):
    write_onnx(tmp_path)
    path, data = tmp_path / "words.onnx", tmp_path / "words.onnx.data"
    options = {"save_as_external_data": True, "location": data.name}
    onnx.save(onnx.load(path), path, **options)
    status, _, err = run(path)
    assert status == 0, err
    model = read(tmp_path, "words")["model"]
    assert model["size_bytes"] == path.stat().st_size + data.stat().st_size
    assert model["weights"] == {file.name: file_sha256(file) for file in (path, data)}


def test_an_onnx_file_takes_no_other_pooling(run, tmp_path):
    write_onnx(tmp_path)
    status, _, err = run(tmp_path / "words.onnx", "--pooling", "cls")
    assert status == 2 and err.splitlines()[-1].endswith("words.onnx has its own pooling")
    assert written(tmp_path) == []


@pytest.mark.parametrize("missing", ["words.onnx", "words.json", "words.tokenizer.json"])
def test_an_onnx_file_without_its_company(run, tmp_path, missing):
    write_onnx(tmp_path)
    (tmp_path / missing).unlink()
    status, _, err = run(tmp_path / "words.onnx")
    assert status == 2 and f"{missing}: no such file" in err and written(tmp_path) == []


def test_a_damaged_onnx_file(run, tmp_path):
    write_onnx(tmp_path)
    (tmp_path / "words.onnx").write_bytes(b"no onnx")
    status, _, err = run(tmp_path / "words.onnx")
    assert status == 2 and "words.onnx: cannot be loaded" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "name, change",
    [
        ("words.json", {"revision": "sha256:other"}),
        ("words.json", {"max_seq_length": 16}),
        ("words.json", {"dimension": 8}),
        ("words.tokenizer.json", {"truncation": None}),
    ],
)
def test_files_of_two_exports_are_not_mixed(run, tmp_path, name, change):
    write_onnx(tmp_path)
    path, metadata = tmp_path / "words.onnx", {"dimension": 16, "max_seq_length": 32}
    metadata["tokenizer"] = (tmp_path / "words.tokenizer.json").read_text(encoding="utf-8")
    edit_json(tmp_path / "words.json", revision="sha256:one")
    model = onnx.load(path)
    helper.set_model_props(
        model, {key: str(value) for key, value in (metadata | {"revision": "sha256:one"}).items()}
    )
    onnx.save(model, path)
    assert run(path)[0] == 0
    edit_json(tmp_path / name, **change)
    status, _, err = run(path, "--name", "mixed")
    assert (status, err.splitlines()[-1]) == (
        2,
        f"error: {tmp_path / name}: is of another export than {path}",
    )


# --- What goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--matryoshka_dims", "8,4"], "--matryoshka_dims goes with --matryoshka_model"),
        (["--matryoshka_model", "m/m", "--matryoshka_dims", "4,8"], "not like 768,256,64"),
        (["--matryoshka_model", "m/m", "--matryoshka_dims", "8,8"], "not like 768,256,64"),
        (["--matryoshka_model", "m/m", "--matryoshka_dims", "8,0"], "not like 768,256,64"),
        (["--matryoshka_model", "m/m", "--matryoshka_dims", "a"], "not like 768,256,64"),
        (["a/a", "--compare", "b/b", "c/c"], "--compare takes its two models and no others"),
        (["a/a", "--leave_out", "pairs"], "--leave_out goes with --compare"),
        (["a/a", "b/b", "--name", "x"], "--name names the row of one MODEL"),
        (["a/a", "--name", "../x"], "../x: no name for a row"),
        (["no/such/folder"], "no/such/folder: no such folder"),
        (["~nobody-here"], "~nobody-here: no such folder"),
        (["두 낱말.onnx"], "두 낱말: no name for a row (letters, digits, - . _): give --name"),
        (["a/a", "a/a"], "two rows would be named a/a"),
        (["--compare", "a/a", "b/b"] * 2, "--compare is given twice: one comparison at a time"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(run, tmp_path, arguments, reason):
    status, out, err = run(*arguments)
    assert status == 2 and reason in err and len(err.splitlines()) == 1 and out == ""
    assert written(tmp_path) == []


def test_bad_data_is_named_before_any_model_is_loaded(run, plain, tmp_path):
    folder = tmp_path / "data" / "KorSTS"
    folder.mkdir(parents=True)
    status, _, err = run(plain, data_dir=tmp_path / "data")
    assert status == 2 and "sts-test.tsv: no such file" in err
    text = (
        (SAMPLES / "KorSTS" / "sts-test.tsv").read_text(encoding="utf-8").replace("2.000", "9", 1)
    )
    (folder / "sts-test.tsv").write_text(text, encoding="utf-8")
    status, _, err = run(plain, data_dir=tmp_path / "data")
    assert status == 2 and "sts-test.tsv:2: score '9' is outside 0 to 5" in err


def test_a_dim_above_the_width_names_the_model(run, plain, tmp_path):
    status, _, err = run("--matryoshka_model", plain, "--matryoshka_dims", "64,32")
    assert status == 2 and "has 32 dimensions" in err and written(tmp_path) == []


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("value, reason", [(float("nan"), "NaN"), (0.0, "constant")])
def test_nan_and_constant_embeddings_are_an_error_never_a_number(
    run, plain, tmp_path, value, reason, precision
):
    broken = shutil.copytree(plain, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    for name in weights:
        weights[name] = torch.full_like(weights[name], value)
        if value == 0 and name.endswith("output.LayerNorm.bias"):
            weights[name] += torch.linspace(-1, 1, 32)  # the same vector for every sentence
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    status, out, err = run(broken, "--embedding_precision", precision)
    assert status == 2 and "broken: " in err and reason in err and "|" not in out
    assert written(tmp_path) == []


def test_models_of_the_hub_that_fail_are_named_and_the_others_still_run(
    run, plain, trained, tmp_path, monkeypatch
):
    with Hub(tmp_path / "hub") as hub:
        for name in ("good", "gated", "cut", "wrong", "code"):
            shutil.copytree(plain, tmp_path / "hub" / "owner" / name)
        (tmp_path / "hub" / "owner" / "none").mkdir()
        edit_json(tmp_path / "hub/owner/code/config.json", auto_map={"AutoModel": "x.X"})
        hub.faults = {f"owner/{name}": name for name in ("gated", "cut", "wrong")}
        hub.patch(monkeypatch, tmp_path / "cache")
        bad = {
            "owner/nowhere": "no such model on the Hub",
            "owner/gated": "gated",
            "owner/cut": "download failed",
            "owner/wrong": "is not what the Hub's hash says",
            "owner/none": "no encoder",
            "owner/code": "could do anything on this machine",
        }
        status, out, err = run(*bad, "owner/good", trained)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 1 and len(errors) == len(bad)
        for line, (name, reason) in zip(errors, bad.items(), strict=True):
            assert line.startswith(f"error: {name}: ") and reason in line
        assert "Traceback" not in err
        assert written(tmp_path) == ["owner--good.json", "run.json"]
        result = read(tmp_path, "owner--good")
        assert result["link"] == "https://huggingface.co/owner/good"
        assert "[owner/good](https://huggingface.co/owner/good)" in out
        snapshots = tmp_path / "cache/hub/models--owner--good/snapshots"
        assert [path.name for path in snapshots.iterdir()] == [result["model"]["revision"]]
        assert run("owner/nowhere")[0] == 2
        hub.patch(monkeypatch, tmp_path / "cache", offline=True)
        assert run("owner/good")[0] == 0
        assert read(tmp_path, "owner--good")["scores"] == result["scores"]


def test_two_results_of_one_file_do_not_replace_each_other(run, plain, trained, tmp_path):
    for name, first, second in (
        ("tiny.int8", [trained, "--name", "tiny.int8"], [plain, "--embedding_precision", "int8"]),
        ("a--b", [plain, "--name", "a--b"], [trained, "--name", "a/b"]),
    ):
        assert run(*first)[0] == 0
        file = tmp_path / "results" / f"{name}.json"
        before = file.read_bytes()
        status, _, err = run(*second)
        row = name.removesuffix(".int8").replace("--", "/")
        says = f"give this {row} another --name, or remove the file"
        line = f"error: {file}: holds the float32 result of {name}: {says}"
        assert (status, err.splitlines()[-1]) == (2, line)
        assert file.read_bytes() == before


def test_a_model_trained_again_takes_the_place_of_its_result(run, plain, trained, tmp_path):
    note = f"note: {tmp_path / 'results/tiny.json'}: is of other weights: replaced"
    assert note not in run(plain)[2] + run(plain)[2]
    before = read(tmp_path, "tiny")
    status, _, err = run(shutil.copytree(trained, tmp_path / "tiny"))
    assert status == 0 and note in err.splitlines()
    assert read(tmp_path, "tiny")["scores"] != before["scores"]


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"name": "x"}', '{"model": 3}'])
def test_a_file_that_is_no_result_is_not_overwritten(run, plain, tmp_path, content):
    file = tmp_path / "results" / "tiny.json"
    file.parent.mkdir()
    file.write_text(content)
    status, _, err = run(plain)
    assert status == 2 and err.splitlines()[-1].startswith(f"error: {file}: ")
    assert file.read_text() == content


def test_an_interrupted_write_leaves_the_old_file_whole(run, plain, tmp_path, monkeypatch):
    assert run(plain)[0] == 0
    before = (tmp_path / "results" / "tiny.json").read_bytes()
    write_text = Path.write_text

    def half(self, text, **options):
        write_text(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    status, _, err = run(plain, "--prompt", "비")
    assert status == 130 and "interrupted" in err
    assert (tmp_path / "results" / "tiny.json").read_bytes() == before
    assert written(tmp_path) == ["tiny.json"]


def test_two_benchmarks_at_once_leave_whole_results(plain, trained, tmp_path):
    where = ["--data_dir", SAMPLES, "--results_dir", tmp_path / "results"]
    both = [Started("benchmark.py", plain, trained, *where) for _ in range(2)]
    for process in both:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "| run |" in out and "Traceback" not in err
    assert written(tmp_path) == ["run.json", "tiny.json"]
    assert read(tmp_path, "tiny")["name"] == "tiny" and read(tmp_path, "run")["name"] == "run"


# --- Comparison ------------------------------------------------------------------------------


def test_compare_gives_the_paired_difference(run, plain, trained, tmp_path):
    status, out, err = run("--compare", trained, plain)
    assert status == 0, err
    assert written(tmp_path) == []
    table = read_korsts(SAMPLES / "KorSTS" / "sts-test.tsv")
    scores, samples = [], []
    for folder in (trained, plain):
        model = load_encoder(str(folder))
        sides = [model.encode(table[name].tolist()) for name in ("sentence1", "sentence2")]
        scores.append(correlations(*sides, table["score"])["cosine_spearman"])
        samples.append(bootstrap(*sides, table["score"])["cosine_spearman"])
    low, high = interval(samples[0] - samples[1])
    row = next(line for line in out.splitlines() if line.startswith("cosine_spearman"))
    shown = [float(value) for value in row.replace(" to ", " ").split()[1:]]
    difference = scores[0] - scores[1]
    assert shown == pytest.approx([100 * v for v in (*scores, difference, low, high)], abs=0.02)


def test_compare_takes_the_mean_of_several_models(run, plain, trained):
    def first_row(*sides):
        out = run("--compare", *sides)[1]
        row = next(line for line in out.splitlines() if line.startswith("cosine_spearman"))
        return [float(value) for value in row.replace(" to ", " ").split()[1:]]

    one, other = first_row(trained, plain)[:2]
    a, b, difference, low, high = first_row(f"{trained},{plain}", plain)
    assert [a, b] == pytest.approx([(one + other) / 2, other], abs=0.02)
    whole = first_row(trained, plain)[2:]
    assert [difference, low, high] == pytest.approx([v / 2 for v in whole], abs=0.02)


def test_compare_leaves_out_what_training_saw(run, plain, trained, tmp_path):
    """Two dev pairs are put among the test pairs, one of them turned round; a third pair has a
    train sentence."""
    folder = tmp_path / "data/KorSTS"
    shutil.copytree(SAMPLES / "KorSTS", folder)
    lines = {name: (folder / f"sts-{name}.tsv").read_text().splitlines() for name in
             ("train", "dev", "test")}  # fmt: skip
    *first, one, other = lines["dev"][1].split("\t")
    lines["test"] += [lines["dev"][2], "\t".join([*first, other, one])]
    lines["test"] += ["\t".join([*first, lines["train"][1].split("\t")[-1], "처음 보는 문장"])]
    (folder / "sts-test.tsv").write_text("\n".join(lines["test"]) + "\n")
    whole = run("--compare", trained, plain)[1].splitlines()
    for what, count in (("pairs", 2), ("sentences", 3)):
        options = ("--compare", trained, plain, "--leave_out", what)
        status, out, err = run(*options, data_dir=folder.parent)
        assert status == 0, err
        assert f"left out, in sts-train.tsv or sts-dev.tsv: {count} pairs" in out
        assert what == "pairs" or out.splitlines()[2:] == whole[1:]


def test_compare_needs_pairs_that_training_did_not_see(run, plain, trained, tmp_path):
    folder = tmp_path / "data/KorSTS"
    shutil.copytree(SAMPLES / "KorSTS", folder)
    shutil.copy(folder / "sts-test.tsv", folder / "sts-train.tsv")
    options = ("--compare", trained, plain, "--leave_out", "pairs")
    status, _, err = run(*options, data_dir=folder.parent)
    assert status == 2
    assert "error: what --leave_out pairs leaves: 0 pairs with 0 different scores" in err


def test_compare_says_who_is_better_only_where_the_interval_leaves_out_0(
    run, plain, trained, monkeypatch
):
    assert "no difference shown, the interval holds 0" in run("--compare", plain, plain)[1]
    table = read_korsts(SAMPLES / "KorSTS" / "sts-test.tsv")
    angle = np.arccos(table["score"].to_numpy())
    good = np.concatenate(
        [np.tile([1.0, 0.0], (48, 1)), np.stack([np.cos(angle), np.sin(angle)], 1)]
    ).astype(np.float32)
    pairs = np.arange(96).reshape(2, 48)

    def encode(encoder, *_, **__):
        noise = np.random.default_rng(0).normal(size=good.shape).astype(np.float32)
        return (good if encoder[0].model.name_or_path == str(trained) else noise), pairs

    monkeypatch.setattr(benchmark, "encode_pairs", encode)
    *_, side_a, side_b, last = run("--compare", trained, plain)[1].splitlines()
    assert last == "cosine Spearman: run is better than tiny"
    assert side_a == "A: cosine Spearman 100.00 [100.00, 100.00]"
    score, low, high = map(float, re.findall(r"-?\d+\.\d+", side_b.split("Spearman")[1]))
    assert low < score < high < 100
    assert run("--compare", plain, trained)[1].splitlines()[-1] == (
        "cosine Spearman: run is better than tiny"
    )


# --- KLUE-STS --------------------------------------------------------------------------------


def klue_items() -> list[dict]:
    """The samples in the form of KLUE-STS."""
    table = read_korsts(SAMPLES / "KorSTS" / "sts-test.tsv")
    return [
        {
            "guid": f"sample-{number}",
            "source": "sample",
            "sentence1": row.sentence1,
            "sentence2": row.sentence2,
            "labels": {
                "label": round(5 * row.score, 1),
                "real-label": 5 * row.score,
                "binary-label": int(5 * row.score >= 3),
            },
        }
        for number, row in enumerate(table.itertuples())
    ]


def test_klue_sts_has_f1_and_comes_from_the_folder_or_the_hub(run, plain, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    text = json.dumps(klue_items(), ensure_ascii=False)
    (data / "klue-sts-v1.1_dev.json").write_text(text, encoding="utf-8")
    status, out, err = run(plain, "--dataset", "klue-sts", data_dir=data)
    assert status == 0, err
    result = read(tmp_path, "tiny.klue-sts")
    assert list(result["scores"]) == [*SCORE_KEYS, "f1"] == list(result["intervals"])
    table = read_korsts(SAMPLES / "KorSTS" / "sts-test.tsv")
    model = load_encoder(str(plain))
    first, second = (model.encode(table[name].tolist()) for name in ("sentence1", "sentence2"))
    cosine = model.similarity_pairwise(first, second).numpy()
    expected = f1_score(table["score"] >= 0.6, 5 * cosine >= 3)
    assert result["scores"]["f1"] == pytest.approx(expected)
    assert result["scores"]["cosine_spearman"] == pytest.approx(
        spearmanr(cosine, table["score"])[0], abs=1e-6
    )
    assert "| Model | Cosine Pearson | Cosine Spearman | 95% interval | Sentences/s | MB |" in out
    assert results.NOT_MEASURED not in results.tables([result])["klue-sts"]

    parquet = tmp_path / "hub/datasets/klue/klue/sts/validation-00000-of-00001.parquet"
    parquet.parent.mkdir(parents=True)
    pd.DataFrame(klue_items()).to_parquet(parquet)
    with Hub(tmp_path / "hub") as hub:
        hub.patch(monkeypatch, tmp_path / "cache")
        status, _, err = run(plain, "--dataset", "klue-sts")
        assert status == 0 and "KLUE-STS comes from the Hub" in err
        again = read(tmp_path, "tiny.klue-sts")
        assert again["scores"] == result["scores"]
        assert again["data"]["file"] == parquet.name
        hub.faults["datasets/klue/klue"] = "missing"
        hub.patch(monkeypatch, tmp_path / "other-cache")
        status, _, err = run(plain, "--dataset", "klue-sts")
        assert status == 2 and "klue/klue cannot be downloaded" in err.splitlines()[-1]


# --- Tables, plots, published results --------------------------------------------------------


def result(name: str, spearman: float, **changes: object) -> dict:
    """A measured result as the benchmark writes it."""
    scores = dict.fromkeys(SCORE_KEYS, 0.5) | {"cosine_spearman": spearman}
    return {
        "name": name,
        "link": None,
        "source": "measured",
        "dataset": "korsts",
        "scores": scores,
        "intervals": {key: [value - 0.02, value + 0.02] for key, value in scores.items()},
        "data": {"file": "sts-test.tsv", "published": True},
        "model": {"size_bytes": 121e6, "pooling_added": False},
        "prompt": "",
        "embedding_precision": "float32",
        "device": "a processor",
        "threads": 2,
        "sentences_per_second": 196.4,
    } | changes


def store(folder: Path, *results: dict) -> None:
    folder.mkdir(exist_ok=True)
    for number, item in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(item), encoding="utf-8")


def test_tables_are_sorted_with_the_best_bold_and_two_decimals(tmp_path):
    dims = {"64": {"scores": {"cosine_spearman": 0.7}}, "8": {"scores": {"cosine_spearman": 0.6}}}
    other = {"64": {"scores": {"cosine_spearman": 0.65}}}
    store(
        tmp_path / "results",
        result("worse", 0.7, dims=other),
        result("owner/best", 0.8, link="https://huggingface.co/owner/best", dims=dims),
        result("stand-in", 0.99, data={"file": "sts-test.tsv", "published": False}),
        result("read", 0.9, source="published", published_in="https://example.org/x"),
    )
    parts = results.tables(results.read_results(tmp_path / "results"))
    published, measured = parts["all"].split("여기서 측정한 값 (a processor, 스레드 2개)")
    assert (
        "발표된 값 (https://example.org/x)" in published and "| read | 50.00 | 90.00 |" in published
    )
    assert measured.splitlines()[-2:] == [
        "| [owner/best](https://huggingface.co/owner/best) | **50.00** | **80.00** "
        "| [78.00, 82.00] |" + " **50.00** |" * 6 + " 121 |",
        "| worse | **50.00** | 70.00 | [68.00, 72.00] |" + " **50.00** |" * 6 + " 121 |",
    ]
    assert "stand-in" not in "".join(parts.values())
    assert parts["matryoshka"].splitlines()[-2:] == [
        "| [owner/best](https://huggingface.co/owner/best) | **70.00** | 60.00 |",
        "| worse | 65.00 |  |",
    ]
    assert parts["klue-sts"] == "아직 측정하지 않았습니다."


def test_update_readme_writes_between_the_markers_and_draws_the_plots(run, tmp_path):
    dims = {"64": {"scores": {"cosine_spearman": 0.7}}, "8": {"scores": {"cosine_spearman": 0.6}}}
    store(tmp_path / "results", result("한국어", 0.7, dims=dims), result("two", 0.8))
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    status, _, err = run("--update_readme", readme)
    assert status == 0, err
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(
        "# Title\n<!-- results:all -->\n여기서 측정한 값 (a processor, 스레드 2개)"
    )
    assert "old" not in text and text.endswith("<!-- /results:klue-sts -->\nend\n")
    assert "| two |" in text and "between <!-- results:matryoshka -->\n여기서 측정한 값" in text
    plot = tmp_path / "results/spearman_by_dimension.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "results/speed_and_size.png").exists()  # nothing was exported
    assert run("--update_readme", readme)[0] == 0
    assert readme.read_text(encoding="utf-8") == text
    other = tmp_path / "other.md"
    for file in (readme, other):
        file.write_text(README, encoding="utf-8")
    assert run("--update_readme", readme, "--update_readme", other)[0] == 0
    assert readme.read_text(encoding="utf-8") == other.read_text(encoding="utf-8") == text
    readme.write_text(README.replace("<!-- /results:all -->", ""), encoding="utf-8")
    status, _, err = run("--update_readme", readme)
    assert status == 2 and "should hold <!-- results:all --> ... <!-- /results:all --> once" in err


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"source": "measured", "scores": {}}'])
def test_a_file_that_is_no_result_is_named(run, tmp_path, content):
    store(tmp_path / "results", result("one", 0.7))
    (tmp_path / "results" / "odd.json").write_text(content, encoding="utf-8")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    status, _, err = run("--update_readme", tmp_path / "README.md")
    assert status == 2 and "odd.json: no result of benchmark.py" in err
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README


def test_without_results_no_table_is_overwritten(run, tmp_path):
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    status, _, err = run("--update_readme", tmp_path / "README.md")
    assert status == 2 and f"--results_dir {tmp_path / 'results'}: no such folder" in err
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README


@pytest.mark.parametrize(
    ("name", "key"),
    [("results/e5-small-ko.json", "prompt"), ("results/e5-small-ko.json", "data"),
     ("results/jhgan--ko-sbert-nli.published.json", "published_in"),
     ("results/onnx/e5-small-ko-sts.json", "rows"),
     ("results/experiments/cosine-777.json", "versions"),
     ("measurements/training.json", "medians"),
     ("measurements/openvino.json", "sentences_per_second"),
     ("measurements/whole_run.json", "runs"), ("measurements/size.json", "cpu"),
     ("measurements/int8.json", "rows")],
)  # fmt: skip
def test_a_stored_file_that_is_damaged_or_of_another_form_is_named(
    name, key, tmp_path, monkeypatch
):
    for folder in ("results", "measurements"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    monkeypatch.setattr(benchmark, "MEASUREMENTS", tmp_path / "measurements")
    file = tmp_path / name
    text = file.read_text(encoding="utf-8")
    content = json.loads(text)
    without = {k: v for k, v in content.items() if k != key}
    without |= {key: {}} if key == "cpu" else {}  # measured on one of two machines, it is whole
    for form in (text[: len(text) // 2], "", "[]", 100_000 * "[", json.dumps(without)):
        file.write_text(form, encoding="utf-8")
        with pytest.raises(UserError, match=f"^{re.escape(str(file))}: no "):
            benchmark.generated_parts(tmp_path / "results")


@pytest.mark.parametrize(
    ("name", "changes"),
    [("measurements/openvino.json", {"sentences_per_second": {}}),
     ("measurements/openvino.json", {"sentences_per_second": {"OpenVINO fp32": {"batch_1": 0}}}),
     ("results/e5-small-ko.json", {"dims": {"64": {}}}),
     ("results/e5-small-ko.json", {"dims": {"x": {"scores": {"cosine_spearman": 1}}}})],
)  # fmt: skip
def test_a_stored_file_without_figures_is_named(name, changes, tmp_path, monkeypatch):
    for folder in ("results", "measurements"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    monkeypatch.setattr(benchmark, "MEASUREMENTS", tmp_path / "measurements")
    edit_json(tmp_path / name, **changes)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / name))}: no "):
        benchmark.generated_parts(tmp_path / "results")


def test_the_published_results_are_complete_and_marked():
    published = [
        item
        for item in results.read_results(REPOSITORY / "results")
        if item["source"] == "published"
    ]
    assert sorted(item["name"] for item in published) == sorted(benchmark.MODELS)
    for item in published:
        assert item["link"] == f"https://huggingface.co/{item['name']}"
        assert item["published_in"].startswith("https://github.com/jhgan00/")
        assert list(item["scores"]) == list(SCORE_KEYS) and "intervals" not in item
        if item["name"].endswith("-mrl"):
            assert list(map(int, item["dims"])) == benchmark.MATRYOSHKA_DIMS
            whole = item["scores"]["cosine_spearman"]
            assert item["dims"]["768"]["scores"]["cosine_spearman"] == whole
    assert published[0]["name"] == "jhgan/ko-sroberta-multitask"


def test_no_stored_result_holds_a_path():
    for path in (REPOSITORY / "results").glob("**/*.json"):
        text = path.read_text(encoding="utf-8").replace("https://", "")
        assert not any(root in text for root in ("/home/", "/root/", "/tmp/", "/work/", "/Users/"))


def test_every_generated_part_shows_what_is_in_the_json_files(tmp_path):
    parts = benchmark.generated_parts(REPOSITORY / "results")
    shown = set()
    for file in results.markdown_files(REPOSITORY):
        copy = tmp_path / file.name
        text = file.read_text(encoding="utf-8")
        copy.write_text(text, encoding="utf-8")
        results.write_parts(copy, parts)
        rewritten = copy.read_text(encoding="utf-8")
        assert rewritten == text, f"{file}: run python benchmark.py --update_readme"
        shown |= {name for name in parts if f"<!-- results:{name} -->" in text}
    assert shown == set(parts)


def test_a_prompt_longer_than_a_file_name_loses_no_result(run, plain, tmp_path):
    prompt = f"질문:{' ' * 300}"  # few tokens, many bytes
    status, _, err = run(plain, "--prompt", prompt)
    assert status == 0, err
    assert (
        read(tmp_path, "tiny")["prompt"] == prompt and prompt in read(tmp_path, "tiny")["command"]
    )


@pytest.mark.parametrize("prompt", ["~글: ", "./글: ", "/글: "])
def test_a_prompt_that_begins_like_a_path_loses_no_result(run, plain, tmp_path, prompt):
    status, _, err = run(plain, "--prompt", prompt)
    assert status == 0, err
    assert read(tmp_path, "tiny")["prompt"] == prompt


def test_an_onnx_row_states_the_threads_that_onnxruntime_takes(run, tmp_path, monkeypatch):
    write_onnx(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    encoder = OnnxEncoder(tmp_path / "words.onnx")
    assert encoder.session.get_session_options().intra_op_num_threads == encoder.threads == 3
    assert run(tmp_path / "words.onnx")[0] == 0
    assert read(tmp_path, "words")["threads"] == 3


def test_pairs_without_a_correlation_are_refused_by_file_name(run, plain, tmp_path, monkeypatch):
    monkeypatch.delattr(benchmark, "load_encoder")  # no model is asked for
    data = tmp_path / "data/KorSTS"
    data.mkdir(parents=True)
    lines = (SAMPLES / "KorSTS/sts-test.tsv").read_text(encoding="utf-8").splitlines()
    (data / "sts-test.tsv").write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    status, _, err = run(plain, data_dir=data.parent)
    assert status == 2 and err.splitlines()[-1].endswith(
        "sts-test.tsv: 3 pairs with 3 different scores: a correlation wants 10 pairs and two "
        "scores at least"
    )
