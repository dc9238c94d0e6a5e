"""The plan of the house: rooms, sizes, one place for each thing."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY, SCRIPTS


def test_the_scripts_stay_short_and_share_no_run_of_twelve_lines() -> None:
    texts = [(REPOSITORY / script).read_text().splitlines() for script in SCRIPTS]
    assert all(len(lines) <= 120 for lines in texts)
    for first, second in itertools.combinations(texts, 2):
        runs = {tuple(first[i : i + 12]) for i in range(len(first) - 11)}
        assert not any(tuple(second[i : i + 12]) in runs for i in range(len(second) - 11))


def test_onnx_is_no_package() -> None:
    assert not (REPOSITORY / "onnx/__init__.py").exists()


# --- Rooms -----------------------------------------------------------------------------------


def rooms() -> list[str]:
    """Returns the rooms in the order of common/__init__.py's list."""
    text = (REPOSITORY / "common/__init__.py").read_text(encoding="utf-8")
    return re.findall(r"^    (\w+) {2,}\S", text, re.MULTILINE)


def imported(path: Path) -> set[str]:
    """Returns all modules that a file imports, those of functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "common":
            found |= {f"common.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_every_room_is_listed_and_imports_those_above_it_alone() -> None:
    order = rooms()
    files = {path.stem for path in (REPOSITORY / "common").glob("*.py")} - {"__init__"}
    assert set(order) == files and len(order) == len(files)
    scripts = {path.stem for path in REPOSITORY.glob("*.py")}
    for place, room in enumerate(order):
        modules = imported(REPOSITORY / f"common/{room}.py")
        ours = {name.removeprefix("common.") for name in modules if name.startswith("common")}
        assert ours <= set(order[:place]), room
        assert not modules & scripts, room


@pytest.mark.parametrize("room", ["command_line", "data", "evaluation", "results"])
def test_rooms_that_need_no_torch_come_without_it(room: str) -> None:
    code = f"import sys, common.{room}; print({{'torch', 'onnxruntime'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.stdout.decode().strip() == "set()", done.stderr.decode()


def tracked(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in REPOSITORY.glob(pattern))


CODE = ("*.py", "common/*.py", "onnx/*.py", "examples/*.py", "measurements/*.py")


def test_no_file_outside_tests_is_too_long() -> None:
    for path in tracked(*CODE):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path


def test_text_is_utf_8_whatever_the_locale() -> None:
    """Each text file is opened with its encoding: the default one is the machine's."""
    for path in tracked(*CODE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            of_path = isinstance(node.func, ast.Attribute) and node.func.attr
            mode = [value.value for value in node.args if isinstance(value, ast.Constant)]
            opens = of_path == "open" or getattr(node.func, "id", "") == "open"
            is_text = of_path in ("read_text", "write_text") or (
                opens and "b" not in str(mode[-1:])
            )
            named = {keyword.arg for keyword in node.keywords}
            assert not is_text or "encoding" in named, f"{path}:{node.lineno}"


def test_the_old_modules_are_gone() -> None:
    old = {"training_util", "data_util", "evaluation_util", "model_util"}
    for path in tracked(*CODE, "tests/*.py"):
        assert not imported(path) & old, path


def test_examples_import_nothing_of_the_repository() -> None:
    ours = {"common", *(path.stem for path in tracked("*.py", "onnx/*.py", "measurements/*.py"))}
    for path in tracked("examples/*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & ours, path


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("replacing a file whole", r"os\.replace\(|\.rename\("),
        ("a file's hash", r"file_digest\("),
        ("git's blob id", r"blob %d"),
        ("README markers", r"<!-- /?results:"),
        ("the default prompt of a model", r"default_prompt_name\)"),
        ("the command line without paths", r"shlex\.join\(\[\"python\""),
        ("running an exported file", r"session\.run\("),
        ("families that are computed as BERT is", r"\"camembert\""),
    ],
)
def test_written_once(what: str, pattern: str) -> None:
    """One place in common/; what else does the same work says so here."""
    allowed = {
        "replacing a file whole": {"common/command_line.py", "common/encoders.py",
                                   "offline_encoder.py", "onnx/export_onnx.py"},
        "running an exported file": {"common/exported.py", "onnx/check_onnx.py",
                                     "onnx/measure_onnx.py", "onnx/quantize_onnx.py"},
        "the command line without paths": {"common/command_line.py", "common/training.py"},
        "README markers": {"common/results.py"},
    }  # fmt: skip
    found = {
        str(path.relative_to(REPOSITORY))
        for path in tracked("*.py", "common/*.py", "onnx/*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }
    assert found and (len(found) == 1 or found <= allowed[what]), found
