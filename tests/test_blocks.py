"""Every fenced block of the pages, run in a copy of the repository as a reader pastes it.

Two encoders stand behind models/e5-small-ko: the real one for the blocks whose output the pages
show, and a tiny one for all others. KorNLUDatasets is tests/samples there, so that `--max_loss 100`
is added to `--quantize int8`, as README.md says, and speeds, which say nothing there, are measured
once and not three times. The Hub is tests/hub.py's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from commands import KORNLU, REPOSITORY, SAMPLES
from encoders import edit_json, write_family
from exports import bert, roberta
from hub import Hub
from sentence_transformers import SentenceTransformer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="not in a virtual environment"),
]

PAGES = ("README.md", "docs/demo.md", "docs/own_data.md", "docs/training.md", "docs/use.md",
         "docs/v2.md", "docs/extending.md", "onnx/README.md", "examples/README.md")  # fmt: skip
# What a block begins with, and why it is not run.
NOT_RUN = {
    "python3 -m venv .venv": "downloads torch from an address of its own",
    "python3 -m venv mteb-env": "installs mteb's own versions and downloads its data sets",
}
# What an output begins with, and why nothing is compared with it.
NOT_COMPARED = {
    "models/e5-small-ko: 30,189,312": "lines of docs/demo.md's first block (compared with it)",
    "== 1/5 The encoder: multilingual-e5-small from PyPI, cut to Korean (a minute)\nmodels": (
        "ten minutes of training; the demo on the samples is compared"
    ),
    "한 남자가 파스타를 먹는다.": "published by the original for a model of the Hub",
}
FEATHER_GOES_HERE = """\
    if form == "parquet":
        frame = read_parquet(path)
"""
TOOLS = ("mvn", "java", "npm")
OUT_OF_REACH = re.compile(
    r"Could not transfer (artifact|metadata)|EAI_AGAIN|ENOTFOUND|ECONNREFUSED|ETIMEDOUT"
)


class Block(NamedTuple):
    """A fenced block: its page, its first line there, its language ("" for an output)."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """Returns the fenced blocks of a page, commands before the code that needs their files."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    blocks = [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]
    return sorted(blocks, key=lambda block: block.language != "bash")


def commands_in_tables(page: str) -> list[Block]:
    """Returns the python commands that a table of a page shows, generated tables left out."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    text = re.sub(r"<!-- results:([\w-]+) -->.*?<!-- /results:\1 -->", "", text, flags=re.S)
    rows = re.findall(r"^\|.*\|$", text, re.M)
    commands = [command for row in rows for command in re.findall(r"`(python [^`]+)`", row)]
    return [Block(page, 0, "bash", f"{command}\n") for command in commands]


def without_chance(text: str) -> str:
    """Takes out what another moment changes, and the order of close neighbours."""
    text = re.sub(r"demo-[\d_-]+", "demo-TIME", text)
    text = re.sub(r"^\S*bin/python ", "PYTHON ", text, flags=re.M)
    text = re.sub(r"[\d.]+ ms", "MS", text)
    text = re.sub(r"^\n", "", text, flags=re.M)  # between what two commands print
    hit = r"(?:^  [\d.]+  .+\n)+"
    by_sentence = lambda m: "".join(sorted(m[0].splitlines(True), key=lambda line: line[8:]))  # noqa: E731
    return re.sub(hit, by_sentence, text, flags=re.M)


def assert_alike(shown: str, printed: str) -> None:
    """Compares outputs; scores may differ as much as another processor makes them."""
    number = r"-?\d[\d,]*(?:\.\d+)?"
    shown, printed = without_chance(shown), without_chance(printed)
    assert re.sub(number, "N", printed) == re.sub(number, "N", shown)
    tolerances = {0: 0, 1: 2, 2: 5, 4: 0.02}  # by decimals: counts, MB, points, cosines
    for left, right in zip(*(re.findall(number, text) for text in (shown, printed)), strict=True):
        tolerance = tolerances[len(left.partition(".")[2])]
        difference = float(left.replace(",", "")) - float(right.replace(",", ""))
        assert abs(difference) <= tolerance, (left, right)


class House:
    """A copy of the repository as a reader has it behind the first command."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def encoder(self, model: Path) -> None:
        """Makes models/e5-small-ko lead to an encoder."""
        (self.folder / "models").mkdir(exist_ok=True)
        link = self.folder / "models/e5-small-ko"
        link.unlink(missing_ok=True)
        link.symlink_to(model)

    def data(self, source: Path) -> None:
        """Makes KorNLUDatasets lead to a folder."""
        link = self.folder / "KorNLUDatasets"
        link.unlink(missing_ok=True)
        link.symlink_to(source)

    def run(self, words: list[str | Path], threads: int = 1) -> subprocess.CompletedProcess[str]:
        environment = self.environment | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def bash(self, text: str, threads: int = 1) -> subprocess.CompletedProcess[str]:
        """Pastes commands into a shell with the environment active."""
        text = re.sub(r"--quantize int8(?! --max_loss)", "--quantize int8 --max_loss 100", text)
        active = f"source .venv/bin/activate\n{text}"
        return self.run(["bash", "-eo", "pipefail", "-c", active], threads=threads)

    def python(self, text: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "pasted.py").write_text(text, encoding="utf-8")
        return self.run([self.folder / ".venv/bin/python", "pasted.py"])

    def node(self, text: str) -> subprocess.CompletedProcess[str]:
        script = self.folder / "examples/node/pasted.mjs"
        script.write_text(f"{text}console.log(embeddings.length);\n", encoding="utf-8")
        return self.run(["node", script])

    def java(self, text: str) -> subprocess.CompletedProcess[str]:
        imports = "java.nio.file.Path", "java.util.List", "ko.sentence.SentenceEncoder"
        lines = [f"import {name};" for name in imports]
        lines += ["class Pasted {", "public static void main(String[] x) throws Exception {"]
        script = self.folder / "onnx/models/Pasted.java"
        script.write_text("\n".join([*lines, text, "}}"]), encoding="utf-8")
        jar = self.folder / "examples/java/target/semantic-search.jar"
        return self.run(["java", "-cp", jar, script])

    def serve(self, text: str) -> subprocess.CompletedProcess[str]:
        """Pastes commands that end with a web server; reads its page and model, then stops it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        text = text.replace("8000", port).replace("int8 ", "int8 --max_loss 100 ", 1)
        line = ["bash", "-ec", f"source .venv/bin/activate\n{text}"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        server = subprocess.Popen(line, cwd=self.folder, env=self.environment,
                                  process_group=0, **streams)  # fmt: skip
        try:
            while server.poll() is None:
                try:
                    for name in ("", "model/model-int8.onnx", "model/model-int8.json"):
                        urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}").close()
                    return subprocess.CompletedProcess(line, 0, "", "")
                except urllib.error.URLError:
                    time.sleep(0.2)
            return subprocess.CompletedProcess(line, 1, "", server.stdout.read())
        finally:
            if server.poll() is None:
                os.killpg(server.pid, 15)
            server.wait()


@contextmanager
def forking_python(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Puts a `python` into folder/.venv that forks; gives the variables it wants."""
    make = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", ".venv"]
    subprocess.run(make, cwd=folder, check=True)
    fork, path = REPOSITORY / "tests/fork_python.py", folder.parent / "python.socket"
    python = folder / ".venv/bin/python"
    python.unlink()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {fork} {path} "$@"\n')
    python.chmod(0o755)
    (folder / ".venv/bin/torchrun").symlink_to(Path(sys.prefix) / "bin/torchrun")
    # torchrun takes PYTHON_EXEC for its processes.
    environment = environment | {"FORK_PYTHON_REAL": sys.executable, "PYTHON_EXEC": str(python)}
    line = [sys.executable, fork, "--serve", path]
    server = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "ready\n"
        yield environment
    finally:
        server.kill()
        server.wait()


def stand_in_data(folder: Path) -> Path:
    """Writes tests/samples in the folders and names of KorNLUDatasets, XNLI's among them."""
    shutil.copytree(SAMPLES, folder)
    for name, sample in {"dev": "snli_1.0_train", "test": "multinli.train"}.items():
        shutil.copy(SAMPLES / f"KorNLI/{sample}.ko.tsv", folder / f"KorNLI/xnli.{name}.ko.tsv")
    return folder


def write_readers_files(folder: Path) -> None:
    """Writes what the pages take for given: a reader's pairs, questions and sentences."""
    pairs = pd.read_csv(SAMPLES / "KorSTS/sts-train.tsv", sep="\t", quoting=3)
    pairs = pairs[["sentence1", "sentence2", "score"]]
    pairs.to_csv(folder / "pairs.csv", index=False)
    items = pairs.to_dict("records")
    texts = {
        "questions.jsonl": [{"anchor": i["sentence1"], "positive": i["sentence2"]} for i in items],
        "corpus.jsonl": [{"text": item["sentence1"]} for item in items],
    }
    for name, lines in texts.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    klue = [
        {**item, "labels": {"real-label": item.pop("score"), "binary-label": 0}} for item in items
    ]
    for seed in (777, 778, 779):  # docs/v2.md: one run folder a seed
        (folder / f"V2_{seed}").symlink_to("output/v2")
        (folder / f"STS_{seed}").symlink_to("output/sts")
    (folder / "klue-sts-v1.1").mkdir()
    text = json.dumps(klue, ensure_ascii=False)
    (folder / "klue-sts-v1.1/klue-sts-v1.1_train.json").write_text(text, encoding="utf-8")


def write_hub(folder: Path) -> None:
    """Writes the models and the data set of the Hub that the pages name."""
    plain = write_family(folder / "klue/roberta-base", roberta(), model_max_length=128)
    model = SentenceTransformer(str(plain), device="cpu")
    for name in ("ko-sroberta-multitask", "ko-sroberta-multitask-mrl"):
        model.save_pretrained(str(folder / "jhgan" / name), create_model_card=False)
    dev = pd.read_csv(SAMPLES / "KorSTS/sts-dev.tsv", sep="\t", quoting=3)
    labels = [{"real-label": score, "binary-label": int(score >= 3)} for score in dev["score"]]
    target = folder / "datasets/klue/klue/sts/validation-00000-of-00001.parquet"
    target.parent.mkdir(parents=True)
    dev[["sentence1", "sentence2"]].assign(labels=labels).to_parquet(target)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    folder = tmp_path / "ko-sentence-transformers"
    made = {"models", "output", "KorNLUDatasets", "runs", "logs"}
    anywhere = {".git", ".venv", "__pycache__", "node_modules", "target", "dist",
                "model", ".pytest_cache", ".ruff_cache"}  # fmt: skip

    def ignored(where: str, names: list[str]) -> set[str]:
        at_top = Path(where) in (REPOSITORY, REPOSITORY / "onnx")
        return anywhere | (made if at_top else set())

    shutil.copytree(REPOSITORY, folder, ignore=ignored)
    measuring = folder / "onnx/measure_onnx.py"
    text = measuring.read_text(encoding="utf-8")
    assert text.count("\nROUNDS = 3\n") == 1
    measuring.write_text(text.replace("\nROUNDS = 3\n", "\nROUNDS = 1\n"), encoding="utf-8")
    write_readers_files(folder)
    write_hub(tmp_path / "hub")
    outside = ("VIRTUAL_ENV", "PYTHONPATH", "DATA_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    environment["KORNLU_URL"] = str(tmp_path / "nowhere")
    with Hub(tmp_path / "hub") as hub:
        environment |= hub.environment(tmp_path / "cache")
        with forking_python(folder, environment) as environment:
            yield House(folder, environment)


def paste_addition(house: House, block: Block) -> subprocess.CompletedProcess[str]:
    """Makes an addition of docs/extending.md where the page says, and trains with it."""
    options = ["--model_name_or_path", "models/e5-small-ko", "--no_test", "--max_steps", "1"]
    recipe = block.text.strip()
    places = {
        "LOSSES": ("training_nli.py", "LOSSES = {\n", block.text.partition("...")[2].strip("}\n ")),
        "    if form": ("common/formats.py", FEATHER_GOES_HERE, block.text),
        "        ko-sroberta-mine": ("train.sh", "case $1 in\n", f"{recipe}\n"),
    }
    file, mark, lines = next(places[start] for start in places if block.text.startswith(start))
    path = house.folder / file
    text = path.read_text(encoding="utf-8")
    assert text.count(mark) == 1, (file, mark)
    kept = "" if mark == FEATHER_GOES_HERE else mark
    path.write_text(text.replace(mark, f"{kept}{lines}\n"), encoding="utf-8")
    if file == "train.sh":
        shutil.copy(house.folder / "pairs.csv", house.folder / "mine.csv")
        return house.bash("bash train.sh ko-sroberta-mine")
    python = house.folder / ".venv/bin/python"
    if file == "training_nli.py":
        return house.run([python, file, *options, "--loss", "triplet"])
    path = house.folder / "common/formats.py"
    names = '("csv", "tsv", "json", "jsonl"'
    text = path.read_text(encoding="utf-8").replace(f"{names})", f'{names}, "feather")')
    path.write_text(text, encoding="utf-8")
    pd.read_csv(house.folder / "pairs.csv").to_feather(house.folder / "pairs.feather")
    return house.run([python, "training_sts.py", *options, "--train_file", "pairs.feather",
                      "--max_score", "5"])  # fmt: skip


def run_block(house: House, block: Block) -> subprocess.CompletedProcess[str]:
    """Runs a block as its page says: where, behind which others, with which encoder."""
    if block.page == "docs/extending.md":
        return paste_addition(house, block)
    if block.language != "bash":
        run = {"python": house.python, "js": house.node, "java": house.java}
        return run[block.language](block.text)
    if "--resume" in block.text:  # what a kill behind the last checkpoint leaves
        edit_json(house.folder / "output/sts/run.json", finished=None)
        (house.folder / "output/sts/modules.json").unlink()
    if "http.server" in block.text:
        return house.serve(block.text)
    # As on a fresh machine: with data of its own the demo refuses an int8 that loses points, and
    # what a tiny encoder loses on 48 pairs is chance.
    text = block.text.replace("bash train.sh demo", "DATA_DIR=nowhere bash train.sh demo")
    return house.bash(text)


def check_defects(house: House, shown: str, command: str) -> None:
    """The message of docs/own_data.md, from a file with its two defects."""
    path = house.folder / "pairs.csv"
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    lines[3] = "안녕하세요,반갑습니다,높음"
    lines[8] = "안녕, 하세요,반갑습니다,4.5"
    path.write_text("\n".join(lines), encoding="utf-8")
    done = house.bash(command)
    path.write_text(text, encoding="utf-8")
    assert done.returncode == 2 and done.stderr == shown


def test_every_block_of_the_pages_runs(
    house: House, tmp_path: Path, offline_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = {page: blocks_of(page) for page in PAGES}
    outputs = {str(b): b for page in PAGES for b in blocks[page] if not b.language}
    first, *rest = blocks["README.md"]
    samples_output = blocks["docs/demo.md"][1]
    defects = next(b for b in blocks["docs/own_data.md"] if not b.language)
    *_, search_output = (b for b in blocks["examples/README.md"] if not b.language)
    failed, left = [], {}

    # As on a fresh machine: no data, the real encoder.
    house.encoder(offline_encoder)
    demo = house.run(["bash", "-ec", first.text], threads=len(os.sched_getaffinity(0)))
    assert demo.returncode == 0, demo.stderr[-3000:]
    assert_alike(samples_output.text, demo.stdout)
    go_on = demo.stdout.splitlines()[-3:-1]
    done = house.bash("\n".join(go_on))
    assert done.returncode == 0, done.stderr
    ran = [str(first)]
    compared = [str(samples_output)]

    house.encoder(write_family(tmp_path / "tiny/e5-small-ko", bert(), model_max_length=512))
    house.data(stand_in_data(tmp_path / "KorNLUDatasets"))
    for page in PAGES:
        for name in ("embeddings", "vector_search_data", "output/mine"):  # of the page before
            shutil.rmtree(house.folder / name, ignore_errors=True)
        for block in [*(rest if page == "README.md" else blocks[page]), *commands_in_tables(page)]:
            why = {reason for start, reason in NOT_RUN.items() if block.text.startswith(start)}
            why |= {f"no {tool}" for tool in TOOLS if tool in block.text and not shutil.which(tool)}
            if block.language and why:
                left[str(block)] = min(why)
            if not block.language or why:
                continue
            start = time.time()
            done = run_block(house, block)
            print(f"{block}: {time.time() - start:.0f} s", file=sys.stderr)
            said = done.stdout + done.stderr
            if found := OUT_OF_REACH.search(said):
                left[str(block)] = f"out of reach: {found[0]}"
            elif done.returncode:
                last = said.splitlines()[-12:]
                failed.append("\n  ".join([f"{block}: status {done.returncode}", *last]))
            else:
                ran.append(str(block))

    check_defects(house, defects.text, blocks["docs/own_data.md"][0].text.split("\npython")[0])
    compared.append(str(defects))
    if KORNLU.is_dir():
        house.encoder(offline_encoder)
        house.data(KORNLU)
        shutil.rmtree(house.folder / "vector_search_data")
        search = next(b for b in blocks["examples/README.md"] if "--load" in b.text)
        assert_alike(search_output.text, house.bash(search.text).stdout)
        compared.append(str(search_output))
    for name, block in outputs.items():
        why = [reason for start, reason in NOT_COMPARED.items() if block.text.startswith(start)]
        if name not in compared:
            left[name] = why[0] if why else "no KorNLUDatasets here"
    with capsys.disabled():
        print(f"\n{len(ran)} blocks ran, {len(compared)} outputs were compared; left out:")
        print("\n".join(f"  {name}: {why}" for name, why in left.items()))
    assert not failed, "\n".join(failed)
