/** The page: its form, its progress and its results. worker.js does the work. */

const SHOWN = 20; // results at most
const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("ko");
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

const waiting = new Map(); // number of a request -> its promise's functions and its sentences
const known = new Map(); // sentence -> embedding: a new query embeds itself alone
let worker;
let requests = 0;
let searches = 0;

// --- What the page says ---------------------------------------------------------------------

function showError(message, field) {
  at("error").textContent = message;
  for (const name of ["query", "corpus"]) {
    at(name).ariaInvalid = String(at(name) === field);
  }
  field?.focus();
}

/** Shows what is being done, and how far it is: `value` of `max`, NaN where nobody knows. */
function showWork(text, value, max) {
  at("work").hidden = false;
  at("work-text").textContent = text;
  if (max > 0) Object.assign(at("work-bar"), { max, value });
  else at("work-bar").removeAttribute("value");
}

function showResults(scored) {
  const rows = scored.map(({ sentence, score }) => {
    const row = document.createElement("li");
    const [text, bar, fill, value] = ["span", "span", "span", "span"].map((name) =>
      document.createElement(name),
    );
    text.className = "sentence";
    text.textContent = sentence;
    bar.className = "bar";
    bar.ariaHidden = "true";
    fill.style.width = `${100 * Math.min(Math.max(score, 0), 1)}%`;
    bar.append(fill);
    value.className = "score";
    value.textContent = score.toFixed(4);
    row.append(text, bar, value);
    return row;
  });
  at("results").replaceChildren(...rows);
}

// --- The worker -----------------------------------------------------------------------------

function fail(message) {
  at("work").hidden = true;
  at("status").textContent = "";
  showError(message);
}

function start() {
  if (typeof WebAssembly === "undefined") {
    fail(
      "이 브라우저에는 WebAssembly가 없거나 꺼져 있어 모델을 실행할 수 없습니다. " +
        "최신 Chrome, Edge, Firefox, Safari로 여세요.",
    );
    return;
  }
  at("status").textContent = "모델을 받는 중입니다.";
  showWork("모델을 받는 중");
  worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => receive(data);
  worker.onerror = (event) => fail(`실행할 수 없습니다: ${event.message ?? "worker.js"}`);
  worker.postMessage({ url: new URL("model/", document.baseURI).href });
}

function receive({ received, total, settings, id, done, embeddings, error }) {
  const request = waiting.get(id);
  if (error && request) {
    waiting.delete(id);
    request.reject(new Error(error));
  } else if (error) {
    fail(error);
  } else if (settings) {
    ready(settings);
  } else if (embeddings) {
    waiting.delete(id);
    request.resolve(embeddings);
  } else if (done) {
    const all = request.sentences.length;
    showWork(`문장을 읽는 중: ${number.format(all)}개 중 ${number.format(done)}개`, done, all);
  } else if (received === total) {
    showWork("모델을 여는 중"); // the last bytes are here
  } else {
    const of = total > 0 ? ` / ${megabytes(total)}` : "";
    showWork(`모델을 받는 중: ${megabytes(received)}${of} MB`, received, total);
  }
}

function ready({ model, precision, dimension, licence }) {
  at("work").hidden = true;
  at("submit").disabled = false;
  at("model").textContent = `모델: ${model} (${precision}, ${dimension}차원, 라이선스 ${licence})`;
  at("status").textContent = "검색할 수 있습니다.";
  search();
}

/** Returns the embeddings of the sentences: Float32Arrays of unit length. */
function embed(sentences) {
  return new Promise((resolve, reject) => {
    const id = ++requests;
    waiting.set(id, { resolve, reject, sentences });
    worker.postMessage({ id, sentences });
  });
}

// --- Search ---------------------------------------------------------------------------------

async function search() {
  const query = at("query").value.trim();
  const lines = at("corpus").value.split("\n");
  const corpus = [...new Set(lines.map((line) => line.trim()).filter(Boolean))];
  if (!query) return showError("찾을 문장을 입력하세요.", at("query"));
  if (!corpus.length) return showError("문장을 한 줄에 하나씩 넣으세요.", at("corpus"));
  showError("");

  const mine = ++searches;
  const started = performance.now();
  const unknown = [...new Set([query, ...corpus])].filter((sentence) => !known.has(sentence));
  try {
    const embeddings = unknown.length ? await embed(unknown) : [];
    unknown.forEach((sentence, place) => known.set(sentence, embeddings[place]));
  } catch (error) {
    return fail(`임베딩하지 못했습니다: ${error.message}`);
  }
  if (mine !== searches) return; // a later search is on its way
  at("work").hidden = true;

  const target = known.get(query);
  const scored = corpus.map((sentence) => {
    const score = known.get(sentence).reduce((sum, value, i) => sum + value * target[i], 0);
    return { sentence, score };
  });
  scored.sort((a, b) => b.score - a.score);
  showResults(scored.slice(0, SHOWN));
  const took = number.format(Math.round(performance.now() - started));
  const shown = corpus.length > SHOWN ? ` 가운데 가장 비슷한 ${SHOWN}개` : "";
  at("status").textContent =
    `“${query}”와의 코사인 유사도: ${number.format(corpus.length)}문장${shown}, ${took} ms`;
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
for (const button of document.querySelectorAll(".examples button")) {
  button.addEventListener("click", () => {
    at("query").value = button.textContent;
    if (!at("submit").disabled) search();
  });
}
at("restore").addEventListener("click", () => {
  at("corpus").value = at("corpus").defaultValue;
  if (!at("submit").disabled) search();
});

window.koSearch = { embed }; // for the console and the tests
start();
