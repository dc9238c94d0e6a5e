"""Exports tiny encoders, and the offline one where it exists, and compares every vector."""

import ast
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from commands import Started, new_environment, run_script
from encoders import (
    SAMPLES,
    add_module_with_code,
    edit_json,
    tiny_tokenizer,
    write_family,
    write_plain_encoder,
)
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLNetConfig,
)

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path += [str(REPOSITORY / "onnx"), str(REPOSITORY / "examples")]

import check_onnx  # noqa: E402
import export_onnx  # noqa: E402
import measure_onnx  # noqa: E402
import quantize_onnx  # noqa: E402
import semantic_search_onnx  # noqa: E402

from common.command_line import UserError, command_line  # noqa: E402
from common.data import read_korsts  # noqa: E402
from common.encoders import load_encoder, save_encoder  # noqa: E402
from common.exported import embed  # noqa: E402
from common.results import onnx_part, write_parts  # noqa: E402
from common.scoring import distinct_sentences  # noqa: E402

SCRIPT = REPOSITORY / "onnx/export_onnx.py"
EXAMPLE = REPOSITORY / "examples/semantic_search_onnx.py"
SENTENCES = ["한 남자가 음식을 먹는다.", "", "가", "여자가 악기를 연주하고 있다. " * 30]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "bert": BertConfig(**SIZES, intermediate_size=64, initializer_range=0.2),
    "roberta": RobertaConfig(
        **SIZES, intermediate_size=64, initializer_range=0.2, type_vocab_size=1, pad_token_id=0
    ),
    "electra": ElectraConfig(
        **SIZES, intermediate_size=64, initializer_range=0.2, embedding_size=16
    ),
    "distilbert": DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2),
}


def write_encoder(folder: Path, kind: str = "bert", pooling: str = "mean", *more) -> Path:
    """Writes an encoder of two layers as a run folder, with more modules after its pooling."""
    plain = write_plain_encoder(folder / "plain")
    torch.manual_seed(0)
    config = CONFIGS[kind]
    config.vocab_size, config.max_position_embeddings = tiny_tokenizer().get_vocab_size(), 160
    AutoModel.from_config(config).save_pretrained(plain)
    model = load_encoder(str(plain), max_seq_length=128, device="cpu")
    modules = [model[0], Pooling(32, pooling_mode=pooling), *more]
    save_encoder(SentenceTransformer(modules=modules, device="cpu"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process; returns its exit status and stderr's errors.

    All of stdout and stderr are its .out and .err. First embeddings, each of which starts a
    process, are not timed: .timed has the arguments.
    """

    def call(model: object, *arguments: object, output: Path = tmp_path / "out/tiny.onnx"):
        command = ["export_onnx.py", "--model", model, "--output", output, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        status = 0
        # The samples are not KorSTS: what is measured on them says nothing about a model.
        monkeypatch.setattr(measure_onnx, "SENTENCES", {32: 8, 1: 2})
        monkeypatch.setattr(measure_onnx, "ROUNDS", 1)
        monkeypatch.setattr(
            measure_onnx, "first_embedding_seconds", lambda *what: call.timed.append(what) or 1.0
        )
        try:
            with command_line():
                export_onnx.main()
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)
        call.out, call.err = capsys.readouterr()
        return status, [line for line in call.err.splitlines() if line.startswith("error")]

    call.timed = []
    return call


def features(session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray) -> dict:
    everything = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {item.name: everything[item.name] for item in session.get_inputs()}


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# --- The graph -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, pooling, inputs",
    [
        ("bert", "mean", 3),
        ("bert", "cls", 3),
        ("bert", "max", 3),
        ("roberta", "mean", 2),  # one token type: no such input
        ("roberta", "cls", 2),
        ("electra", "mean", 3),
        ("distilbert", "mean", 2),
    ],
)
def test_every_shape_and_mask_equals_the_torch_forward(tmp_path, export, kind, pooling, inputs):
    folder = write_encoder(tmp_path, kind, pooling)
    assert export(folder) == (0, [])
    session = onnxruntime.InferenceSession(tmp_path / "out/tiny.onnx")
    assert len(session.get_inputs()) == inputs
    assert all(item.type == "tensor(int64)" for item in session.get_inputs())
    (output,) = session.get_outputs()
    assert (output.name, output.shape[1], output.type) == (
        "sentence_embedding",
        32,
        "tensor(float)",
    )
    model = load_encoder(str(folder), device="cpu")
    generator = np.random.default_rng(0)
    for batch, length in itertools.product((1, 2, 3, 64), (1, 5, 64, 128)):
        ids = generator.integers(4, tiny_tokenizer().get_vocab_size(), size=(batch, length))
        holes = generator.integers(0, 2, size=ids.shape)
        holes[:, length // 2] = 1
        lengths = generator.integers(1, length + 1, size=(batch, 1))
        right = (np.arange(length) < lengths).astype(np.int64)
        for mask in (np.ones_like(ids), right, right[:, ::-1].copy(), holes):
            feeds = features(session, ids, mask)
            tensors = {name: torch.from_numpy(values) for name, values in feeds.items()}
            with torch.inference_mode():
                expected = model(tensors)["sentence_embedding"].numpy()
            (found,) = session.run(None, feeds)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_normalize_and_dim(tmp_path, export):
    folder = write_encoder(tmp_path, "bert", "mean", Normalize())
    assert export(folder, "--dim", 8) == (0, [])
    path = tmp_path / "out/tiny.onnx"
    session = onnxruntime.InferenceSession(path)
    tokenizer = Tokenizer.from_file(str(path.with_suffix(".tokenizer.json")))
    found = embed(session, tokenizer, SENTENCES)
    expected = load_encoder(str(folder), device="cpu").encode(SENTENCES, truncate_dim=8)
    assert found.shape == (4, 8) and session.get_outputs()[0].shape == ["batch", 8]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert settings["dimension"] == 8 and settings["normalized"] is False  # a slice is not
    # So is what a model is declared to be cut to.
    edit_json(folder / "config_sentence_transformers.json", truncate_dim=16)
    assert export(folder) == (0, [])
    settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert settings["dimension"] == 16 and settings["normalized"] is False


def test_standard_operators_and_one_file_that_stands_alone(tmp_path, bert, export):
    assert export(bert) == (0, [])
    assert left_over(tmp_path / "out") == ["tiny.json", "tiny.onnx", "tiny.tokenizer.json"]
    content = (tmp_path / "out/tiny.onnx").read_bytes()
    assert str(REPOSITORY).encode() not in content and str(tmp_path).encode() not in content
    alone = tmp_path / "empty"
    alone.mkdir()
    (alone / "model.onnx").write_bytes(content)
    proto = onnx.load(alone / "model.onnx")
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", 17)]
    assert {node.domain for node in proto.graph.node} == {""}
    # Only the keys of two layers are turned (and what NonZero gives): heads are gathered from
    # rows, and rows from heads.
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Transpose") == 3 and "Split" not in kinds
    metadata = {item.key: item.value for item in proto.metadata_props}
    digest = hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    tokenizer = metadata.pop("tokenizer")
    assert metadata == {
        "model": "run",
        "revision": f"sha256:{digest}",
        "licence": "unknown",
        "max_seq_length": "128",
        "pooling": "mean",
        "normalized": "False",
        "dimension": "32",
        "prompt": "",
        "precision": "fp32",
    }
    settings = json.loads((tmp_path / "out/tiny.json").read_text(encoding="utf-8"))
    assert settings["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert settings["max_seq_length"] == 128
    assert tokenizer == (tmp_path / "out/tiny.tokenizer.json").read_text(encoding="utf-8")
    found = embed(
        onnxruntime.InferenceSession(alone / "model.onnx"), Tokenizer.from_str(tokenizer), SENTENCES
    )
    expected = load_encoder(str(bert), device="cpu").encode(SENTENCES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_two_exports_are_the_same_bytes_in_any_process(tmp_path, bert):
    contents = []
    for seed in ("0", "1"):
        output = tmp_path / seed / "tiny.onnx"
        if seed == "0":
            subprocess.run(
                [sys.executable, SCRIPT, "--model", bert, "--output", output],
                env=os.environ | {"PYTHONHASHSEED": seed},
                cwd=tmp_path,
                check=True,
                capture_output=True,
            )
        else:  # in this process, which has another one
            assert os.environ.get("PYTHONHASHSEED") != "0"
            assert run_script(SCRIPT, "--model", bert, "--output", output).returncode == 0
        contents.append([path.read_bytes() for path in sorted(output.parent.iterdir())])
    assert len(contents[0]) == 3 and contents[0] == contents[1]


def test_the_default_prompt_is_the_consumers_business(tmp_path, export):
    folder = write_encoder(tmp_path)
    prompts = {"prompts": {"query": "질문: "}, "default_prompt_name": "query"}
    edit_json(folder / "config_sentence_transformers.json", **prompts)
    assert export(folder) == (0, [])  # checked with the prompt before each sentence
    settings = json.loads((tmp_path / "out/tiny.json").read_text(encoding="utf-8"))
    assert settings["prompt"] == "질문: "


# --- What programs in other languages have to find -------------------------------------------


def test_the_golden_file_holds_the_vectors_of_each_file(tmp_path, export):
    folder = write_encoder(tmp_path)
    prompts = {"prompts": {"query": "글 😀 "}, "default_prompt_name": "query"}
    edit_json(folder / "config_sentence_transformers.json", **prompts)
    golden = tmp_path / "golden/tiny.golden.json"
    options = ["--golden", golden, "--quantize", "int8", "--data_dir", SAMPLES, "--force"]
    assert export(folder, *options, "--results_dir", tmp_path, "--fp16") == (0, [])
    assert left_over(golden.parent) == ["tiny.golden.json"]
    content = json.loads(golden.read_text(encoding="utf-8"))
    assert (content["prompt"], content["dimension"], content["max_seq_length"]) == (
        "글 😀 ",
        32,
        128,
    )
    sentences = content["sentences"]
    assert sentences == list(check_onnx.CHECK_SENTENCES)
    nfd = [text for text in sentences if not unicodedata.is_normalized("NFC", text)]
    assert len(nfd) == 1 and "" in sentences and " \n" in sentences
    expected = load_encoder(str(folder), device="cpu").encode(sentences)
    names = ["tiny.onnx", "tiny-fp16.onnx", "tiny-int8.onnx"]
    assert list(content["vectors"]) == names
    for name, tolerance in zip(names, (1e-5, 1e-2, None), strict=True):
        vectors = np.array(content["vectors"][name])
        if tolerance:
            np.testing.assert_allclose(vectors, expected, rtol=0, atol=tolerance)
        session, tokenizer = semantic_search_onnx.load(str(tmp_path / "out" / name))
        found = semantic_search_onnx.embed(session, tokenizer, sentences)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        close = (found * unit).sum(axis=1).min()
        assert close > (0.99 if name == "tiny-int8.onnx" else 0.9999)


def test_a_golden_file_is_of_its_export_or_is_not_there(tmp_path, bert, export, monkeypatch):
    golden = tmp_path / "out/tiny.golden.json"
    assert export(bert, "--golden", tmp_path / "out/tiny.json")[0] == 2
    assert left_over(tmp_path / "out") == []
    assert export(bert, "--golden", golden) == (0, [])
    before = golden.read_bytes()
    with monkeypatch.context() as patch:  # nothing is replaced: it stays
        original = export_onnx.SentenceEncoder.forward
        patch.setattr(export_onnx.SentenceEncoder, "forward", lambda *args: original(*args) + 2e-5)
        assert export(bert, "--golden", golden)[0] == 1
    assert golden.read_bytes() == before
    with monkeypatch.context() as patch:  # the file is replaced, but not its golden file
        patch.setattr(export_onnx, "write_golden", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(bert, "--golden", golden)
    assert left_over(tmp_path / "out") == ["tiny.json", "tiny.onnx", "tiny.tokenizer.json"]


# --- What is refused, and what failure leaves ------------------------------------------------


def test_modules_that_the_graph_would_not_hold(tmp_path, export):
    dense = write_encoder(tmp_path / "dense", "bert", "mean", Dense(32, 16))
    assert export(dense) == (2, [f"error: {dense}: module 2 is Dense, not Normalize"])
    pooling = write_encoder(tmp_path / "pooling", "bert", "weightedmean")
    status, errors = export(pooling)
    assert status == 2 and "pooling 'weightedmean' is not supported" in errors[0]
    assert left_over(tmp_path / "out") == []


def test_a_tokenizer_without_a_pad_token(tmp_path, export):
    folder = write_encoder(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            content.pop("pad_token", None)
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    status, errors = export(folder)
    assert status == 2 and "no pad token" in errors[0]


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--dim", 33], 2, "--dim 33: .* has 32 dimensions"),
        (["--dim", 0], 2, "--dim 0: .* has 32 dimensions"),
        (["--quantize", "int8", "--data_dir", "nowhere"], 2, "sts-test.tsv: no such file"),
    ],
)
def test_bad_arguments(tmp_path, bert, export, arguments, status, message):
    found, errors = export(bert, *arguments)
    assert found == status and re.search(message, errors[0])
    assert left_over(tmp_path / "out") == []


def test_a_tokenizer_that_declares_no_length(tmp_path, export):
    config = XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, pad_token_id=0)
    folder = write_family(tmp_path / "xlnet", config)
    status, errors = export(folder)
    assert status == 2 and "no max_seq_length, nor model_max_length" in errors[0]
    edit_json(folder / "tokenizer_config.json", model_max_length=64)
    assert export(folder)[0] != 2


def test_a_tokenizer_that_makes_nothing_of_an_empty_sentence(tmp_path, export):
    folder = write_encoder(tmp_path)
    edit_json(folder / "tokenizer.json", post_processor=None)
    status, errors = export(folder)
    assert status == 2 and "its tokenizer adds no token" in errors[0]
    assert left_over(tmp_path / "out") == []


def test_a_graph_that_cannot_be_made_or_run_is_one_line(tmp_path, bert, export, monkeypatch):
    original = export_onnx.SentenceEncoder.forward
    with monkeypatch.context() as patch:  # there is no such operator
        made = lambda *args: torch.special.i0(original(*args))  # noqa: E731
        patch.setattr(export_onnx.SentenceEncoder, "forward", made)
        status, errors = export(bert)
        assert status == 1 and len(errors) == 1 and errors[0].startswith("error: bert: no graph: ")

    def as_traced(encoder, input_ids, *others):  # at the exporter's length
        length = input_ids.shape[1].item() if torch.is_tensor(input_ids.shape[1]) else 7
        return original(encoder, input_ids, *others) + input_ids[:, torch.arange(length)].sum() * 0

    monkeypatch.setattr(export_onnx.SentenceEncoder, "forward", as_traced)
    status, errors = export(bert)
    assert status == 1 and len(errors) == 1 and "tiny.onnx: onnxruntime cannot run it" in errors[0]
    assert left_over(tmp_path / "out") == []


def test_the_check_of_a_model_for_long_texts_fits_into_memory(tmp_path, export, monkeypatch):
    config = BertConfig(**SIZES, intermediate_size=64, max_position_embeddings=1024)
    folder = write_family(tmp_path / "long", config, model_max_length=1024)
    places = []  # of the attention, a head

    def recorded(session, tokenizer, texts, batch_size):
        lengths = sorted(len(found.ids) for found in map(tokenizer.encode, texts))[-batch_size:]
        places.append(len(lengths) * lengths[-1] ** 2)
        return embed(session, tokenizer, texts, batch_size)

    monkeypatch.setattr(check_onnx, "embed", recorded)
    assert export(folder) == (0, [])
    assert len(places) == 4 and max(places) == 3 * 1024**2


def test_a_missing_model_and_a_name_that_is_not_onnx(tmp_path, bert, export):
    status, errors = export(tmp_path / "nowhere")
    assert status == 2 and "no such folder" in errors[0] and len(errors) == 1
    assert export(bert, output=tmp_path / "out/model.bin")[0] == 2
    (tmp_path / "out/model.onnx").mkdir(parents=True)
    assert export(bert, output=tmp_path / "out/model.onnx")[0] == 2
    assert left_over(tmp_path / "out") == ["model.onnx"]


def test_a_path_that_cannot_be_written(tmp_path, bert, export):
    (tmp_path / "file").write_text("", encoding="utf-8")
    status, errors = export(bert, output=tmp_path / "file/model.onnx")
    assert status == 1 and len(errors) == 1 and "file" in errors[0]


def test_a_full_disk_leaves_the_old_file(tmp_path, bert):
    output = tmp_path / "out/tiny.onnx"
    output.parent.mkdir()
    output.write_bytes(b"old")
    process = Started(SCRIPT, "--model", bert, "--output", output, largest_file=20_000)
    _, stderr = process.communicate()
    assert process.returncode == 1 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("error: ")
    assert left_over(output.parent) == ["tiny.onnx"] and output.read_bytes() == b"old"


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(tmp_path, bert, signal_number):
    folder = tmp_path / "out"
    process = Started(SCRIPT, "--model", bert, "--output", folder / "tiny.onnx")
    deadline = time.monotonic() + 60
    while not left_over(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal_number)
    _, err = process.communicate()
    assert process.returncode == 130 and err.splitlines()[-1] == "interrupted"
    assert left_over(folder) == []


def test_a_failed_check_leaves_no_file(tmp_path, bert, export, monkeypatch):
    original = export_onnx.SentenceEncoder.forward
    monkeypatch.setattr(
        export_onnx.SentenceEncoder, "forward", lambda *args: original(*args) + 2e-5
    )
    status, errors = export(bert)
    assert status == 1 and re.search(
        "differs from sentence-transformers by 2..e-05, more than 1e-05", errors[0]
    )
    assert left_over(tmp_path / "out") == []


def test_above_2_gb_the_weights_lie_beside(tmp_path, bert, export, monkeypatch, capsys):
    monkeypatch.setattr(export_onnx, "MAX_FILE_BYTES", 10_000)
    assert export(bert, "--fp16", "--quantize", "int8", "--data_dir", SAMPLES, "--force",
                  "--results_dir", tmp_path / "results") == (0, [])  # fmt: skip
    names = [f"{name}.{end}" for name in ("tiny", "tiny-fp16", "tiny-int8")
             for end in ("json", "onnx", "onnx.data", "tokenizer.json")]  # fmt: skip
    assert left_over(tmp_path / "out") == sorted(names)
    assert (tmp_path / "out/tiny.onnx.data").stat().st_size > 10_000
    path = tmp_path / "out/tiny.onnx"
    tokenizer = Tokenizer.from_file(str(path.with_suffix(".tokenizer.json")))
    found = embed(onnxruntime.InferenceSession(path), tokenizer, SENTENCES)
    expected = load_encoder(str(bert), device="cpu").encode(SENTENCES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    monkeypatch.undo()


# --- int8 and fp16 ---------------------------------------------------------------------------


def saturating_products(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """uint8 (n, k) times int8 (m, k) as CPUs with AVX2 alone do: pairs saturate in 16 bits."""
    products = activations[:, None].astype(np.int64) * weights[None].astype(np.int64)
    pairs = products.reshape(*products.shape[:2], -1, 2).sum(-1)
    return np.clip(pairs, -32768, 32767).sum(-1)


@pytest.mark.parametrize("kind", ["normal", "one sign", "equal", "outliers", "zero"])
def test_int8_weights_cannot_saturate(kind):
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(64, 96)).astype(np.float32)
    if kind == "one sign":
        weights = np.abs(weights)
    elif kind == "equal":
        weights[:] = 0.3
    elif kind == "outliers":
        weights[:, ::7] *= 50
    elif kind == "zero":
        weights[:] = 0
    values, scale = quantize_onnx.int8_weights(weights, np.full(64, 1e-30))
    assert values.dtype == np.int8 and scale.dtype == np.float32 and (scale > 0).all()
    assert (np.abs(values * scale[:, None] - weights) <= scale[:, None] / 2 * 1.0001).all()
    worst = [np.where(values > 0, 255, 0), np.where(values < 0, 255, 0)]
    for activations in [*worst, generator.integers(0, 256, size=(64, 96))]:
        exact = activations.astype(np.int64) @ values.T.astype(np.int64)
        assert (saturating_products(activations, values) == exact).all()


def test_full_range_weights_would_saturate():
    """The emulation sees what `int8_weights` avoids."""
    values = np.full((1, 2), 127, dtype=np.int8)
    assert saturating_products(np.full((1, 2), 255), values)[0, 0] == 32767 < 255 * 254


def linear_layers(*layers: tuple[np.ndarray, np.ndarray]) -> onnx.ModelProto:
    """A graph of linear layers (weights, bias), one behind the other, from `layer0` on."""
    nodes, values = [], []
    for number, (weights, bias) in enumerate(layers):
        names = [f"layer{number}", f"weights{number}", f"bias{number}"]
        after = [f"layer{number + 1}"]
        nodes.append(helper.make_node("Gemm", names, after, f"gemm{number}", transB=1))
        arrays = zip((weights, bias), names[1:], strict=True)
        values += [numpy_helper.from_array(array, name) for array, name in arrays]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", len(width)])
        for name, width in (("layer0", layers[0][0].T), (f"layer{len(layers)}", layers[-1][1]))
    ]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outputs_of(proto: onnx.ModelProto, rows: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {"layer0": rows.astype(np.float32)})[0]


def seen_by(proto: onnx.ModelProto, rows: np.ndarray) -> dict[str, quantize_onnx.Activations]:
    weights = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    found, rows = {}, rows.astype(np.float32)
    for node in proto.graph.node:
        found[node.input[0]] = quantize_onnx.Activations(rows.min(0), rows.max(0), rows)
        rows = rows @ weights[node.input[1]].T + weights[node.input[2]]
    return found


def test_the_bias_takes_the_mean_of_what_rounding_changes():
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(16, 32)).astype(np.float32)
    rows = generator.normal(size=(500, 32)) + 3 * generator.normal(size=32)  # means far from 0
    proto = linear_layers((weights, generator.normal(size=16).astype(np.float32)))
    seen = seen_by(proto, rows)
    rounding = quantize_onnx.least_error(seen["layer0"], weights)
    expected = outputs_of(proto, rows)
    found = outputs_of(quantize_onnx.quantize_int8(proto, seen, {"layer0": rounding}), rows)
    change = found - expected
    assert 0 < np.abs(change).max() < 0.5
    assert np.abs(change.mean(0)).max() < 2e-3
    assert rounding.noise == pytest.approx(change.var(0).sum() / expected.var(0).sum(), rel=0.01)


def test_outliers_are_smoothed_or_cut_where_that_changes_less():
    """One scale for the extremes of all channels would be forty times as coarse."""
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(16, 32)).astype(np.float32)
    rows = generator.normal(size=(500, 32)).astype(np.float32)
    noise = {}
    for kind, factor, place in (("none", 1, ()), ("channel", 40, 3), ("value", 40, (0, 3))):
        wide = rows.copy()
        wide[:, place] *= factor if kind == "channel" else 1
        wide[place] *= factor if kind == "value" else 1
        seen = quantize_onnx.Activations(wide.min(0), wide.max(0), wide)
        readers = weights.copy()
        readers[:, place] /= factor if kind == "channel" else 1
        noise[kind] = quantize_onnx.least_error(seen, readers).noise
    assert noise["channel"] < 3 * noise["none"] and noise["value"] < 50 * noise["none"]


@pytest.mark.parametrize(
    ("accepted", "largest", "kept"), [(9, 9, 0), (2.5, 9, 1), (1.5, 9, 2), (0.1, 9, 4), (0.1, 0, 0)]
)
def test_the_noisiest_layers_stay_in_float32_while_dev_asks_for_it(
    accepted, largest, kept, monkeypatch
):
    monkeypatch.setattr(quantize_onnx, "ACCEPTED", accepted)
    monkeypatch.setattr(quantize_onnx, "LARGEST", largest)
    generator = np.random.default_rng(0)
    # The further a layer's channels lie apart, the noisier it is in int8.
    sizes = [np.exp(spread * generator.normal(size=32)) for spread in (1, 4, 0, 3, 2)]
    layers = [(generator.normal(size=(32, 32)) * size, np.zeros(32)) for size in sizes]
    proto = linear_layers(*(tuple(np.float32(part) for part in layer) for layer in layers))
    seen = {f"layer{n}": quantize_onnx.Activations(rows.min(0), rows.max(0), rows)
            for n, rows in enumerate(np.float32(generator.normal(size=(5, 200, 32))))}  # fmt: skip
    noise = {
        name: quantize_onnx.least_error(rows, np.float32(layers[n][0])).noise
        for n, (name, rows) in enumerate(seen.items())
    }

    def expected_loss(graph: onnx.ModelProto) -> float:
        in_float = [node.input[0] for node in graph.graph.node if node.input[0] in seen
                    and node.op_type == "Gemm"]  # fmt: skip
        asked.append(in_float)
        return 3 - len(in_float) if len(in_float) < 3 else 0

    asked: list[list[str]] = []
    chosen, names, lost = quantize_onnx.choose_int8(proto, seen, expected_loss)
    noisiest = sorted(noise, key=lambda name: -noise[name])[:kept]
    assert sorted(names) == sorted(name.replace("layer", "gemm") for name in noisiest)
    assert lost == (3 - kept if kept < 3 else 0)
    assert [len(each) for each in asked] == [n for n in (0, 1, 2, 4) if n <= kept]
    assert np.isfinite(outputs_of(chosen, generator.normal(size=(4, 32)))).all()


def test_values_take_the_smoothing_of_what_attention_gives(tmp_path, bert, export, monkeypatch):
    assert export(bert) == (0, [])
    path = tmp_path / "out/tiny.onnx"
    proto, tokenizer = (
        onnx.load(path),
        Tokenizer.from_file(str(path.with_suffix(".tokenizer.json"))),
    )
    seen = quantize_onnx.calibrate(path, tokenizer, SENTENCES)
    layers = quantize_onnx.readers(proto)
    weights = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    roundings = {
        name: quantize_onnx.least_error(seen[name], weights[layer.input[1]])
        for name, (layer,) in layers.items()
    }
    values = quantize_onnx.value_projections(proto)
    contexts = list(values.values())
    assert len(contexts) == 2 and all(roundings[name].smoothing.std() > 0 for name in contexts)

    def smoothed(graph: onnx.ModelProto) -> list[str]:
        names = [item.name for item in graph.graph.initializer]
        return [name.removesuffix(".smoothing") for name in names if name.endswith(".smoothing")]

    def vectors(graph: onnx.ModelProto) -> np.ndarray:
        return embed(onnxruntime.InferenceSession(graph.SerializeToString()), tokenizer, SENTENCES)

    folded = quantize_onnx.quantize_int8(proto, seen, roundings)
    assert sorted(smoothed(folded)) == sorted(set(roundings) - set(contexts))
    in_float = next(name for name, (layer,) in layers.items() if layer.name in values)
    fewer = {name: rounding for name, rounding in roundings.items() if name != in_float}
    mixed = quantize_onnx.quantize_int8(proto, seen, fewer)
    assert sorted(smoothed(mixed)) == sorted(set(fewer) - set(contexts[1:]))
    others = {name: rounding for name, rounding in roundings.items() if name != contexts[0]}
    left = quantize_onnx.quantize_int8(proto, seen, others)
    assert sorted(smoothed(left)) == sorted(set(others) - set(contexts))
    monkeypatch.setattr(quantize_onnx, "value_projections", lambda proto: {})
    plain = quantize_onnx.quantize_int8(proto, seen, roundings)
    assert sorted(smoothed(plain)) == sorted(roundings)
    expected = vectors(proto)
    far = [np.abs(vectors(graph) - expected).max() for graph in (plain, folded, mixed, left)]
    assert max(far) < 2 * far[0] < 0.1 * np.abs(expected).max()


def test_what_is_expected_to_be_lost_is_what_changes_cosines_at_random(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    sentences = [str(number) for number in range(4000)]
    angles = np.arccos(generator.uniform(0, 1, 2000))
    pairs = pd.DataFrame({"sentence1": sentences[::2], "sentence2": sentences[1::2]})
    pairs["score"] = np.cos(angles) + generator.normal(0, 0.3, 2000)

    def vectors(angles: np.ndarray) -> np.ndarray:
        turned = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return np.stack([np.tile([1.0, 0.0], (2000, 1)), turned], axis=1).reshape(4000, 2)

    cosines = {False: np.cos(angles)}
    cosines[True] = np.clip(cosines[False] + generator.normal(0, 0.1, 2000), -1, 1)
    order = {name: row for row, name in enumerate(distinct_sentences(pairs)[0])}
    rows = [order[name] for name in sentences]
    found = {}
    for noisy, values in cosines.items():
        found[noisy] = np.empty((4000, 2))
        found[noisy][rows] = vectors(np.arccos(values))
    monkeypatch.setattr(measure_onnx.onnxruntime, "InferenceSession", lambda model: model)
    monkeypatch.setattr(
        measure_onnx, "embed", lambda model, *_, **__: found[isinstance(model, bytes)]
    )
    lose = measure_onnx.expected_loss(None, tmp_path, pairs, "")
    before, after = (spearmanr(values, pairs["score"]).statistic for values in cosines.values())
    assert lose(onnx.ModelProto()) == pytest.approx(100 * (before - after), abs=1)
    assert lose(onnx.ModelProto()) > 2


def test_int8_of_a_tiny_encoder(tmp_path, bert, export):
    results = tmp_path / "results"
    arguments = ["--quantize", "int8", "--data_dir", SAMPLES, "--results_dir", results]
    assert export(bert, *arguments, "--max_loss", 100) == (0, [])
    assert "| ONNX int8 |" in export.out
    path = tmp_path / "out/tiny-int8.onnx"
    proto = onnx.load(path)
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", 17)]
    arrays = [numpy_helper.to_array(item) for item in proto.graph.initializer]
    matrices = [array for array in arrays if array.ndim == 2 and array.dtype == np.int8]
    # Word embeddings, and in each of two layers four: query, key and value are one.
    assert len(matrices) == 1 + 2 * 4
    session = onnxruntime.InferenceSession(path)
    tokenizer = Tokenizer.from_file(str(path.with_suffix(".tokenizer.json")))
    table = read_korsts(SAMPLES / "KorSTS/sts-test.tsv")
    sentences = [*dict.fromkeys(table["sentence1"])]
    found = embed(session, tokenizer, sentences)
    expected = load_encoder(str(bert), device="cpu").encode(sentences)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(axis=1) / norms).min() > 0.99
    # Static: the others of a batch do not change an embedding.
    alone = embed(session, tokenizer, sentences, batch_size=1)
    np.testing.assert_allclose(found, alone, rtol=0, atol=0.02)
    assert np.median(np.abs(found - alone)) < 1e-6

    content = json.loads((results / "onnx/tiny.json").read_text(encoding="utf-8"))
    assert [row["encoder"] for row in content["rows"]] == [
        "SentenceTransformer fp32", "ONNX fp32", "ONNX int8"]  # fmt: skip
    assert content["rows"][1]["lost"] == pytest.approx(0, abs=1e-6)
    assert content["rows"][2]["size_bytes"] == path.stat().st_size
    assert str(tmp_path) not in json.dumps(content)


def test_what_is_lost_is_the_first_files_score_less_the_files(tmp_path):
    test = read_korsts(SAMPLES / "KorSTS/sts-test.tsv")
    sentences, _ = distinct_sentences(test)
    generator = np.random.default_rng(0)
    vectors, others = (
        dict(zip(sentences, generator.normal(size=(len(sentences), 8)), strict=True)) for _ in "ab"
    )
    for first, second, score in test[["sentence1", "sentence2", "score"]].to_numpy():
        vectors[second] = score * vectors[first] + (1 - score) * vectors[second]

    def encoder(noise: float) -> measure_onnx.Encode:
        return lambda texts, *_: np.stack([vectors[t] + noise * others[t] for t in texts])

    rows = [{"encoder": "one"}, {"encoder": "other"}]
    measure_onnx.score_rows(rows, [encoder(0), encoder(2)], test)
    one, other = (row["cosine_spearman"] for row in rows)
    assert one > 0.9 > other
    assert rows[0]["lost"] == 0 and rows[1]["lost"] == one - other
    low, high = rows[1]["lost_interval"]
    assert 0 < low < rows[1]["lost"] < high


def test_first_embeddings_are_timed_of_a_model_with_its_code_and_of_its_files(
    tmp_path, bert, export
):
    folder = shutil.copytree(bert, tmp_path / "model")
    add_module_with_code(folder, tmp_path / "ran")
    first_embedding_seconds = measure_onnx.first_embedding_seconds
    arguments = ["--quantize", "int8", "--data_dir", SAMPLES, "--force", "--trust_remote_code"]
    assert export(folder, *arguments, "--results_dir", tmp_path / "results") == (0, [])
    model, *files = export.timed
    assert model == ("sentence-transformers", folder, True)
    names = ["tiny.onnx", "tiny-int8.onnx"]
    assert [(by, path.name) for by, path in files] == [("onnxruntime", name) for name in names]
    for what in (model, files[0]):
        assert first_embedding_seconds(*what) > 0


def test_no_speed_says_sizes_and_loss_in_a_line_and_keeps_no_measurement(tmp_path, bert, export):
    status, error = export(bert, "--quantize", "int8", "--data_dir", SAMPLES, "--force",
                           "--no_speed", "--results_dir", tmp_path / "results")  # fmt: skip
    assert status == 0, error
    size = (tmp_path / "out/tiny-int8.onnx").stat().st_size / 1e6
    number = r"-?\d+\.\d\d"
    assert re.fullmatch(
        rf"ONNX fp32 \d+\.\d MB, ONNX int8 {size:.1f} MB; sts-test.tsv: "
        rf"cosine Spearman {number}, {number}: {number} \[{number}, {number}\] lost\n",
        export.out,
    )
    assert not (tmp_path / "results").exists()
    for stage in ("calibrating", "fp32, dev", "int8 ranges", "int8, dev", "ONNX fp32", "ONNX int8"):
        assert f"{stage}: 100%" in export.err, stage  # each takes a minute for a large model


def test_int8_is_the_same_bytes_twice(tmp_path, bert, export):
    arguments = ["--quantize", "int8", "--data_dir", SAMPLES, "--force", "--results_dir", tmp_path]
    outputs = [tmp_path / name / "tiny.onnx" for name in ("first", "second")]
    for output in outputs:
        assert export(bert, *arguments, output=output) == (0, [])
    first, second = (output.with_name("tiny-int8.onnx").read_bytes() for output in outputs)
    assert first == second


def test_a_loss_too_large_is_refused_unless_forced(tmp_path, bert, export, monkeypatch):
    measured = {"lost": 0.006, "cosine_spearman": 0.5, "lost_interval": [0, 1], "size_bytes": 1,
                "first_embedding_seconds": 1, "sentences_per_second_32": 1,
                "sentences_per_second_1": 1, "encoder": "?"}  # fmt: skip
    monkeypatch.setattr(export_onnx, "measure", lambda *_: [measured])
    arguments = ["--quantize", "int8", "--data_dir", SAMPLES, "--results_dir", tmp_path / "results"]
    status, errors = export(bert, *arguments)
    assert status == 1 and "int8 loses 0.60 points, more than --max_loss 0.5" in errors[0]
    assert left_over(tmp_path / "out") == ["tiny.json", "tiny.onnx", "tiny.tokenizer.json"]
    assert left_over(tmp_path / "results") == []
    assert export(bert, *arguments, "--force") == (0, [])
    assert "tiny-int8.onnx" in left_over(tmp_path / "out")


def test_calibration_sees_no_test_sentence(tmp_path, bert, export, monkeypatch):
    data = tmp_path / "KorSTS"
    data.mkdir()
    shutil.copy(SAMPLES / "KorSTS/sts-dev.tsv", data)
    for name in ("train", "test"):  # test sentences are in train, too
        lines = (SAMPLES / "KorSTS/sts-test.tsv").read_text(encoding="utf-8").splitlines()
        if name == "train":
            more = (SAMPLES / "KorSTS/sts-train.tsv").read_text(encoding="utf-8").splitlines()
            lines += more[1:]
        (data / f"sts-{name}.tsv").write_text("\n".join(lines), encoding="utf-8")
    seen = []
    monkeypatch.setattr(
        export_onnx, "calibrate", lambda path, tokenizer, texts: seen.extend(texts) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        export(bert, "--quantize", "int8", "--data_dir", tmp_path)
    test = read_korsts(data / "sts-test.tsv")
    assert seen and not {*seen} & {*test["sentence1"], *test["sentence2"]}


def test_int8_of_another_architecture_is_refused(tmp_path, export):
    folder = write_encoder(tmp_path, "distilbert")
    arguments = ["--quantize", "int8", "--data_dir", SAMPLES]
    status, errors = export(folder, *arguments)
    assert status == 2 and "--quantize int8: distilbert" in errors[0]
    assert left_over(tmp_path / "out") == []


def test_int8_of_a_decoder_is_refused(tmp_path, export):
    folder = write_encoder(tmp_path)
    edit_json(folder / "config.json", is_decoder=True)
    status, errors = export(folder, "--quantize", "int8", "--data_dir", SAMPLES)
    assert status == 2 and "--quantize int8: bert, a decoder, is none of bert, " in errors[0]
    assert export(folder) == (0, [])


def test_int8_needs_a_sentence_that_test_has_not(tmp_path, bert, export):
    (tmp_path / "KorSTS").mkdir()
    for name in ("train", "dev", "test"):
        shutil.copy(SAMPLES / "KorSTS/sts-test.tsv", tmp_path / f"KorSTS/sts-{name}.tsv")
    status, errors = export(bert, "--quantize", "int8", "--data_dir", tmp_path)
    assert status == 2 and "sts-train.tsv: no sentence to calibrate int8 on" in errors[0]
    assert left_over(tmp_path / "out") == []


CARRIED_BERT = """
import torch
from transformers import BertConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class CarriedModel(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask, **_):
        words = self.words(input_ids)
        weights = attention_mask[..., None].to(words.dtype)
        mean = (words * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return BaseModelOutput(last_hidden_state=torch.tanh(words + mean))
"""


def test_code_that_calls_itself_bert_is_exported_as_it_computes(tmp_path, bert, export):
    folder = tmp_path / "carried"
    shutil.copytree(bert, folder)
    (folder / "carried.py").write_text(CARRIED_BERT, encoding="utf-8")
    edit_json(folder / "config.json", auto_map={"AutoModel": "carried.CarriedModel"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "bert"
    save_file(
        {"words.weight": torch.randn(config["vocab_size"], config["hidden_size"])},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "carries its own Python code" in export(folder)[1][0]
    assert export(folder, "--trust_remote_code") == (0, [])  # and checked against the model
    arguments = ["--trust_remote_code", "--quantize", "int8", "--data_dir", SAMPLES]
    status, errors = export(folder, *arguments)
    assert status == 2 and "CarriedModel, code of its own, is none of bert, " in errors[0]


def test_fp16(tmp_path, bert, export):
    assert export(bert, "--fp16") == (0, [])
    path = tmp_path / "out/tiny-fp16.onnx"
    session = onnxruntime.InferenceSession(path)
    assert session.get_outputs()[0].type == "tensor(float)"
    tokenizer = Tokenizer.from_file(str(path.with_suffix(".tokenizer.json")))
    found = embed(session, tokenizer, SENTENCES)
    expected = load_encoder(str(bert), device="cpu").encode(SENTENCES)
    difference = np.abs(found - expected).max()
    assert 1e-6 < difference <= 1e-2  # really half precision


# --- README, example -------------------------------------------------------------------------


def test_the_table_shows_what_was_measured(tmp_path, monkeypatch):
    row = {"encoder": "SentenceTransformer fp32", "size_bytes": 1e6, "lost": 0.0,
           "first_embedding_seconds": 4.0, "sentences_per_second_32": 100.0,
           "sentences_per_second_1": 50.0, "cosine_spearman": 0.8,
           "lost_interval": [0.0, 0.0]}  # fmt: skip
    int8 = row | {"encoder": "ONNX int8", "sentences_per_second_32": 450.0, "lost": 0.00123,
                  "cosine_spearman": 0.79877, "lost_interval": [-0.001, 0.003]}  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", "--model", str(tmp_path)])
    measure_onnx.write_results(tmp_path / "onnx/tiny.json", "tiny", "sha256:0", [row, int8])
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- results:onnx -->\nold\n<!-- /results:onnx -->\nb\n", "utf-8")
    write_parts(readme, {"onnx": onnx_part(tmp_path)})
    text = readme.read_text(encoding="utf-8")
    assert f"`python export_onnx.py --model {tmp_path.name}`" in text
    assert text.startswith("a\n<!--") and text.endswith("-->\nb\n") and "old" not in text
    expected = "| ONNX int8 | 1.0 | 450 (4.5x) | 50 (1.0x) | 4.00 | 79.88 | 0.12 [-0.10, 0.30] |"
    assert expected in text
    readme.write_text("no markers", "utf-8")
    with pytest.raises(UserError, match=r"README\.md: no <!-- results:X -->"):
        write_parts(readme, {"onnx": onnx_part(tmp_path)})


def test_the_example_ranks_as_sentence_transformers_does(tmp_path, bert, export):
    assert export(bert) == (0, [])
    result = run_script(EXAMPLE, "--model", tmp_path / "out/tiny.onnx", cwd=Path("/"))
    assert result.returncode == 0, result.stderr
    sys.path.append(str(EXAMPLE.parent))
    from semantic_search_onnx import CORPUS, QUERIES

    model = load_encoder(str(bert), device="cpu")
    corpus, queries = (
        model.encode(texts, normalize_embeddings=True) for texts in (CORPUS, QUERIES)
    )
    expected = [sorted(scores, reverse=True)[:5] for scores in queries @ corpus.T]
    found = [float(score) for score in re.findall(r"\(Score: (-?[\d.]+)\)", result.stdout)]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-4)
    assert result.stdout.count("Top 5 most similar sentences") == 3


def test_the_example_says_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "damaged.onnx").write_bytes(b"no onnx")
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", *ends)
    for name, properties in (("none.onnx", {}), ("cut.onnx", {"tokenizer": '{"version"'})):
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(proto, properties)
        onnx.save(proto, tmp_path / name)
    for name in ("damaged.onnx", "none.onnx", "cut.onnx", "nowhere.onnx"):
        result = run_script(EXAMPLE, "--model", tmp_path / name)
        assert result.returncode == 2 and name in result.stderr
        assert len(result.stderr.splitlines()) == 1


# --- The real encoder ------------------------------------------------------------------------

KORSTS = next(
    (path for path in (REPOSITORY / "KorNLUDatasets", REPOSITORY.parent / "shared/KorNLUDatasets")
     if path.is_dir()), None,
)  # fmt: skip


@pytest.fixture(scope="module")
def real(offline_encoder, tmp_path_factory):
    """The offline encoder as fp32 file; export_onnx.py itself checks it."""
    output = tmp_path_factory.mktemp("real") / "e5-small-ko.onnx"
    done = run_script(SCRIPT, "--model", offline_encoder, "--output", output)
    assert done.returncode == 0, done.stderr
    return output


def test_the_real_encoder(offline_encoder, real):
    model = load_encoder(str(offline_encoder), device="cpu")
    session = onnxruntime.InferenceSession(real)
    tokenizer = Tokenizer.from_file(str(real.with_suffix(".tokenizer.json")))
    sentences = [*check_onnx.CHECK_SENTENCES[:-1], *SENTENCES]
    found = embed(session, tokenizer, sentences)
    np.testing.assert_allclose(found, model.encode(sentences), rtol=0, atol=1e-5)
    ids = np.random.default_rng(0).integers(4, 20_000, size=(3, 20))
    mask = (np.arange(20) >= np.array([[0], [7], [19]])).astype(np.int64)
    mask[0, 3:9] = 0
    feeds = features(session, ids, mask)
    with torch.inference_mode():
        expected = model({name: torch.from_numpy(values) for name, values in feeds.items()})
    expected = expected["sentence_embedding"].numpy()
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(KORSTS is None, reason="no KorNLUDatasets")
def test_int8_of_the_real_encoder_loses_next_to_nothing(offline_encoder, tmp_path, export):
    status, error = export(offline_encoder, "--quantize", "int8", "--data_dir", KORSTS,
                           "--results_dir", tmp_path, "--max_loss", "0.2",
                           output=tmp_path / "e5.onnx")  # fmt: skip
    assert status == 0, error
    content = json.loads((tmp_path / "onnx/e5.json").read_text(encoding="utf-8"))
    _, fp32, int8 = content["rows"]
    assert abs(fp32["lost"]) < 1e-5 and int8["lost"] <= 0.002
    assert int8["size_bytes"] <= 0.3 * fp32["size_bytes"]


@pytest.mark.slow
def test_the_example_without_torch_needs_no_torch(exports, tmp_path):
    python = new_environment(tmp_path / "venv", "numpy", "tokenizers", "onnxruntime")
    absent = (
        "import importlib.util as u; print([u.find_spec(m) for m in ('torch', 'transformers')])"
    )
    found = subprocess.run([python, "-c", absent], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[None, None]"
    command = [python, EXAMPLE, "--model", exports / "e5-small-ko.onnx"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.count("Score:") == 15


def test_calibration_sees_the_prompt_that_consumers_prepend(tmp_path, export, monkeypatch):
    folder = write_encoder(tmp_path)
    prompts = {"prompts": {"query": "질문: "}, "default_prompt_name": "query"}
    edit_json(folder / "config_sentence_transformers.json", **prompts)
    seen = []
    monkeypatch.setattr(
        export_onnx, "calibrate", lambda path, tokenizer, texts: seen.extend(texts) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        export(folder, "--quantize", "int8", "--data_dir", SAMPLES)
    assert len(seen) > 10 and all(text.startswith("질문: ") for text in seen)


def test_the_readmes_python_gives_the_models_embeddings(tmp_path, export, monkeypatch):
    folder = write_encoder(tmp_path)
    prompts = {"prompts": {"query": "질문: "}, "default_prompt_name": "query"}
    edit_json(folder / "config_sentence_transformers.json", **prompts)
    output = tmp_path / "onnx/models/ko-sroberta-multitask.onnx"
    assert export(folder, output=output) == (0, [])
    readme = (REPOSITORY / "onnx/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    expected = load_encoder(str(folder), device="cpu").encode(names["sentences"])
    np.testing.assert_allclose(names["embeddings"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("library", measure_onnx.FIRST_EMBEDDING)
def test_what_is_timed_passes_a_console_without_korean(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout=f"{time.time()}\n")

    monkeypatch.setattr(measure_onnx.subprocess, "run", run)
    assert measure_onnx.first_embedding_seconds(library, Path("model")) >= 0
    for _, _, code, *arguments in commands:
        assert code.isascii() and arguments == ["model", "False"]
        texts = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
        assert "첫 문장" in texts
