"""The page examples/web, built from its lock file and used in a headless Chromium."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
]

REPOSITORY = Path(__file__).resolve().parent.parent
WEB = REPOSITORY / "examples/web"
sys.path += [str(REPOSITORY / "examples")]

from semantic_search import CORPUS, QUERIES  # noqa: E402

from common.exported import embed as embed_sentences  # noqa: E402

NAMES = [f"model-int8{ending}" for ending in (".onnx", ".tokenizer.json", ".json")]
MIXED = [
    *CORPUS, *QUERIES, "가", "KorSTS 2020년 3월, 5,749쌍!", "Hello, world", "😀 웃는 얼굴 👨‍👩‍👧",
    "大韓民國의 首都는 서울이다", "ㅋㅋㅋ ㅠㅠ", "한\u200b남자\ufeff가\t빵을\u0007 먹는다", 
    "ﾊﾝｶｸ ① ㎏", "아주 긴 문장은 끝에서 잘린다. " * 100,
]  # fmt: skip


# --- The build, the models, the servers ------------------------------------------------------


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `npm run build` writes, from the lock file alone."""
    folder = tmp_path_factory.mktemp("web") / "web"
    not_committed = shutil.ignore_patterns("node_modules", "dist", "model")
    shutil.copytree(WEB, folder, ignore=not_committed)
    for command in (["npm", "ci"], ["npm", "run", "build"]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def named(exports: Path, name: str, folder: Path) -> Path:
    """Copies the fp32 and int8 files of an export under the names that the page reads."""
    for target in [*NAMES, *(name.replace("-int8", "") for name in NAMES)]:
        shutil.copy(exports / target.replace("model", name, 1), folder / target)
    return folder


@pytest.fixture(scope="module")
def real(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named(exports, "e5-small-ko", tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def roberta(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder without token types: its session asks for two inputs, not three."""
    return named(exports, "roberta", tmp_path_factory.mktemp("roberta"))


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class FilesOrIndex(Files):
    """As many servers of single-page programs: a missing file is answered with the page."""

    def send_head(self) -> object:
        if not Path(self.translate_path(self.path)).exists():
            self.path = "/index.html"
        return super().send_head()


@contextmanager
def served(
    build: Path, folder: Path, model: Path | None, handler: type[Files] = Files
) -> Iterator[str]:
    """Serves the build, with this model's files, from the folder; yields its address."""
    site = shutil.copytree(build, folder / "site")
    if model:
        (site / "model").mkdir()
        for name in NAMES:
            shutil.copy(model / name, site / "model")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def address(build: Path, real: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(build, tmp_path_factory.mktemp("served"), real) as url:
        yield url


@pytest.fixture(scope="module")
def launch() -> Iterator[object]:
    """Starts browsers: `launch(*flags)`. They reach this machine alone."""
    with playwright.sync_playwright() as driver:
        browsers = []

        def call(*flags: str) -> object:
            # As root, as in most containers, Chromium has no sandbox.
            flags = (
                "--no-sandbox",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                *flags,
            )
            browsers.append(driver.chromium.launch(executable_path=CHROMIUM, args=list(flags)))
            return browsers[-1]

        yield call
        for browser in browsers:
            browser.close()


@pytest.fixture(scope="module")
def browser(launch: object) -> object:
    return launch()


class Visit:
    """A page, what it asked for and what it complained about."""

    def __init__(self, browser: object, **options: object) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console",
            lambda line: line.type in ("error", "warning") and self.complaints.append(line.text),
        )

    def wait_for(self, query: str) -> list[tuple[str, float]]:
        """Waits for the results of a query; returns sentences and scores as they are shown."""
        playwright.expect(self.page.locator("#status")).to_contain_text(
            f"“{query}”", timeout=60_000
        )
        assert self.page.locator("#error").inner_text() == ""
        rows = self.page.locator("#results > li")
        sentences = rows.locator(".sentence").all_inner_texts()
        scores = [float(text) for text in rows.locator(".score").all_inner_texts()]
        return list(zip(sentences, scores, strict=True))

    def error(self) -> str:
        """Waits for an error on the page and returns it."""
        self.page.wait_for_selector("#error:not(:empty)")
        assert self.page.locator("#submit").is_disabled()
        assert self.page.locator("#work").is_hidden()
        return self.page.locator("#error").inner_text()


@pytest.fixture
def visit(browser: object, address: str) -> Iterator[Visit]:
    """A page that has to stay without complaint and on its own server."""
    made = Visit(browser)
    yield made
    made.page.close()
    assert made.complaints == []
    assert made.requests
    assert [url for url in made.requests if not url.startswith((address, "data:"))] == []


def embed(model: Path, sentences: list[str]) -> np.ndarray:
    """Returns what onnxruntime of Python makes of the same file: float32, unit length."""
    session = onnxruntime.InferenceSession(model / NAMES[0])
    tokenizer = Tokenizer.from_file(str(model / NAMES[1]))
    prompt = json.loads((model / NAMES[2]).read_text(encoding="utf-8"))["prompt"]
    prompted = [prompt + sentence for sentence in sentences]
    found = embed_sentences(session, tokenizer, prompted, batch_size=1)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def ranking(model: Path, query: str, corpus: list[str]) -> list[tuple[str, float]]:
    first, *rest = embed(model, [query, *corpus])
    scores = [float(first @ embedding) for embedding in rest]
    return sorted(zip(corpus, scores, strict=True), key=lambda pair: -pair[1])


def assert_same(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    python = dict(expected)
    assert sorted(sentence for sentence, _ in found) == sorted(python)
    shown = [score for _, score in found]
    assert shown == sorted(shown, reverse=True)
    # int8: see test_vectors_equal_those_of_python
    assert shown == pytest.approx([python[sentence] for sentence, _ in found], abs=0.01)
    # On some CPUs neighbours that score all but the same change places.
    for (first, _), (second, _) in itertools.combinations(found, 2):
        assert python[first] > python[second] - 0.003


def embed_in(page: object, sentences: list[str]) -> np.ndarray:
    code = "async (all) => (await koSearch.embed(all)).map((one) => [...one])"
    return np.array(page.evaluate(code, sentences))


# --- What the page finds ---------------------------------------------------------------------


def test_the_nine_sentences_are_ranked_as_in_python(visit: Visit, address: str, real: Path) -> None:
    visit.page.goto(address)
    assert visit.page.locator("#corpus").input_value().split("\n") == CORPUS
    assert visit.page.locator(".examples button").all_inner_texts() == QUERIES
    assert_same(visit.wait_for(QUERIES[0]), ranking(real, QUERIES[0], CORPUS))
    for query in QUERIES[1:]:
        visit.page.get_by_role("button", name=query).click()
        assert_same(visit.wait_for(query), ranking(real, query, CORPUS))
    bars = visit.page.locator("#results .bar")
    widths = bars.evaluate_all(
        "bars => bars.map(bar => bar.firstChild.offsetWidth / bar.clientWidth)"
    )
    scores = [float(text) for text in visit.page.locator("#results .score").all_inner_texts()]
    assert widths == pytest.approx(scores, abs=0.02)
    # The model and the WebAssembly file come from here, and are seen here.
    paths = {url.removeprefix(address) for url in visit.requests}
    assert {f"model/{name}" for name in NAMES} <= paths
    assert any(path.endswith(".wasm") for path in paths)


def test_vectors_equal_those_of_python(visit: Visit, address: str, real: Path) -> None:
    visit.page.goto(address)
    found = embed_in(visit.page, MIXED)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    expected = embed(real, MIXED)
    # Most are equal to 1e-5. LayerNormalization, MatMul, Softmax and Erf compute in float32 and
    # differ in the last bits (by less than 2e-6 of the largest value). Where a value lies between
    # two steps of int8, QuantizeLinear then gives it the other one. The int8 steps themselves are
    # the same in both: tests/test_node.py compares operator by operator.
    assert np.quantile(np.abs(found - expected).max(1), 0.5) < 1e-3
    assert (found * expected).sum(1).min() > 0.995


def test_vectors_of_the_fp32_file_equal_those_of_python(
    browser: object, build: Path, real: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in NAMES:
        shutil.copy(real / name.replace("-int8", ""), model / name)
    with served(build, tmp_path, model) as url:
        visit = Visit(browser)
        visit.page.goto(url)
        found = embed_in(visit.page, MIXED)
        visit.page.close()
    np.testing.assert_allclose(found, embed(model, MIXED), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "한 남자 "])
def test_a_session_of_two_inputs_and_a_prompt(
    browser: object, build: Path, roberta: Path, tmp_path: Path, prompt: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in NAMES:
        shutil.copy(roberta / name, model)
    settings = json.loads((model / NAMES[2]).read_text(encoding="utf-8"))
    assert "token_type_ids" not in settings["inputs"]
    (model / NAMES[2]).write_text(json.dumps(settings | {"prompt": prompt}), encoding="utf-8")
    with served(build, tmp_path, model) as url:
        visit = Visit(browser)
        visit.page.goto(url)
        sentences = [*CORPUS, *QUERIES, "모르는 글자 뷁 😀"]
        found = embed_in(visit.page, sentences)
        visit.page.close()
    assert visit.complaints == []
    expected = embed(model, sentences)
    assert np.quantile(np.abs(found - expected).max(1), 0.5) < 1e-3
    assert (found * expected).sum(1).min() > 0.995


def test_pasted_lines(visit: Visit, address: str, real: Path) -> None:
    lines = ["서울은 한국의 수도다.", "<b>부산</b>은 항구 & 도시다.", "고양이가 소파에서 잔다."]
    visit.page.goto(address)
    visit.wait_for(QUERIES[0])
    corpus = visit.page.locator("#corpus")
    corpus.press("Control+A")
    visit.page.keyboard.insert_text(f"  {lines[0]}\n\n{lines[1]} \n{lines[2]}\n{lines[0]}\n")
    visit.page.locator("#query").fill("한국에서 가장 큰 도시")
    visit.page.locator("#query").press("Enter")
    found = visit.wait_for("한국에서 가장 큰 도시")
    assert_same(found, ranking(real, "한국에서 가장 큰 도시", lines))
    visit.page.locator("#restore").click()
    visit.page.wait_for_function("document.querySelectorAll('#results li').length === 9")


def test_a_thousand_lines_show_the_best_twenty(visit: Visit, address: str) -> None:
    visit.page.goto(address)
    visit.wait_for(QUERIES[0])
    visit.page.locator("#corpus").fill("\n".join(f"{i}번째 문장" for i in range(1000)))
    visit.page.locator("#query").fill("500번째 문장")
    visit.page.locator("#query").press("Enter")
    found = visit.wait_for("500번째 문장")
    assert len(found) == 20 and found[0] == ("500번째 문장", 1.0)
    assert "1,000문장 가운데 가장 비슷한 20개" in visit.page.locator("#status").inner_text()


# --- How it is used --------------------------------------------------------------------------


def test_the_keyboard_is_enough(visit: Visit, address: str) -> None:
    page = visit.page
    page.goto(address)
    visit.wait_for(QUERIES[0])
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid", reached
    assert reached == [
        "query", "submit", "BUTTON", "BUTTON", "BUTTON", "corpus", "restore", "A"
    ]  # fmt: skip
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # the second example
    visit.wait_for(QUERIES[1])
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.insert_text("말을 타는 사람")
    page.keyboard.press("Enter")
    visit.wait_for("말을 타는 사람")


def test_empty_fields_are_named_in_the_error(visit: Visit, address: str) -> None:
    page = visit.page
    page.goto(address)
    visit.wait_for(QUERIES[0])
    for field, message in (
        ("query", "찾을 문장을 입력하세요."),
        ("corpus", "문장을 한 줄에 하나씩 넣으세요."),
    ):
        page.locator(f"#{field}").fill(" ")
        page.locator("#submit").click()
        assert page.locator("#error").inner_text() == message
        assert page.evaluate("document.activeElement.id") == field
        assert page.locator("[aria-invalid=true]").get_attribute("id") == field
        page.locator(f"#{field}").fill("문장")
        page.locator("#submit").click()
        playwright.expect(page.locator("#error")).to_be_empty()


def test_roles_and_names(visit: Visit, address: str) -> None:
    page = visit.page
    page.goto(address)
    visit.wait_for(QUERIES[0])
    assert page.locator("html").get_attribute("lang") == "ko"
    for role, name in (
        ("searchbox", "찾을 문장"),
        ("textbox", "이 가운데에서"),
        ("button", "검색"),
        ("region", "결과"),
    ):
        assert page.get_by_role(role, name=name).count() == 1, name
    assert page.locator("ol#results").get_by_role("listitem").count() == 9
    assert page.get_by_role("status").count() == page.get_by_role("alert").count() == 1


def test_progress_counts_the_bytes(visit: Visit, address: str, real: Path) -> None:
    visit.page.add_init_script("""
        window.seen = [];
        addEventListener("DOMContentLoaded", () => {
            const node = document.getElementById("work-text");
            new MutationObserver(() => seen.push(node.textContent)).observe(
                node, {childList: true});
        });""")
    visit.page.goto(address)
    visit.wait_for(QUERIES[0])
    seen = visit.page.evaluate("seen")
    pairs = [re.fullmatch(r"모델을 받는 중: ([\d.]+) / ([\d.]+) MB", text) for text in seen]
    received = [float(pair[1]) for pair in pairs if pair]
    assert len(received) > 3 and received == sorted(received)
    size = sum((real / name).stat().st_size for name in NAMES[:2]) / 1e6
    (total,) = {float(pair[2]) for pair in pairs if pair}
    assert total == pytest.approx(size + 14, abs=3)
    assert "모델을 여는 중" in seen
    assert "문장을 읽는 중: 10개 중 10개" in seen


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_nothing_is_wider_than_the_screen(visit: Visit, address: str, width: int) -> None:
    page = visit.page
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(address)
    visit.wait_for(QUERIES[0])
    page.locator("#corpus").fill(
        "띄어쓰기없는아주긴문장" * 20 + "\nhttps://example.org/" + "a" * 200
    )
    page.locator("#query").fill("긴" * 100)
    page.locator("#query").press("Enter")
    visit.wait_for("긴" * 100)
    wide, screen = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= screen == width


# --- What it says when something is missing --------------------------------------------------


@pytest.mark.parametrize("handler", [Files, FilesOrIndex])
def test_without_a_model(
    browser: object, build: Path, tmp_path: Path, handler: type[Files]
) -> None:
    with served(build, tmp_path, None, handler) as url:
        visit = Visit(browser)
        visit.page.goto(url)
        message = visit.error()
        visit.page.close()
    assert message.startswith("모델 파일이 없습니다") and "model/model-int8.json" in message
    assert "export_onnx.py" in message


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_named(
    browser: object, build: Path, roberta: Path, tmp_path: Path, name: str
) -> None:
    with served(build, tmp_path, roberta) as url:
        path = tmp_path / "site/model" / name
        path.write_bytes(path.read_bytes()[:200])
        visit = Visit(browser)
        visit.page.goto(url)
        message = visit.error()
        visit.page.close()
    assert "온전한 파일이 아닙니다" in message and f"model/{name} " in message


def test_without_webassembly(launch: object, address: str) -> None:
    visit = Visit(launch("--js-flags=--jitless"))  # which leaves WebAssembly out
    visit.page.goto(address)
    assert "WebAssembly" in visit.error()
    assert visit.complaints == []
    assert not any("model/" in url for url in visit.requests)  # nothing fetched in vain


def test_without_javascript(browser: object, address: str) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(address)
    # Where scripts run, what is in <noscript> is no element.
    assert "JavaScript가 필요합니다" in page.locator("noscript p").inner_html()
    page.close()


# --- What is committed -----------------------------------------------------------------------


def test_the_lock_file_names_the_public_registry() -> None:
    lock = json.loads((WEB / "package-lock.json").read_text(encoding="utf-8"))
    packages = [entry for place, entry in lock["packages"].items() if place]
    assert packages
    for entry in packages:
        assert entry["resolved"].startswith("https://registry.npmjs.org/")
        assert entry["integrity"].startswith("sha512-")
