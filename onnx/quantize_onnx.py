"""Int8 form of the graphs that export_onnx.py writes: static, in QuantizeLinear form, exact sums.

Every linear layer and the word embeddings become int8. Outlier channels move from activations to
weights (SmoothQuant, https://arxiv.org/abs/2211.10438); activations are uint8 with one scale for
each tensor, found on calibration sentences, so that a sentence's embedding does not depend on the
others of its batch, as it does with dynamic quantisation. No layer needs to stay in float32.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from common.exported import feed

SMOOTHING = 0.7  # the share of outliers that goes to the weights; best of 0.3 to 0.9 on KorSTS-dev
SMALLEST = 1e-5  # channels that calibration sees at rest

Ranges = dict[str, tuple[np.ndarray, np.ndarray]]


def is_linear(node: onnx.NodeProto) -> bool:
    """Tells a linear layer with a bias on a (tokens, inputs) matrix."""
    return node.op_type == "Gemm" and len(node.input) == 3


def activation_ranges(path: Path, tokenizer: Tokenizer, sentences: Sequence[str]) -> Ranges:
    """Returns the lowest and highest value of each channel of what linear layers read.

    Writes calibration.onnx beside the graph, which may have its weights in another file.
    """
    proto = onnx.load(path, load_external_data=False)
    names = list(dict.fromkeys(node.input[0] for node in proto.graph.node if is_linear(node)))
    for name in names:
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    calibration = path.with_name("calibration.onnx")
    onnx.save(proto, calibration)
    session = onnxruntime.InferenceSession(calibration)
    lows, highs = {}, {}
    for start in range(0, len(sentences), 8):
        feeds = feed(session, tokenizer.encode_batch(sentences[start : start + 8]))
        for name, values in zip(names, session.run(names, feeds), strict=True):
            lows[name] = np.minimum(lows.get(name, np.inf), values.min(axis=0))
            highs[name] = np.maximum(highs.get(name, -np.inf), values.max(axis=0))
    return {name: (lows[name], highs[name]) for name in names}


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


class Int8Graph:
    """Nodes and constants of the int8 form of an exported graph."""

    def __init__(self, proto: onnx.ModelProto, ranges: Ranges) -> None:
        self.ranges = ranges
        self.weights = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
        self.readers = collections.defaultdict(list)  # weights of the layers that read a tensor
        for node in filter(is_linear, proto.graph.node):
            self.readers[node.input[0]].append(node.input[1])
        self.constants: dict[str, np.ndarray] = {}
        self.smoothing: dict[str, np.ndarray] = {}
        self.nodes: list[onnx.NodeProto] = []
        for node in proto.graph.node:
            if is_linear(node):
                self.nodes.extend(self.linear(node))
            elif node.op_type == "Gather" and node.input[1] == "input_ids":
                self.nodes.extend(self.word_embeddings(node))
            else:
                self.nodes.append(node)

    def linear(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        activation, weight, bias = node.input
        if activation not in self.smoothing:
            yield from self.activation(activation)
        scale = self.constants[f"{activation}.scale"]
        bias_values = self.weights[bias]
        smallest = np.abs(bias_values) / scale / 2**30  # the quantised bias has 32 bits
        values, scales = int8_weights(
            self.weights[weight] * self.smoothing[activation],
            np.maximum(smallest, np.finfo(np.float32).tiny),
        )
        sums = np.round(bias_values / (scale * scales).astype(np.float64)).astype(np.int32)
        parts = [f"{activation}.{part}" for part in ("quantized", "scale", "zero")]
        inputs = [f"{node.name}.{part}" for part in ("input", "weight", "bias")]
        # onnxruntime joins the four nodes into one int8 multiplication when it loads the file.
        yield helper.make_node("DequantizeLinear", parts, inputs[:1])
        yield self.dequantize(inputs[1], values, scales)
        yield self.dequantize(inputs[2], sums, scale * scales)
        yield helper.make_node("Gemm", inputs, node.output, name=node.name, transB=1)

    def activation(self, name: str) -> Iterator[onnx.NodeProto]:
        low, high = self.ranges[name]
        outliers = np.maximum(np.maximum(-low, high), SMALLEST)
        weights = np.concatenate([self.weights[reader] for reader in self.readers[name]])
        weights = np.maximum(np.abs(weights).max(axis=0), SMALLEST)
        smoothing = (outliers**SMOOTHING / weights ** (1 - SMOOTHING)).astype(np.float32)
        low, high = min((low / smoothing).min(), 0), max((high / smoothing).max(), 0)
        scale = np.float32(max((high - low) / 255, np.finfo(np.float32).tiny))
        self.smoothing[name] = smoothing
        self.constants[f"{name}.smoothing"] = 1 / smoothing
        self.constants[f"{name}.scale"] = np.array(scale)
        self.constants[f"{name}.zero"] = np.array(round(-low / scale), dtype=np.uint8)
        inputs = [f"{name}.smoothed", f"{name}.scale", f"{name}.zero"]
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


def quantize_int8(proto: onnx.ModelProto, ranges: Ranges) -> onnx.ModelProto:
    """Returns the int8 form of an exported graph; inputs and output stay as they are."""
    int8 = Int8Graph(proto, ranges)
    used = {name for node in int8.nodes for name in node.input}
    kept = [item for item in proto.graph.initializer if item.name in used]
    added = [numpy_helper.from_array(values, name) for name, values in int8.constants.items()]
    graph = helper.make_graph(
        int8.nodes, proto.graph.name, proto.graph.input, proto.graph.output, [*kept, *added]
    )
    return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
