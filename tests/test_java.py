"""The Maven project examples/java: its own tests, its search, the measurement beside Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
from commands import REPOSITORY, SAMPLES, run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("java") is None, reason="no java"),
    pytest.mark.skipif(shutil.which("mvn") is None, reason="no mvn"),
]

# What Maven says where it cannot reach a repository; a version that is not there reads otherwise.
OUT_OF_REACH = re.compile(r"Could not transfer (artifact|metadata)|offline mode")


def verify(project: Path, models: Path) -> list[tuple[str, str]]:
    """Runs `mvn verify`; returns of each of its tests what it prints and why it is skipped."""
    command = ["mvn", "-B", "-q", "verify", f"-Dmodels={models}"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode and OUT_OF_REACH.search(said):
        pytest.skip(f"Maven Central is out of reach: {said.strip().splitlines()[0]}")
    assert done.returncode == 0, said
    (report,) = (project / "target/surefire-reports").glob("TEST-*.xml")
    return [
        (case.findtext("system-out", ""), case.findtext("skipped", ""))
        for case in ElementTree.parse(report).iter("testcase")
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is committed."""
    folder = tmp_path_factory.mktemp("java") / "java"
    ignored = shutil.ignore_patterns("target")
    return Path(shutil.copytree(REPOSITORY / "examples/java", folder, ignore=ignored))


@pytest.fixture(scope="module")
def tested(project: Path, exports: Path) -> list[tuple[str, str]]:
    return verify(project, exports)


def test_its_tests_pass_with_the_golden_files(tested: list[tuple[str, str]], exports: Path) -> None:
    printed = "".join(text for text, _ in tested)
    compared = dict(re.findall(r"golden.json (\S+): largest difference (\S+)", printed))
    assert compared.keys() == {path.name for path in exports.glob("*.onnx")}
    assert len(compared) == 13
    assert len(tested) > len(compared) + 8
    assert not any(skipped for _, skipped in tested)
    assert max(float(value) for name, value in compared.items() if "int8" not in name) <= 1e-5


def test_without_an_export_its_tests_say_what_they_need(
    tested: list[tuple[str, str]], project: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(project, tmp_path / "java"))
    reasons = [skipped for _, skipped in verify(other, tmp_path / "nowhere")]
    assert "" in reasons  # what needs no export is tested
    reasons = [reason for reason in reasons if reason]
    assert len(reasons) > 8 and all("run onnx/export_onnx.py" in reason for reason in reasons)


# --- The search ------------------------------------------------------------------------------


def search(project: Path, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the jar as a new user of a machine without a network and without a locale."""
    command = ["java", f"-Duser.home={tmp_path}", "-jar"]
    command += [project / "target/semantic-search.jar", *arguments]
    alone = ["unshare", "--net"]
    if (
        shutil.which("unshare")
        and not subprocess.run([*alone, "true"], capture_output=True).returncode
    ):
        command = [*alone, *command]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        encoding="utf-8",
        env=environment,
        cwd=tmp_path,
    )


def ranking(text: str) -> list[tuple[str, float]]:
    lines = [re.fullmatch(r"  (-?\d\.\d{4})  (.+)", line) or line for line in text.splitlines()]
    return [(line, 0.0) if isinstance(line, str) else (line[2], float(line[1])) for line in lines]


def test_it_prints_what_the_python_search_prints(
    tested: list[tuple[str, str]],
    project: Path,
    exports: Path,
    offline_encoder: Path,
    tmp_path: Path,
) -> None:
    python = run_script("examples/semantic_search.py", "--model", offline_encoder)
    done = search(project, tmp_path, exports / "e5-small-ko.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    found, expected = ranking(done.stdout), ranking(python.stdout)
    assert len(found) == 18
    assert [line for line, _ in found] == [line for line, _ in expected]
    assert [score for _, score in found] == pytest.approx(
        [score for _, score in expected], abs=1e-4
    )


def test_it_searches_the_lines_of_a_file(
    tested: list[tuple[str, str]], project: Path, exports: Path, tmp_path: Path
) -> None:
    lines = ["서울은 한국의 수도다.", "", "고양이가 소파에서 잔다.", "  "]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    query = "한국에서 가장 큰 도시"
    done = search(project, tmp_path, exports / "e5-small-ko.onnx", "lines.txt")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 9)
    # A query on the command line needs a locale with Korean.
    os_locale = {"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}
    jar = project / "target/semantic-search.jar"
    command = ["java", "-jar", jar, exports / "e5-small-ko.onnx", "lines.txt", query]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=os_locale, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line, _ in ranking(done.stdout)] == [query, lines[0], lines[2]]


def test_bad_arguments_are_one_line(
    tested: list[tuple[str, str]], project: Path, exports: Path, tmp_path: Path
) -> None:
    model = exports / "bert.onnx"
    proto = onnx.load(model)  # as other exporters write it
    proto.graph.output[0].name = "last_hidden_state"
    for node in proto.graph.node:
        node.output[:] = [
            "last_hidden_state" if name == "sentence_embedding" else name for name in node.output
        ]
    onnx.save(proto, tmp_path / "other.onnx")
    for ending in (".json", ".tokenizer.json"):
        shutil.copy(model.with_suffix(ending), tmp_path / f"other{ending}")
    (tmp_path / "latin.txt").write_bytes(b"\xc7\xd1\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    for arguments, says in (
        ([], "error: usage: MODEL.onnx "),
        (["no.onnx"], "error: no.onnx: no such file; onnx/export_onnx.py writes three"),
        (
            ["other.onnx"],
            "error: other.onnx: no file of onnx/export_onnx.py: no sentence_embedding",
        ),
        ([model, "no.txt"], "error: no.txt: no text file in UTF-8"),
        ([model, "latin.txt"], "error: latin.txt: no text file in UTF-8"),
        ([model, "empty.txt"], "error: empty.txt: no sentences"),
    ):
        done = search(project, tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(says)


# --- The measurement -------------------------------------------------------------------------


def test_the_measurement_runs(
    tested: list[tuple[str, str]], project: Path, exports: Path, tmp_path: Path
) -> None:
    korsts = tmp_path / "KorSTS"
    korsts.mkdir()
    rows = [
        path.read_text(encoding="utf-8").splitlines()
        for path in sorted((SAMPLES / "KorSTS").glob("*.tsv"))
    ]
    table = [rows[0][0], *(line for lines in rows for line in lines[1:])]
    (korsts / "sts-test.tsv").write_text("\n".join(table), encoding="utf-8")
    jar = project / "target/semantic-search.jar"
    command = [sys.executable, REPOSITORY / "measurements/measure_java.py", "--jar", jar]
    command += ["--onnx", exports / "bert.onnx", "--data_dir", tmp_path, "--repeats", "1"]
    command += ["--output", tmp_path / "java.json"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    report = json.loads((tmp_path / "java.json").read_text(encoding="utf-8"))
    cases = [(row["precision"], row["batch_size"]) for row in report["rows"]]
    assert cases == [("fp32", 32), ("fp32", 1), ("int8", 32), ("int8", 1)]
    assert all(row["Java / Python"] > 0 for row in report["rows"])
    assert report["versions"]["Java"].keys() == {"onnxruntime", "tokenizers"}
