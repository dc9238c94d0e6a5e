"""The module examples/node with its own tests, and where int8 differs in WebAssembly."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from commands import REPOSITORY
from onnx import helper, shape_inference
from tokenizers import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm"),
]

OUT_OF_REACH = re.compile(r"EAI_AGAIN|ENOTFOUND|ECONNREFUSED|ETIMEDOUT")


def install(folder: Path, *options: str) -> None:
    """Runs `npm ci`; skips the test where the registry is out of reach."""
    done = subprocess.run(["npm", "ci", *options], cwd=folder, capture_output=True, text=True)
    if found := OUT_OF_REACH.search(done.stderr):
        pytest.skip(f"npm's registry is out of reach: {found[0]}")
    assert done.returncode == 0, done.stdout + done.stderr


# --- The module ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("node") / "node"
    ignored = shutil.ignore_patterns("node_modules")
    shutil.copytree(REPOSITORY / "examples/node", folder, ignore=ignored)
    install(folder)
    return folder


def run_tests(module: Path, models: Path) -> str:
    """Returns the report of `npm test`, in TAP."""
    done = subprocess.run(
        ["npm", "test", "--", "--test-reporter=tap"],
        cwd=module, capture_output=True, text=True, env=os.environ | {"MODELS": str(models)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_tests_pass_with_the_golden_files(module: Path, exports: Path) -> None:
    report = run_tests(module, exports)
    names = re.findall(r"^ok \d+ - vectors equal those of Python: (\S+)$", report, re.MULTILINE)
    assert sorted(names) == sorted(path.name for path in exports.glob("*.onnx"))
    assert len(names) == 13 and "# skipped 0\n" in report


def test_without_an_export_its_tests_say_what_they_need(module: Path, tmp_path: Path) -> None:
    report = run_tests(module, tmp_path)
    reasons = re.findall(r"# SKIP (.+)", report)
    assert len(reasons) > 4 and all("run onnx/export_onnx.py" in reason for reason in reasons)
    assert "# pass 1\n" in report


def test_the_lock_file_names_the_public_registry() -> None:
    path = REPOSITORY / "examples/node/package-lock.json"
    packages = json.loads(path.read_text(encoding="utf-8"))["packages"]
    found = [entry for place, entry in packages.items() if place]
    assert found
    for entry in found:
        assert entry["resolved"].startswith("https://registry.npmjs.org/")
        assert entry["integrity"].startswith("sha512-")


# --- WebAssembly -----------------------------------------------------------------------------

SHAPES = {"Constant", "DequantizeLinear", "Shape", "Reshape", "Concat", "Unsqueeze", "Transpose",
          "Split", "Slice", "Squeeze"}  # fmt: skip
Tensors = dict[str, np.ndarray]


def single_nodes(path: Path, feeds: Tensors) -> tuple[onnx.ModelProto, Tensors, dict[str, str]]:
    """Returns a model in which each node of a file reads what Python computed before it.

    Also returns that model's inputs, and by the name of each of its outputs the node's operator.
    """
    proto = shape_inference.infer_shapes(onnx.load(path))
    before = {name: node for node in proto.graph.node for name in node.output}
    known = {item.name: item for item in proto.graph.value_info}
    constants = {item.name for item in proto.graph.initializer}
    kept = [
        node for node in proto.graph.node
        if node.op_type not in SHAPES and set(node.output) <= set(known)
    ]  # fmt: skip
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    exposed.graph.output.extend(
        known[name]
        for node in proto.graph.node
        if node.op_type not in ("Constant", "DequantizeLinear")
        for name in node.output
        if name in known
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), options)
    names = [item.name for item in session.get_outputs()]
    values = feeds | dict(zip(names, session.run(names, feeds), strict=True))

    nodes: dict[str, onnx.NodeProto] = {}  # by name, each once
    inputs: Tensors = {}
    operators = {}

    def input_of(name: str) -> str:
        """Adds what a node reads: a constant, an int8 tensor's node, or a value of Python."""
        if not name or name in constants:
            return name
        if name in values:
            inputs[f"{name}.value"] = values[name]
            return f"{name}.value"
        node = onnx.NodeProto()
        node.CopyFrom(before[name])
        assert node.op_type in ("Constant", "DequantizeLinear"), node.op_type
        node.input[:] = map(input_of, node.input)
        nodes[name] = node
        return name

    outputs = []
    for node in kept:
        single = onnx.NodeProto()
        single.CopyFrom(node)
        single.input[:] = map(input_of, node.input)
        single.output[:] = [f"{name}.single" for name in node.output]
        nodes[single.output[0]] = single
        for name in node.output:
            operators[f"{name}.single"] = node.op_type
            kind = known[name].type.tensor_type.elem_type
            outputs.append(helper.make_tensor_value_info(f"{name}.single", kind, None))
    graph = helper.make_graph(
        list(nodes.values()),
        "single",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
            )
            for name, value in inputs.items()
        ],
        outputs,
        list(proto.graph.initializer),
    )
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    return model, inputs, operators


def run_wasm(folder: Path, model: Path, feeds: Tensors) -> Tensors:
    given = {
        name: {"type": str(value.dtype), "dims": value.shape,
               "data": base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()}
        for name, value in feeds.items()
    }  # fmt: skip
    done = subprocess.run(
        ["node", "run_wasm.mjs", model], cwd=folder, check=True, capture_output=True, text=True,
        input=json.dumps(given),
    )  # fmt: skip
    return {
        name: np.frombuffer(base64.b64decode(item["data"]), item["type"]).reshape(item["dims"])
        for name, item in json.loads(done.stdout).items()
    }


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64")
def test_in_webassembly_float32_operators_alone_round_differently(
    exports: Path, tmp_path: Path
) -> None:
    """Given the same values, every int8 step is equal; what comes between differs in last bits.

    A last bit decides where QuantizeLinear rounds a value that lies between two steps, and one
    step in the last layers moves an embedding by as much as test_web.py allows.
    """
    for name in ("package.json", "package-lock.json"):
        shutil.copy(REPOSITORY / "examples/web" / name, tmp_path)
    install(tmp_path, "--omit=dev", "--ignore-scripts")
    shutil.copy(REPOSITORY / "tests/run_wasm.mjs", tmp_path)
    path = exports / "e5-small-ko-int8.onnx"
    tokens = Tokenizer.from_file(str(path.with_suffix(".tokenizer.json"))).encode(
        "그는 'TV'를 \"켰다\"\t그리고  껐다."
    )
    feeds = {
        "input_ids": np.array([tokens.ids]),
        "attention_mask": np.array([tokens.attention_mask]),
        "token_type_ids": np.array([tokens.type_ids]),
    }
    model, inputs, operators = single_nodes(path, feeds)
    onnx.save(model, tmp_path / "single.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "single.onnx")
    python = dict(zip(operators, session.run(list(operators), inputs), strict=True))
    found = run_wasm(tmp_path, tmp_path / "single.onnx", inputs)

    differing: dict[str, float] = {}  # by operator: of the largest value
    for name, operator in operators.items():
        assert found[name].dtype == python[name].dtype
        if not np.array_equal(found[name], python[name]):
            assert python[name].dtype == np.float32, operator
            part = np.abs(found[name] - python[name]).max() / np.abs(python[name]).max()
            differing[operator] = max(differing.get(operator, 0), float(part))
    assert {"QuantizeLinear", "Gemm", "Gather", "Mul", "Add"} <= set(operators.values())
    in_float32 = json.loads(path.with_suffix(".json").read_text())["float32_layers"]
    allowed = {"LayerNormalization", "MatMul", "Softmax", "Erf"} | (
        {"Gemm"} if in_float32 else set()
    )
    assert set(differing) <= allowed, differing
    assert differing["LayerNormalization"] > 0 and max(differing.values()) < 2e-6, differing
