"""Exports a sentence encoder to one checked .onnx file; on request an int8 or fp16 one beside it.

    cd onnx && python export_onnx.py                     # jhgan/ko-sroberta-multitask
    python onnx/export_onnx.py --model RUN --quantize int8 --data_dir KorNLUDatasets
    python onnx/export_onnx.py --update_readme           # the table of onnx/README.md

The graph is the whole encoder: input_ids and attention_mask (and token_type_ids where the model
has several types), int64 [batch, length], to sentence_embedding, float32 [batch, dimension], by
standard operators of opset 17 alone. Beside NAME.onnx come NAME.tokenizer.json (truncates and pads)
and NAME.json (what a consumer needs); both are also metadata inside the file, which can therefore
be deployed alone. A file gets its name only after onnxruntime has given what sentence-transformers
gives.

int8: the fp32 graph with static quantisation of every linear layer and of the word embeddings, in
QuantizeLinear / DequantizeLinear form. Outlier channels are moved from activations to weights
(SmoothQuant, https://arxiv.org/abs/2211.10438), and weights are scaled so that no CPU can saturate
(see `int8_weights`). Calibrated on KorSTS-train, without the sentences that KorSTS-test has too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from huggingface_hub import ModelCard
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # run from this folder, Python knows only this one

from data_util import DATA_DIR, UserError, command_line, read_korsts  # noqa: E402
from evaluation_util import bootstrap, correlations, interval  # noqa: E402
from model_util import load_encoder  # noqa: E402

OPSET = 17
POOLINGS = ("mean", "cls", "max")
BERT_LIKES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
MAX_FILE_BYTES = 2**31 - 2**20  # protobuf's limit, less room for the graph itself
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2}
SMOOTHING = 0.7  # the share of outliers that goes to the weights; best of 0.3 to 0.9 on KorSTS-dev
CALIBRATION_SENTENCES = 1000
CHECK_SENTENCES = (
    "한 남자가 음식을 먹는다.",
    "",
    "가",
    "A man is eating 파스타 at 7시 30분.",
    "나는 학교에 갔다 😀👍🏽🇰🇷",
    "大韓民國의 首都는 서울特別市이다.",
    "그는 'TV'를 \"켰다\"\t그리고  껐다.",
    "아주 긴 문장은 끝에서 잘린다. " * 200,
)
INSTRUCTION_SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
FIRST_EMBEDDING = {  # run in new processes; each prints when it has embedded one sentence
    "sentence-transformers": """
import sys, time
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], device="cpu").encode("첫 문장")
print(time.time())""",
    "onnxruntime": """
import sys, time
import numpy, onnxruntime, tokenizers
session = onnxruntime.InferenceSession(sys.argv[1])
tokens = tokenizers.Tokenizer.from_str(
    session.get_modelmeta().custom_metadata_map["tokenizer"]).encode("첫 문장")
feeds = dict(input_ids=tokens.ids, attention_mask=tokens.attention_mask,
             token_type_ids=tokens.type_ids)
session.run(None, {i.name: numpy.array([feeds[i.name]]) for i in session.get_inputs()})
print(time.time())""",
}


class CheckFailed(Exception):
    """The exported file does not give what the model gives, or loses too much."""


# --- 1. The graph ---------------------------------------------------------------------------


class SentenceEncoder(torch.nn.Module):
    """Transformer, pooling and normalisation of a sentence-transformers model, for the exporter."""

    def __init__(self, model: SentenceTransformer, dim: int) -> None:
        super().__init__()
        transformer, *self.after = model
        self.transformer = transformer.model
        self.config = self.transformer.config
        self.dim = dim
        self.bert_like = self.config.model_type in BERT_LIKES and not self.config.is_decoder

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps int64 (batch, length) inputs to float32 (batch, dim) embeddings."""
        inputs = {"input_ids": input_ids}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.bert_like:
            hidden = self.token_rows(attention_mask, self.transformer.embeddings(**inputs))
        else:
            hidden = self.transformer(attention_mask=attention_mask, **inputs).last_hidden_state
        features = {"token_embeddings": hidden, "attention_mask": attention_mask}
        for module in self.after:
            features = module(features)
        return features["sentence_embedding"][:, : self.dim]

    def token_rows(self, attention_mask: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Runs BERT's layers on a (tokens, hidden) matrix: padding costs only in the attention.

        Two-dimensional linear layers are also what onnxruntime computes fastest (bias inside the
        multiplication, int8 too), and its slow fusion of residual and LayerNorm stays away.
        """
        batch, length = attention_mask.shape
        if hasattr(self.transformer, "embeddings_project"):  # ELECTRA
            embedded = self.transformer.embeddings_project(embedded)
        tokens = attention_mask.reshape(-1)
        kept = tokens.nonzero().squeeze(1)  # the places of tokens among batch * length
        row = (tokens.cumsum(0) - 1).clamp(min=0)  # and back; padding gets any row
        bias = (1 - attention_mask.to(embedded.dtype))[:, None, None] * torch.finfo(
            embedded.dtype
        ).min
        rows = embedded.reshape(batch * length, -1)[kept]
        for layer in self.transformer.encoder.layer:
            attention = layer.attention.self

            def heads(linear: torch.nn.Linear, rows: torch.Tensor = rows) -> torch.Tensor:
                split = linear(rows)[row].view(batch, length, self.config.num_attention_heads, -1)
                return split.transpose(1, 2)

            query, key, value = map(heads, (attention.query, attention.key, attention.value))
            scores = query @ key.transpose(2, 3) * attention.scaling + bias
            context = (scores.softmax(dim=-1) @ value).transpose(1, 2)
            rows = layer.attention.output(context.reshape(batch * length, -1)[kept], rows)
            rows = layer.output(layer.intermediate(rows), rows)
        return rows[row].view(batch, length, -1)


def check_exportable(name: str, model: SentenceTransformer, dim: int | None) -> None:
    """Raises `UserError` that names what of the model cannot be exported."""
    for position, module in enumerate(model):
        expected = (Transformer, Pooling, Normalize)[min(position, 2)]
        if not isinstance(module, expected):
            found = type(module).__name__
            raise UserError(f"{name}: module {position} is {found}, not {expected.__name__}")
    mode = model[1].pooling_mode
    if mode not in POOLINGS:
        raise UserError(f"{name}: pooling {mode!r} is not supported, only {', '.join(POOLINGS)}")
    if not model[1].include_prompt and any(model.prompts.values()):
        raise UserError(f"{name}: a pooling that leaves the prompt out is not supported")
    dimension = model.get_embedding_dimension()
    if dim is not None and not 1 <= dim <= dimension:
        raise UserError(f"--dim {dim}: {name} has {dimension} dimensions")
    if not getattr(model.tokenizer, "is_fast", False):
        raise UserError(f"{name}: its tokenizer has no fast version, which a tokenizer.json needs")
    if model.tokenizer.pad_token is None:
        raise UserError(f"{name}: its tokenizer has no pad token: sentences cannot share a batch")
    if not model.max_seq_length:
        raise UserError(f"{name}: declares no max_seq_length")


def export_tokenizer(model: SentenceTransformer) -> Tokenizer:
    """Returns a copy of the tokenizer that truncates and pads as the model does."""
    original = model.tokenizer
    tokenizer = Tokenizer.from_str(original.backend_tokenizer.to_str())
    tokenizer.enable_truncation(model.max_seq_length)
    tokenizer.enable_padding(
        direction=original.padding_side,
        pad_id=original.pad_token_id,
        pad_type_id=original.pad_token_type_id,
        pad_token=original.pad_token,
    )
    return tokenizer


def export_graph(model: SentenceTransformer, dim: int, folder: Path) -> onnx.ModelProto:
    """Traces the encoder into an ONNX model; `folder` holds the exporter's files."""
    encoder = SentenceEncoder(model, dim).eval()
    inputs = ["input_ids", "attention_mask"]
    if getattr(encoder.config, "type_vocab_size", 0) > 1:
        inputs.append("token_type_ids")
    output = "sentence_embedding"
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    examples = (torch.ones_like(attention_mask), attention_mask, torch.zeros_like(attention_mask))
    implementation = encoder.config._attn_implementation
    encoder.transformer.set_attn_implementation("eager")  # plain operators, exact to 2e-6
    with warnings.catch_warnings():
        # What the tracer fixes is what the check on other shapes and masks is for.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*legacy")
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.onnx")
        torch.onnx.export(
            encoder,
            examples[: len(inputs)],
            folder / "traced.onnx",
            input_names=inputs,
            output_names=[output],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in inputs}
            | {output: {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    encoder.transformer.set_attn_implementation(implementation)
    proto = onnx.load(folder / "traced.onnx")
    shape = proto.graph.output[0].type.tensor_type.shape
    shape.dim[1].dim_value = dim  # the tracer does not know the width of a slice
    return proto


# --- 2. Quantisation ------------------------------------------------------------------------


def int8_weights(weights: np.ndarray, smallest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises (outputs, inputs) weights to int8, a float32 scale of at least `smallest` each.

    CPUs without VNNI add the products of two neighbouring inputs in 16 bits, which saturates at
    32,767. Activations go to 255, so two weights of one sign may sum to 128: the scale of each
    output is the smallest that keeps to that, which costs far less than 7-bit weights.
    """
    pairs = weights.reshape(len(weights), -1, 2)
    sums = np.maximum(np.maximum(pairs, 0).sum(2).max(1), np.maximum(-pairs, 0).sum(2).max(1))
    scale = np.maximum(sums / 127, smallest).astype(np.float32)  # rounding adds at most 1
    return np.round(weights / scale[:, None]).astype(np.int8), scale


def channel_ranges(
    session: onnxruntime.InferenceSession,
    names: Sequence[str],
    tokenizer: Tokenizer,
    sentences: Sequence[str],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the lowest and highest value of each channel of the named (tokens, n) tensors."""
    lows, highs = {}, {}
    for start in range(0, len(sentences), 8):
        feeds = feed(session, tokenizer.encode_batch(sentences[start : start + 8]))
        for name, values in zip(names, session.run(names, feeds), strict=True):
            lows[name] = np.minimum(lows.get(name, np.inf), values.min(axis=0))
            highs[name] = np.maximum(highs.get(name, -np.inf), values.max(axis=0))
    return {name: (lows[name], highs[name]) for name in names}


def quantize_int8(
    proto: onnx.ModelProto, tokenizer: Tokenizer, sentences: Sequence[str], folder: Path
) -> onnx.ModelProto:
    """Returns the int8 form of an exported graph, calibrated on sentences."""
    initializers = {item.name: item for item in proto.graph.initializer}
    linear = [node for node in proto.graph.node if node.op_type == "Gemm" and len(node.input) == 3]
    if not linear:
        raise UserError(f"--quantize int8: only for {', '.join(BERT_LIKES)} models")
    arrays = {
        name: numpy_helper.to_array(initializers[name])
        for node in linear
        for name in node.input[1:]
    }
    users = collections.defaultdict(list)  # the layers that read each activation
    for node in linear:
        users[node.input[0]].append(node)

    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in users
    )
    save_proto(watched, folder / "calibration.onnx")
    session = onnxruntime.InferenceSession(folder / "calibration.onnx")
    ranges = channel_ranges(session, list(users), tokenizer, sentences)

    constants: dict[str, np.ndarray] = {}
    smoothing, scales = {}, {}

    def quantize_activation(name: str) -> Iterator[onnx.NodeProto]:
        low, high = ranges[name]
        magnitude = np.maximum(np.maximum(-low, high), 1e-5)
        weights = np.concatenate([arrays[user.input[1]] for user in users[name]])
        factor = magnitude**SMOOTHING / np.maximum(np.abs(weights).max(0), 1e-5) ** (1 - SMOOTHING)
        smoothing[name] = factor.astype(np.float32)
        low, high = min((low / factor).min(), 0), max((high / factor).max(), 0)
        scales[name] = np.float32((high - low) / 255)
        constants[f"{name}.smoothing"] = 1 / smoothing[name]
        constants[f"{name}.scale"] = np.array(scales[name])
        constants[f"{name}.zero"] = np.array(round(-low / scales[name]), dtype=np.uint8)
        yield helper.make_node("Mul", [name, f"{name}.smoothing"], [f"{name}.smoothed"])
        quantizer = [f"{name}.scale", f"{name}.zero"]
        yield helper.make_node(
            "QuantizeLinear", [f"{name}.smoothed", *quantizer], [f"{name}.quantized"]
        )

    def dequantize(name: str, values: np.ndarray, scale: np.ndarray) -> onnx.NodeProto:
        constants[f"{name}.quantized"] = values
        constants[f"{name}.scale"] = scale
        constants[f"{name}.zero"] = np.zeros(len(scale), dtype=values.dtype)
        inputs = [f"{name}.quantized", f"{name}.scale", f"{name}.zero"]
        return helper.make_node("DequantizeLinear", inputs, [f"{name}.dequantized"], axis=0)

    def quantize_linear(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        activation, weight, bias = node.input
        if activation not in scales:
            yield from quantize_activation(activation)
        smallest = np.abs(arrays[bias]) / scales[activation] / 2**30  # the bias has 32 bits
        values, scale = int8_weights(
            arrays[weight] * smoothing[activation],
            np.maximum(smallest, np.finfo(np.float32).tiny),
        )
        scale_of_sums = scales[activation] * scale
        sums = np.round(arrays[bias] / scale_of_sums.astype(np.float64)).astype(np.int32)
        quantized = [f"{activation}.{part}" for part in ("quantized", "scale", "zero")]
        yield helper.make_node("DequantizeLinear", quantized, [f"{node.name}.input"])
        yield dequantize(weight, values, scale)
        yield dequantize(bias, sums, scale_of_sums)
        inputs = [f"{node.name}.input", f"{weight}.dequantized", f"{bias}.dequantized"]
        yield helper.make_node("Gemm", inputs, node.output, name=node.name, transB=1)

    def quantize_lookup(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        table, ids = node.input
        vectors = numpy_helper.to_array(initializers[table])
        scale = np.maximum(np.abs(vectors).max(1, keepdims=True) / 127, 1e-9).astype(np.float32)
        constants[f"{table}.quantized"] = np.round(vectors / scale).astype(np.int8)
        constants[f"{table}.scale"] = scale
        arrays[table] = vectors
        yield helper.make_node("Gather", [f"{table}.quantized", ids], [f"{table}.int8"])
        yield helper.make_node("Cast", [f"{table}.int8"], [f"{table}.float"], to=TensorProto.FLOAT)
        yield helper.make_node("Gather", [f"{table}.scale", ids], [f"{table}.scales"])
        yield helper.make_node("Mul", [f"{table}.float", f"{table}.scales"], node.output)

    nodes = []
    for node in proto.graph.node:
        if node.op_type == "Gemm" and len(node.input) == 3:
            nodes.extend(quantize_linear(node))
        elif node.op_type == "Gather" and node.input[1] == "input_ids":
            nodes.extend(quantize_lookup(node))
        else:
            nodes.append(node)
    kept = [item for item in proto.graph.initializer if item.name not in arrays]
    added = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes, proto.graph.name, proto.graph.input, proto.graph.output, [*kept, *added]
    )
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)


# --- 3. Files -------------------------------------------------------------------------------


def save_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Writes one file, or with PATH.data beside it where protobuf cannot hold the weights."""
    size = sum(len(item.raw_data) for item in proto.graph.initializer)
    if size <= MAX_FILE_BYTES:
        onnx.save(proto, path)
        return
    copy = onnx.ModelProto()  # saving moves the weights out of what is saved
    copy.CopyFrom(proto)
    print(f"{path.name}: above 2 GB: its weights are in {path.name}.data", file=sys.stderr)
    onnx.save(copy, path, save_as_external_data=True, location=f"{path.name}.data")


def settings_of(name: str, model: SentenceTransformer, dim: int) -> dict[str, str | int | bool]:
    """Returns what a consumer of the file needs to know, and where the model comes from."""
    folder = Path(model[0].model.name_or_path)
    revision = folder.name if folder.parent.name == "snapshots" else weights_hash(folder)
    card = folder / "README.md"
    licence = ModelCard.load(card).data.get("license") if card.is_file() else None
    return {
        "model": name if folder.parent.name == "snapshots" else folder.resolve().name,
        "revision": revision,
        "licence": licence or "unknown",
        "max_seq_length": model.max_seq_length,
        "pooling": model[1].pooling_mode,
        "normalized": dim == model.get_embedding_dimension() and len(list(model)) > 2,
        "dimension": dim,
        "prompt": model.prompts.get(model.default_prompt_name) or "",
    }


def weights_hash(folder: Path) -> str:
    """Returns `sha256:` and the hash of a local model's weights: folders have no revision."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def write_files(
    proto: onnx.ModelProto, path: Path, settings: dict[str, str | int | bool], tokenizer: Tokenizer
) -> None:
    """Writes NAME.onnx with its metadata, NAME.json and NAME.tokenizer.json."""
    text = tokenizer.to_str()
    properties = {key: str(value) for key, value in settings.items()} | {"tokenizer": text}
    helper.set_model_props(proto, properties)
    save_proto(proto, path)
    path.with_suffix(".tokenizer.json").write_text(text, encoding="utf-8")
    names = {"inputs": [item.name for item in proto.graph.input], "output": "sentence_embedding"}
    content = json.dumps(settings | names, ensure_ascii=False, indent=2)
    path.with_suffix(".json").write_text(content + "\n", encoding="utf-8")


def deliver(written: Path, target: Path) -> None:
    """Gives checked files their final names, the .onnx last; replaces older ones."""
    data = target.with_name(f"{target.name}.data")
    if not written.with_name(f"{written.name}.data").exists():
        data.unlink(missing_ok=True)
    files = sorted(written.parent.glob(f"{written.stem}.*"), key=lambda path: path == written)
    for path in files:
        os.replace(path, target.parent / path.name)
    size = sum((target.parent / path.name).stat().st_size for path in files if path != files[0])
    print(f"{target}: {size / 1e6:.1f} MB", file=sys.stderr)


# --- 4. Checks ------------------------------------------------------------------------------


def feed(session: onnxruntime.InferenceSession, encodings: Sequence) -> dict[str, np.ndarray]:
    """Returns the inputs that the session asks for, int64 (batch, length)."""
    features = {
        "input_ids": [item.ids for item in encodings],
        "attention_mask": [item.attention_mask for item in encodings],
        "token_type_ids": [item.type_ids for item in encodings],
    }
    return {item.name: np.array(features[item.name]) for item in session.get_inputs()}


def embed(
    session: onnxruntime.InferenceSession,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    batch_size: int = 32,
) -> np.ndarray:
    """Returns float32 (sentences, dimension) embeddings; batches hold sentences of like length."""
    feeds = feed(session, tokenizer.encode_batch(list(sentences)))
    mask = feeds["attention_mask"]
    order = np.argsort(-mask.sum(axis=1), kind="stable")
    parts = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        used = mask[rows].any(axis=0)
        batch = {name: values[rows][:, used] for name, values in feeds.items()}
        parts.append(session.run(["sentence_embedding"], batch)[0])
    return np.concatenate(parts)[np.argsort(order)]


def check_file(
    path: Path, model: SentenceTransformer, tokenizer: Tokenizer, dim: int, tolerance: float
) -> None:
    """Compares a file with sentence-transformers; raises `CheckFailed` where they differ."""
    onnx.checker.check_model(path, full_check=True)
    proto = onnx.load(path, load_external_data=False)
    if [(item.domain, item.version) for item in proto.opset_import] != [("", OPSET)]:
        raise CheckFailed(f"{path.name}: not standard operators of opset {OPSET} alone")
    session = onnxruntime.InferenceSession(path)
    prompt = model.prompts.get(model.default_prompt_name) or ""
    sentences = list(CHECK_SENTENCES) * 8
    expected = model.encode(sentences, truncate_dim=dim, show_progress_bar=False)
    for batch_size in (1, 2, 3, 64):
        found = embed(session, tokenizer, [prompt + text for text in sentences], batch_size)
        check_close(path, f"batches of {batch_size}", found, expected, tolerance)

    generator = np.random.default_rng(0)
    ids = generator.integers(0, model[0].model.config.vocab_size, size=(3, 16))
    holes = generator.integers(0, 2, size=ids.shape)
    holes[:, 8] = 1  # no row without any token
    left = (np.arange(16) >= np.array([[0], [5], [15]])).astype(np.int64)
    for kind, mask in (("left padding", left), ("holes in the mask", holes)):
        features = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feeds = {item.name: features[item.name] for item in session.get_inputs()}
        with torch.inference_mode():
            outputs = model({name: torch.from_numpy(values) for name, values in feeds.items()})
        expected = outputs["sentence_embedding"][:, :dim].numpy()
        check_close(path, kind, session.run(None, feeds)[0], expected, tolerance)


def check_close(
    path: Path, case: str, found: np.ndarray, expected: np.ndarray, tolerance: float
) -> None:
    difference = float(np.abs(found - expected).max())
    if not difference <= tolerance:  # NaN too
        raise CheckFailed(
            f"{path.name}: {case}: differs from sentence-transformers by {difference:.1e}, "
            f"more than {tolerance:.0e}"
        )


# --- 5. Measurements ------------------------------------------------------------------------


def instruction_sets() -> list[str]:
    """Returns those of the CPU's instruction sets that decide int8 speed (Linux; else none)."""
    with contextlib.suppress(OSError):
        words = set(Path("/proc/cpuinfo").read_text().split())
        return [name for name in INSTRUCTION_SETS if name in words]
    return []


def first_embedding(library: str, model: Path) -> float:
    """Seconds from the start of a process to its first embedding, the best of three."""
    seconds = []
    for _ in range(3):
        start = time.time()
        command = [sys.executable, "-c", FIRST_EMBEDDING[library], str(model)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds.append(float(result.stdout.split()[-1]) - start)
    return min(seconds)


def measure(
    model: SentenceTransformer, tokenizer: Tokenizer, files: dict[str, Path], test: dict
) -> list[dict]:
    """Returns a row for sentence-transformers and for each file; speeds are the best of three.

    The three take turns, so that a disturbance of the machine hits all of them.
    """
    prompt = model.prompts.get(model.default_prompt_name) or ""
    sessions = {name: onnxruntime.InferenceSession(path) for name, path in files.items()}
    encoders: dict[str, Callable[[list[str], int], np.ndarray]] = {
        "SentenceTransformer fp32": lambda sentences, batch_size: model.encode(
            sentences, batch_size=batch_size, show_progress_bar=False
        )
    } | {
        f"ONNX {name}": lambda sentences, batch_size, session=session: embed(
            session, tokenizer, [prompt + text for text in sentences], batch_size
        )
        for name, session in sessions.items()
    }
    folder = Path(model[0].model.name_or_path)
    rows = {name: {"encoder": name} for name in encoders}
    for row, path in zip(rows.values(), [folder, *files.values()], strict=True):
        kept = [path] if path.is_file() else path.glob("*.safetensors")
        row["size_bytes"] = sum(file.stat().st_size for file in kept)
        library = "onnxruntime" if path.is_file() else "sentence-transformers"
        row["first_embedding_seconds"] = first_embedding(library, path)

    sentences = list(dict.fromkeys([*test["sentence1"], *test["sentence2"]]))
    for batch_size, count in ((32, 1024), (1, 128)):
        sample = sentences[:: max(1, len(sentences) // count)]
        seconds = collections.defaultdict(list)
        for _ in range(3):
            for name, encode in encoders.items():
                start = time.perf_counter()
                if batch_size == 1:
                    for sentence in sample:
                        encode([sentence], 1)
                else:
                    encode(sample, batch_size)
                seconds[name].append(time.perf_counter() - start)
        for name, row in rows.items():
            row[f"sentences_per_second_{batch_size}"] = len(sample) / min(seconds[name])

    scores = np.asarray(test["score"])
    reference = None
    for name, encode in encoders.items():
        vectors = dict(zip(sentences, encode(sentences, 32), strict=True))
        pair = [np.stack([vectors[text] for text in test[f"sentence{i}"]]) for i in (1, 2)]
        rows[name]["cosine_spearman"] = correlations(*pair, scores)["cosine_spearman"]
        samples = bootstrap(*pair, scores)["cosine_spearman"]
        reference = samples if reference is None else reference
        rows[name]["lost_interval"] = interval(reference - samples)
    return list(rows.values())


def table(rows: Sequence[dict]) -> list[str]:
    """Formats rows of `measure` as Markdown."""
    base = rows[0]
    lines = [
        "| | MB | 문장/초, 배치 32 | 문장/초, 배치 1 | 첫 임베딩(초) "
        "| KorSTS-test | 손실 [95% 구간] |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speeds = []
        for key in ("sentences_per_second_32", "sentences_per_second_1"):
            speeds.append(f"{row[key]:,.0f} ({row[key] / base[key]:.1f}x)")
        lost = 100 * (base["cosine_spearman"] - row["cosine_spearman"])
        low, high = (100 * end for end in row["lost_interval"])
        cells = [
            row["encoder"],
            f"{row['size_bytes'] / 1e6:.1f}",
            *speeds,
            f"{row['first_embedding_seconds']:.2f}",
            f"{100 * row['cosine_spearman']:.2f}",
            "-" if row is base else f"{lost:.2f} [{low:.2f}, {high:.2f}]",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_results(path: Path, settings: dict, rows: list[dict], command: str) -> None:
    """Writes results/onnx/NAME.json, whole or not at all."""
    packages = ("sentence-transformers", "torch", "onnxruntime", "onnx", "tokenizers")
    content = {
        "model": settings["model"],
        "revision": settings["revision"],
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": platform.machine(),
        "instruction_sets": instruction_sets(),
        "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(staged, path)


def update_readme(readme: Path, results_dir: Path) -> None:
    """Writes the tables of results/onnx/*.json between the README's markers."""
    sections = []
    for path in sorted((results_dir / "onnx").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        where = ", ".join([result["machine"], *result["instruction_sets"]])
        where += f", 스레드 {result['threads']}개, {result['date']}"
        lines = [f"`{result['command']}` ({where})", "", *table(result["rows"])]
        sections.append("\n".join([f"**{result['model']}**", "", *lines]))
    start, end = "<!-- results:onnx -->", "<!-- /results:onnx -->"
    text = readme.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1:
        raise UserError(f"{readme}: needs one {start} and one {end}")
    before, after = text.split(start)[0], text.split(end)[1]
    staged = readme.with_name(f".{readme.name}.{os.getpid()}")
    body = "\n\n".join(sections)
    staged.write_text(f"{before}{start}\n{body}\n{end}{after}", encoding="utf-8")
    os.replace(staged, readme)


# --- 6. Command line ------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="jhgan/ko-sroberta-multitask", help="Hub name or folder")
    add("--output", type=Path, help="file to write (default: models/NAME.onnx beside this script)")
    add("--dim", type=int, help="first dimensions to keep, of a Matryoshka model")
    add("--quantize", choices=["int8"], help="also write NAME-int8.onnx, and measure it")
    add(
        "--fp16",
        action="store_true",
        help="also write NAME-fp16.onnx: half the size, for GPUs; no faster on a CPU",
    )
    add(
        "--data_dir",
        type=Path,
        default=DATA_DIR,
        help="KorNLUDatasets: --quantize calibrates on KorSTS-train and measures on KorSTS-test",
    )
    add(
        "--max_loss",
        type=float,
        default=0.5,
        help="points of KorSTS-test cosine Spearman that int8 may lose",
    )
    add("--force", action="store_true", help="keep an int8 file that loses more")
    add(
        "--results_dir",
        type=Path,
        default=REPOSITORY / "results",
        help="measurements go to onnx/NAME.json in it",
    )
    add(
        "--update_readme",
        nargs="?",
        type=Path,
        const=Path(__file__).with_name("README.md"),
        metavar="FILE",
        help="only write the measured tables into README.md",
    )
    add(
        "--trust_remote_code",
        action="store_true",
        help="run Python code that the model carries: it can do anything on this machine",
    )
    args = parser.parse_args()
    if args.output is None:
        name = Path(args.model).expanduser().resolve().name
        args.output = Path(__file__).resolve().parent / "models" / f"{name}.onnx"
    if args.output.suffix != ".onnx":
        raise UserError(f"--output {args.output}: the name should end in .onnx")
    return args


def export(args: argparse.Namespace) -> None:
    # 1. Data, folder and model: everything that can be wrong, before anything takes long
    target = args.output.expanduser().absolute()
    if args.quantize:
        test = read_korsts(args.data_dir / "KorSTS/sts-test.tsv")
        train = read_korsts(args.data_dir / "KorSTS/sts-train.tsv")
        seen = {*test["sentence1"], *test["sentence2"]}
        texts = [text for text in dict.fromkeys(train["sentence1"]) if text not in seen]
        texts = texts[:: max(1, len(texts) // CALIBRATION_SENTENCES)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as temporary:
        staging = Path(temporary)
        model = load_encoder(args.model, trust_remote_code=args.trust_remote_code, device="cpu")
        check_exportable(args.model, model, args.dim)
        dim = args.dim or model.get_embedding_dimension()
        tokenizer = export_tokenizer(model)
        settings = settings_of(args.model, model, dim)

        # 2. fp32
        print(f"exporting {args.model}", file=sys.stderr)
        proto = export_graph(model, dim, staging)
        written = staging / target.name
        write_files(proto, written, settings | {"precision": "fp32"}, tokenizer)
        check_file(written, model, tokenizer, dim, TOLERANCES["fp32"])
        deliver(written, target)

        # 3. fp16
        if args.fp16:
            written = staging / f"{target.stem}-fp16.onnx"
            half = convert_float_to_float16(onnx.load(target), keep_io_types=True)
            write_files(half, written, settings | {"precision": "fp16"}, tokenizer)
            check_file(written, model, tokenizer, dim, TOLERANCES["fp16"])
            deliver(written, target.with_name(written.name))

        # 4. int8: kept where it loses little enough
        if args.quantize:
            print(f"calibrating on {len(texts):,} sentences of KorSTS-train", file=sys.stderr)
            written = staging / f"{target.stem}-int8.onnx"
            quantized = quantize_int8(proto, tokenizer, texts, staging)
            write_files(quantized, written, settings | {"precision": "int8"}, tokenizer)
            onnx.checker.check_model(written, full_check=True)
            print("measuring on KorSTS-test", file=sys.stderr)
            rows = measure(model, tokenizer, {"fp32": target, "int8": written}, test)
            print("\n".join(table(rows)))
            lost = 100 * (rows[0]["cosine_spearman"] - rows[-1]["cosine_spearman"])
            if not lost <= args.max_loss and not args.force:
                raise CheckFailed(
                    f"int8 loses {lost:.2f} points, more than --max_loss {args.max_loss}; "
                    "not written (--force keeps it)"
                )
            deliver(written, target.with_name(written.name))
            command = f"python onnx/export_onnx.py --model {settings['model']} --quantize int8"
            write_results(
                args.results_dir / "onnx" / f"{target.stem}.json", settings, rows, command
            )


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # staged files go, as with Ctrl-C
    args = parse_arguments()
    if args.update_readme:
        update_readme(args.update_readme, args.results_dir)
        return
    try:
        export(args)
    except CheckFailed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    with command_line():
        main()
