"""Int8 form of the graphs that export_onnx.py writes: static, in QuantizeLinear form, exact sums.

Every linear layer and the word embeddings become int8. Outlier channels move from activations to
weights (SmoothQuant, https://arxiv.org/abs/2211.10438); activations are uint8 with one scale for
each tensor, found on calibration sentences, so that a sentence's embedding does not depend on the
others of its batch, as it does with dynamic quantisation. How much of the outliers moves and where
activations are cut off is what changes a layer's output least, and the mean of that change goes
from the bias (https://arxiv.org/abs/1906.04721): models whose cosines lie close together lose the
most by it otherwise. Where dev says that this does not do, the noisiest layers stay in float32.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tqdm import tqdm

from common.command_line import UserError
from common.data import read_korsts
from common.exported import feed

CALIBRATION_SENTENCES = 500
DEV_PAIRS = 500
SMOOTHING = (0.6, 0.7, 0.8, 0.9)  # shares of the outliers that may go to the weights
CUTS = (0.9, 0.8, 0.7, 0.6)  # parts of the range seen that may be kept
SMALLEST = 1e-5  # channels that calibration sees at rest
ACCEPTED = 0.1  # points of dev that int8 may be expected to lose before layers stay in float32
LARGEST = 0.3  # of the float32 file
BATCH = 8  # calibration sentences
ROWS = 512  # tokens kept of all, at least where there are as many


@dataclasses.dataclass
class Activations:
    """What calibration has seen of a tensor that linear layers read.

    Attributes:
        low, high: the lowest and highest value of each channel, float32 (channels,).
        rows: of some tokens, float32 (tokens, channels).
    """

    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray


@dataclasses.dataclass
class Rounding:
    """How a tensor is quantised: uint8 = round(tensor / smoothing / scale) + zero.

    Attributes:
        smoothing: float32 (channels,); the weights that read the tensor are multiplied by it.
        rows: what quantisation leaves of the calibration's, smoothed.
        noise: the variance of the change of the layers' outputs, as a share of their own.
    """

    smoothing: np.ndarray
    scale: np.float32
    zero: int
    rows: np.ndarray
    noise: float


def is_linear(node: onnx.NodeProto) -> bool:
    """Tells a linear layer with a bias on a (tokens, inputs) matrix."""
    return node.op_type == "Gemm" and len(node.input) == 3


def calibration_sentences(data_dir: Path, test: pd.DataFrame) -> list[str]:
    """Returns sentences of KorSTS-train, of all of it, that KorSTS-test does not have.

    Raises:
        UserError: there is none.
    """
    file = data_dir / "KorSTS/sts-train.tsv"
    seen = {*test["sentence1"], *test["sentence2"]}
    texts = [text for text in dict.fromkeys(read_korsts(file)["sentence1"]) if text not in seen]
    if not texts:
        raise UserError(f"{file}: no sentence to calibrate int8 on: sts-test.tsv has them all")
    return texts[:: max(1, len(texts) // CALIBRATION_SENTENCES)]


def dev_pairs(data_dir: Path) -> pd.DataFrame:
    """Returns the pairs of KorSTS-dev on which the int8 form is chosen, from all of it."""
    pairs = read_korsts(data_dir / "KorSTS/sts-dev.tsv")
    return pairs.iloc[:: max(1, len(pairs) // DEV_PAIRS)]


def calibrate(path: Path, tokenizer: Tokenizer, sentences: Sequence[str]) -> dict[str, Activations]:
    """Returns what linear layers read when a graph embeds sentences, by tensor.

    Writes calibration.onnx beside the graph, which may have its weights in another file.
    """
    proto = onnx.load(path, load_external_data=False)
    names = list(dict.fromkeys(node.input[0] for node in proto.graph.node if is_linear(node)))
    for name in names:
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    calibration = path.with_name("calibration.onnx")
    onnx.save(proto, calibration)
    session = onnxruntime.InferenceSession(calibration)
    generator = np.random.default_rng(0)
    lows, highs, rows = {}, {}, collections.defaultdict(list)
    starts = range(0, len(sentences), BATCH)
    of_a_batch = -(-ROWS // len(starts))
    for start in tqdm(starts, desc="calibrating", unit=" batches"):
        feeds = feed(session, tokenizer.encode_batch(sentences[start : start + BATCH]))
        for name, values in zip(names, session.run(names, feeds), strict=True):
            lows[name] = np.minimum(lows.get(name, np.inf), values.min(axis=0))
            highs[name] = np.maximum(highs.get(name, -np.inf), values.max(axis=0))
            rows[name].append(generator.choice(values, min(of_a_batch, len(values)), replace=False))
    return {
        name: Activations(lows[name], highs[name], np.concatenate(rows[name])) for name in names
    }


def int8_weights(weights: np.ndarray, smallest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises (outputs, inputs) weights to int8, with a float32 scale for each output.

    CPUs without VNNI add the products of two neighbouring inputs in 16 bits, which saturates at
    32,767. Activations go to 255, so two neighbouring weights of one sign may sum to 128: each
    scale is the smallest (but at least `smallest`) that keeps to that. This costs next to nothing;
    weights of 7 bits, the usual way out, double the error.
    """
    pairs = weights.reshape(len(weights), -1, 2)
    sums = np.maximum(np.maximum(pairs, 0).sum(2).max(1), np.maximum(-pairs, 0).sum(2).max(1))
    scale = np.maximum(sums / 127, smallest).astype(np.float32)  # rounding two adds at most 1
    return np.round(weights / scale[:, None]).astype(np.int8), scale


def least_error(seen: Activations, weights: np.ndarray) -> Rounding:
    """Returns how to quantise a tensor so that the layers that read it change least.

    What counts is the squared change of their outputs, its mean left out: the bias takes that.

    Args:
        weights: of all its readers, float32 (outputs, channels).
    """
    outliers = np.maximum(np.maximum(-seen.low, seen.high), SMALLEST)
    largest = np.maximum(np.abs(weights).max(axis=0), SMALLEST)
    expected, tiny = seen.rows @ weights.T, np.finfo(np.float32).tiny
    variance = max(expected.var(axis=0).sum(), tiny)
    rounded_weights: dict[float, np.ndarray] = {}

    def tried(share: float, cut: float) -> Rounding:
        smoothing = (outliers**share / largest ** (1 - share)).astype(np.float32)
        low, high = min((seen.low / smoothing).min(), 0), max((seen.high / smoothing).max(), 0)
        scale = np.float32(max(cut * (high - low) / 255, tiny))
        zero = round(-cut * low / scale)
        if share not in rounded_weights:
            values, scales = int8_weights(weights * smoothing, np.full(len(weights), tiny))
            rounded_weights[share] = (values * scales[:, None]).T
        rows = (np.clip(np.round(seen.rows / smoothing / scale) + zero, 0, 255) - zero) * scale
        noise = float((rows @ rounded_weights[share] - expected).var(axis=0).sum() / variance)
        return Rounding(smoothing, scale, zero, rows, noise)

    uncut = {share: tried(share, 1) for share in SMOOTHING}
    share = min(uncut, key=lambda share: uncut[share].noise)
    return min([uncut[share], *(tried(share, cut) for cut in CUTS)], key=lambda found: found.noise)


def weight_bytes(proto: onnx.ModelProto) -> int:
    """Returns the size of a graph's weights, also where protobuf cannot hold them (2 GB)."""
    return sum(len(item.raw_data) for item in proto.graph.initializer)


def readers(proto: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Returns the linear layers that read a tensor, by its name."""
    found = collections.defaultdict(list)
    for node in filter(is_linear, proto.graph.node):
        found[node.input[0]].append(node)
    return found


def value_projections(proto: onnx.ModelProto) -> dict[str, str]:
    """Maps each query-key-value layer to the tensor that attention makes of its values.

    Values are the last third of the layer's outputs; attention weighs and adds them, so that a
    factor of a channel of the tensor is one of the values. The layer goes by its name.
    """
    producers = {name: node for node in proto.graph.node for name in node.output}

    def behind(name: str) -> onnx.NodeProto | None:
        node = producers.get(name)
        while node is not None and node.op_type in ("Reshape", "Gather"):
            node = producers.get(node.input[0])
        return node

    found = {}
    for name in readers(proto):
        attention = behind(name)
        if attention is not None and attention.op_type == "MatMul":
            found[behind(attention.input[1]).name] = name
    return found


class Int8Graph:
    """Nodes and constants of the int8 form of an exported graph."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        seen: dict[str, Activations],
        roundings: dict[str, Rounding],
    ) -> None:
        self.seen, self.roundings = seen, roundings
        self.weights = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
        self.constants: dict[str, np.ndarray] = {}
        self.nodes: list[onnx.NodeProto] = []
        # What the attention gives is smoothed by the values that go in, without a Mul.
        linear = filter(is_linear, proto.graph.node)
        int8 = {node.name for node in linear if node.input[0] in roundings}
        contexts = value_projections(proto).items()
        self.contexts = {
            layer: name for layer, name in contexts if layer in int8 and name in roundings
        }
        for node in proto.graph.node:
            if is_linear(node) and node.input[0] in roundings:
                self.nodes.extend(self.linear(node))
            elif node.op_type == "Gather" and node.input[1] == "input_ids":
                self.nodes.extend(self.word_embeddings(node))
            else:
                self.nodes.append(node)

    def linear(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        activation, weight, bias = node.input
        found = self.roundings[activation]
        if f"{activation}.scale" not in self.constants:
            yield from self.activation(activation)
        bias_values, kept = self.weights[bias], self.weights[weight]
        if context := self.contexts.get(node.name):
            smoothing = self.roundings[context].smoothing
            factor = 1 / np.concatenate([np.ones_like(smoothing)] * 2 + [smoothing])
            bias_values, kept = bias_values * factor, kept * factor[:, None]
        smallest = np.abs(bias_values) / found.scale / 2**29  # the quantised bias has 32 bits
        values, scales = int8_weights(
            kept * found.smoothing, np.maximum(smallest, np.finfo(np.float32).tiny)
        )
        # The layer's mean output on the calibration's rows stays what it was.
        before, after = self.seen[activation].rows.mean(0), found.rows.mean(0)
        lost = before @ kept.T - after @ (values * scales[:, None]).T
        sums = np.round((bias_values + lost) / (found.scale * scales).astype(np.float64))
        sums = np.clip(sums, -(2**31), 2**31 - 1).astype(np.int32)
        parts = [f"{activation}.{part}" for part in ("quantized", "scale", "zero")]
        inputs = [f"{node.name}.{part}" for part in ("input", "weight", "bias")]
        # onnxruntime joins the four nodes into one int8 multiplication when it loads the file.
        yield helper.make_node("DequantizeLinear", parts, inputs[:1])
        yield self.dequantize(inputs[1], values, scales)
        yield self.dequantize(inputs[2], sums, found.scale * scales)
        yield helper.make_node("Gemm", inputs, node.output, name=node.name, transB=1)

    def activation(self, name: str) -> Iterator[onnx.NodeProto]:
        found = self.roundings[name]
        self.constants[f"{name}.scale"] = np.array(found.scale)
        self.constants[f"{name}.zero"] = np.array(found.zero, dtype=np.uint8)
        inputs = [f"{name}.smoothed", f"{name}.scale", f"{name}.zero"]
        if name in self.contexts.values():
            inputs[0] = name
        else:
            self.constants[f"{name}.smoothing"] = 1 / found.smoothing
            yield helper.make_node("Mul", [name, f"{name}.smoothing"], inputs[:1])
        yield helper.make_node("QuantizeLinear", inputs, [f"{name}.quantized"])

    def dequantize(self, name: str, values: np.ndarray, scales: np.ndarray) -> onnx.NodeProto:
        inputs = [f"{name}.quantized", f"{name}.scale", f"{name}.zero"]
        zeros = np.zeros(len(scales), dtype=values.dtype)
        self.constants |= dict(zip(inputs, (values, scales, zeros), strict=True))
        return helper.make_node("DequantizeLinear", inputs, [name], axis=0)

    def word_embeddings(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        table, ids = node.input
        vectors = self.weights[table]
        scales = np.maximum(np.abs(vectors).max(axis=1, keepdims=True) / 127, SMALLEST / 127)
        self.constants[f"{table}.scales"] = scales.astype(np.float32)
        self.constants[f"{table}.quantized"] = np.round(vectors / scales).astype(np.int8)
        looked_up = [f"{table}.int8", f"{table}.float", f"{table}.scale"]
        yield helper.make_node("Gather", [f"{table}.quantized", ids], looked_up[:1])
        yield helper.make_node("Cast", looked_up[:1], looked_up[1:2], to=TensorProto.FLOAT)
        yield helper.make_node("Gather", [f"{table}.scales", ids], looked_up[2:])
        yield helper.make_node("Mul", looked_up[1:], node.output)


def quantize_int8(
    proto: onnx.ModelProto, seen: dict[str, Activations], roundings: dict[str, Rounding]
) -> onnx.ModelProto:
    """Returns the int8 form of an exported graph; inputs and output stay as they are.

    Args:
        roundings: of the tensors whose readers become int8; other layers stay in float32.
    """
    int8 = Int8Graph(proto, seen, roundings)
    used = {name for node in int8.nodes for name in node.input}
    kept = [item for item in proto.graph.initializer if item.name in used]
    added = [numpy_helper.from_array(values, name) for name, values in int8.constants.items()]
    graph = helper.make_graph(
        int8.nodes, proto.graph.name, proto.graph.input, proto.graph.output, [*kept, *added]
    )
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)


def choose_int8(
    proto: onnx.ModelProto,
    seen: dict[str, Activations],
    expected_loss: Callable[[onnx.ModelProto], float],
) -> tuple[onnx.ModelProto, list[str], float]:
    """Returns the int8 form that loses little enough with the fewest layers in float32.

    The noisiest layers stay there, 1, 2, 4, ... of them, while more than ACCEPTED points are
    expected to be lost and the file is no larger than LARGEST of the float32 one.

    Args:
        expected_loss: of a graph, in points.

    Returns:
        The graph, the names of its linear layers in float32, and its expected loss.
    """
    layers = readers(proto)
    weights = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    roundings = {
        name: least_error(seen[name], np.concatenate([weights[node.input[1]] for node in nodes]))
        for name, nodes in tqdm(layers.items(), desc="int8 ranges", unit=" tensors")
    }
    noisiest = sorted(roundings, key=lambda name: -roundings[name].noise)
    best, count = None, 0
    while count <= len(noisiest):
        quiet = {name: roundings[name] for name in noisiest[count:]}
        int8 = quantize_int8(proto, seen, quiet)
        if best and weight_bytes(int8) > LARGEST * weight_bytes(proto):
            break
        lost = expected_loss(int8)
        if best is None or lost < best[2]:
            kept = [node.name for name in noisiest[:count] for node in layers[name]]
            best = (int8, kept, lost)
        if lost <= ACCEPTED:
            break
        count = 2 * count or 1
    return best
