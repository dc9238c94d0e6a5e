"""The pages: short, linked, with commands that exist and numbers that come from files."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from common.command_line import REPOSITORY, read_json
from common.experiment_log import read_comparisons

FOLDERS = ("", "docs", "examples", "onnx", "results", "measurements")
PAGES = sorted(page for name in FOLDERS for page in (REPOSITORY / name).glob("*.md"))
KOREAN = [page for page in PAGES if page.name != "experiments.md"]
# What the commands before, or the reader, make.
MADE = (
    "models/e5-small-ko",
    "output/",
    "onnx/models/",
    "KorNLUDatasets/",
    "examples/web/public/",
    "klue-sts-v1.1/",
)
READERS = {
    "corpus.jsonl",
    "pairs.csv",
    "questions.jsonl",
    "OLD/bin/python",
    "OV/bin/python",
    "RUN.onnx",
    "이름.onnx",
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", without_code(text_of(page)), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def typed(text: str) -> str:
    """What is written by hand: the page without generated parts and code."""
    generated = r"<!-- results:([\w-]+) -->.*?<!-- /results:\1 -->"
    return without_code(re.sub(generated, "", text, flags=re.S))


def commands(text: str) -> list[str]:
    """The python and bash commands of a page: in fenced blocks, and alone between backticks."""
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    lines = blocks.replace("\\\n", " ").splitlines()
    lines += [" ".join(span.split()) for span in re.findall(r"`((?:python|bash) [^`]+)`", text)]
    lines = [re.sub(r" +#.*", "", line) for line in lines]
    return [line for line in lines if re.match(r"(python|bash|torchrun) ", line)]


def test_the_readme_stays_short() -> None:
    assert len(text_of(REPOSITORY / "README.md").splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = without_code(text_of(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_links_to_an_anchor_are_checked() -> None:
    assert {"english", "하고-싶은-일--명령", "데이터와-라이선스"} <= anchors(
        REPOSITORY / "README.md"
    )


@pytest.mark.parametrize("page", KOREAN, ids=name_of)
def test_commands_name_files_and_options_that_exist(page: Path) -> None:
    for command in commands(text_of(page)):
        words = command.split()
        script = next((word for word in words[1:] if word.endswith((".py", ".sh"))), None)
        if script is None:  # python -m http.server
            assert words[1] in ("-", "-m"), command
            continue
        source = text_of(REPOSITORY / script)
        if script.startswith("training_"):
            source += text_of(REPOSITORY / "common/options.py")
        for option in re.findall(r" (--[\w]+)", command.partition(script)[2]):
            assert f'"{option}"' in source, f"{command}: {option}"
        for word in words:
            is_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)+|[\w-]+\.(csv|jsonl|onnx|txt)", word)
            if not is_path or word in READERS or word.startswith(MADE):
                continue
            is_hub = words[words.index(word) - 1] in ("--model", "--model_name_or_path")
            assert (REPOSITORY / word).exists() or is_hub, f"{command}: {word}"


def test_the_commands_of_the_readme_are_seen() -> None:
    found = commands(text_of(REPOSITORY / "README.md"))
    assert "bash train.sh demo" in found
    assert any(line.startswith("python training_sts.py ") and "output/v2" in line for line in found)
    assert "python benchmark.py --update_readme" in found


def test_the_readmes_demo_output_is_the_one_of_the_demos_page() -> None:
    block = r"<!-- demo output{} -->\n```\n(.*?)```"
    (shown,) = re.findall(block.format(""), text_of(REPOSITORY / "README.md"), re.S)
    (whole,) = re.findall(
        block.format(", default data"), text_of(REPOSITORY / "docs/demo.md"), re.S
    )
    assert len(shown.splitlines()) > 3 and set(shown.splitlines()) <= set(whole.splitlines())


# --- Numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_of_numbers_are_generated(page: Path) -> None:
    rows = re.findall(r"^\|(.+)\|$", typed(text_of(page)), re.M)
    cells = [cell.strip() for row in rows for cell in row.split("|")]
    measured = re.compile(r"\**[-+]?[\d,]+\.\d+\**( [\[(].+[\])])?")
    assert [cell for cell in cells if measured.fullmatch(cell)] == []


def stored_scores() -> set[str]:
    """All scores that a file of this repository holds, as pages write them."""
    found: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                collect(each)
        elif isinstance(value, float) and abs(value) <= 1:
            found.add(f"{100 * value:.2f}")
        elif isinstance(value, float):
            found.add(f"{value:.2f}")

    for folder in ("results", "results/experiments", "results/onnx", "measurements"):
        for path in (REPOSITORY / folder).glob("*.json"):
            collect(read_json(path))
    for path in (REPOSITORY / "measurements").glob("*.txt"):
        found |= set(re.findall(r"\d+\.\d\d", text_of(path)))
    return found | set(re.findall(r"# (\d+\.\d\d)$", text_of(REPOSITORY / "train.sh"), re.M))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_typed_scores_are_in_a_file(page: Path) -> None:
    scores = re.findall(r"(?<![\d.])[4-9]\d\.\d\d(?![\d.])", typed(text_of(page)))
    assert set(scores) <= stored_scores()


@pytest.mark.parametrize("page", ["README.md", "docs/v2.md"])
def test_typed_differences_are_those_that_were_printed(page: str) -> None:
    printed = read_comparisons(REPOSITORY / "measurements/v2.txt")
    differences = {(each.difference, *each.interval) for each in printed}
    pattern = r"(\+\d\.\d\d)\**\s+\[(-?\d\.\d\d), (-?\d\.\d\d)\]"
    found = re.findall(pattern, typed(text_of(REPOSITORY / page)))
    assert found and set(found) <= differences


def test_typed_costs_are_those_of_the_log() -> None:
    rows = {path.stem: read_json(path) for path in (REPOSITORY / "results/experiments").glob("*")}
    text = text_of(REPOSITORY / "docs/v2.md") + text_of(REPOSITORY / "docs/training.md")
    original, fast, slow = (
        rows[name]["training_cpu_seconds"]
        for name in ("cosine-777-one-thread", "quick-200", "quick-200-fp32")
    )
    for loop in (fast, slow):
        assert f"{loop / original:.2f}배" in text and f"{loop:,.0f} CPU초" in text
    assert f"{original:,.0f} CPU초" in text
    staged = sum(rows[name]["training_cpu_seconds"] for name in ("nli-v2", "staged-v2-777"))
    assert f"{staged:,.0f} CPU초" in text
    assert f"{rows['multi-task-777']['training_cpu_seconds']:,.0f} CPU초" in text
    for run in ("cosine-777-one-thread", "quick-200", "quick-200-fp32", "nli-v2", "multi-task-777"):
        assert f"{rows[run]['peak_memory_mb']:,} MB" in text, run


def test_the_ratios_to_openvino_are_those_of_the_file() -> None:
    text = text_of(REPOSITORY / "onnx/README.md")
    for name in ("openvino-avx2", "openvino"):
        rows = read_json(REPOSITORY / f"measurements/{name}.json")["sentences_per_second"]
        ratios = [
            rows["onnxruntime int8"][key]
            / max(row[key] for name, row in rows.items() if "Open" in name)
            for key in ("batch_32", "batch_1")
        ]
        assert "{:.1f}배(배치 32), {:.1f}배(배치 1)".format(*ratios) in text


def test_the_gpus_figures_are_those_of_the_file() -> None:
    rows = read_json(REPOSITORY / "measurements/size.json")["gpu"]["rows"]
    bf16, library = rows["nli, bf16"], rows["nli, bf16, library"]
    ratio = bf16["steps_a_second"] / library["steps_a_second"]
    text = text_of(REPOSITORY / "docs/training.md")
    assert f"같은 bf16의 라이브러리 트레이너의 {ratio:.2f}배" in text
    steps = bf16["steps_measured"], library["steps_measured"]
    assert "NLI를 {}스텝(라이브러리는 {}스텝)".format(*steps) in text
    hours, memory = bf16["hours_of_the_whole_recipe"], bf16["peak_gpu_memory_mb"] / 1000
    kept = bf16["peak_gpu_reserved_mb"] / 1000
    found = f"약 {hours:.2f}시간, GPU 메모리 {kept:.1f} GB(그 가운데 텐서가 {memory:.1f} GB)"
    assert found in text_of(REPOSITORY / "README.md")


# --- Words -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", KOREAN, ids=name_of)
def test_one_word_for_one_thing(page: Path) -> None:
    """측정 and 비교, 학습, 에포크, Spearman: never their doubles."""
    doubles = r"에폭|훈련|스피어만|견주|견준|재지|잽니다|쟀|(?<!존)재었|길들|흔들림|나란히"
    assert re.findall(doubles, without_code(text_of(page))) == []


# --- Code ------------------------------------------------------------------------------------


def test_the_readmes_python_runs(encoder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(encoder, tmp_path / "models/e5-small-ko")
    (code,) = re.findall(r"^```python\n(.*?)^```", text_of(REPOSITORY / "README.md"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert len(names["embeddings"]) == 2 and "tensor" in capsys.readouterr().out


def test_the_pictures_that_pages_show_are_tracked() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git here")
    shown = {
        (page.parent / target).resolve().relative_to(REPOSITORY)
        for page in PAGES
        for target in re.findall(r'(?:!\[[^\]]*\]\(|<img src=")([^)"]+\.png)', text_of(page))
    }
    assert shown and shown <= set(map(Path, done.stdout.splitlines()))
