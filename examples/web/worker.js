/**
 * Loads the exported encoder and embeds sentences, off the page's thread.
 *
 * In: {url} once, the folder of the model; then {id, sentences}.
 * Out: {received, total} in bytes while files come (total is NaN where a server does not say),
 * {settings} when ready, {id, done} in sentences, {id, embeddings}, or {error}: a Korean message.
 */
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web/wasm";
import wasmUrl from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

const NAME = "model-int8"; // what `export_onnx.py --output .../model.onnx --quantize int8` writes
const BATCH_SIZE = 16;

/** tokenizers.js lacks this normalizer of SentencePiece models; these two steps are the same. */
const NMT = {
  type: "Sequence",
  normalizers: [
    {
      type: "Replace",
      pattern: { Regex: "[\\u0001-\\u0008\\u000B\\u000E-\\u001F\\u007F\\u008F\\u009F]" },
      content: "",
    },
    {
      type: "Replace",
      pattern: { Regex: "[\\t\\n\\f\\r\\u1680\\u200B-\\u200F\\u2028\\u2029\\u2581\\uFEFF\\uFFFD]" },
      content: " ",
    },
  ],
};

/** BERT sets each hanja apart, tokenizers.js only those of the Basic Multilingual Plane. */
const RARE_HANJA = {
  type: "Replace",
  pattern: {
    Regex:
      "[\\u{20000}-\\u{2A6DF}\\u{2A700}-\\u{2B81F}\\u{2B920}-\\u{2CEAF}\\u{2F800}-\\u{2FA1F}]",
  },
  content: " $& ",
};

/** Completes the normalizers of a tokenizer's JSON, while it is parsed. */
function complete(key, value) {
  if (value?.type === "Nmt") return NMT;
  if (value?.type === "BertNormalizer" && value.handle_chinese_chars) {
    return { type: "Sequence", normalizers: [RARE_HANJA, value] };
  }
  return value;
}

let session, settings, tokenizer, padId, unknownId;

/** Returns the response's headers' part: the body is read by `read`. */
async function open(url) {
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new Error(`파일을 받지 못했습니다: ${url}. 연결을 확인하고 새로 고치세요.`);
  }
  if (response.status === 404) throw missing(url);
  if (!response.ok) throw new Error(`파일을 받지 못했습니다: ${url} (HTTP ${response.status}).`);
  return response;
}

function missing(url) {
  if (url.endsWith(".wasm")) {
    return new Error(`페이지의 파일이 없습니다: ${url}. npm run build로 다시 만드세요.`);
  }
  return new Error(
    `모델 파일이 없습니다: ${url}. onnx/export_onnx.py로 만들어 model 폴더에 넣고 새로 고치세요.`,
  );
}

function foreign(url, why) {
  return new Error(`onnx/export_onnx.py가 만든 온전한 파일이 아닙니다: ${url} (${why})`);
}

/** Returns the body's bytes; `count` is told of each part's. */
async function read(response, count) {
  const counted = response.body.pipeThrough(
    new TransformStream({
      transform(part, controller) {
        count(part.length);
        controller.enqueue(part);
      },
    }),
  );
  let bytes;
  try {
    bytes = new Uint8Array(await new Response(counted).arrayBuffer());
  } catch {
    throw new Error(`다운로드가 끊겼습니다: ${response.url}. 새로 고치세요.`);
  }
  // Many servers answer with a page where there is no file; ours never begin so.
  if (bytes[0] === "<".charCodeAt(0)) throw missing(response.url);
  return bytes;
}

function parse(bytes, url, reviver) {
  try {
    return JSON.parse(new TextDecoder().decode(bytes), reviver);
  } catch (error) {
    throw foreign(url, error.message);
  }
}

async function load(folder) {
  const url = (ending) => new URL(NAME + ending, folder).href;
  settings = parse(await read(await open(url(".json")), () => {}), url(".json"));
  if (settings?.output !== "sentence_embedding") throw foreign(url(".json"), "output");

  const urls = [url(".tokenizer.json"), url(".onnx"), new URL(wasmUrl, import.meta.url).href];
  const responses = await Promise.all(urls.map(open));
  let total = 0;
  for (const { headers } of responses) {
    // The length of a compressed answer is not that of its content.
    const known = headers.has("Content-Length") && !headers.has("Content-Encoding");
    total += known ? Number(headers.get("Content-Length")) : NaN;
  }
  let received = 0;
  const count = (bytes) => postMessage({ received: (received += bytes), total });
  const contents = await Promise.all(responses.map((response) => read(response, count)));

  const definition = parse(contents[0], urls[0], complete);
  try {
    tokenizer = new Tokenizer(definition, {});
    padId = definition.padding.pad_id;
    // Unigram models know theirs; of the others some leave a place without an id.
    unknownId = definition.model.vocab[definition.model.unk_token];
  } catch (error) {
    throw foreign(urls[0], error.message);
  }
  ort.env.wasm.numThreads = 1; // more need headers that a plain static server does not send
  ort.env.wasm.wasmBinary = contents[2];
  try {
    session = await ort.InferenceSession.create(contents[1], { executionProviders: ["wasm"] });
  } catch (error) {
    if (/no available backend/i.test(error.message)) {
      throw new Error(`이 브라우저에서는 모델을 실행할 수 없습니다: ${error.message}`);
    }
    throw foreign(urls[1], error.message);
  }
  if (!session.outputNames.includes("sentence_embedding")) throw foreign(urls[1], "output");
}

/** Returns the token ids of a sentence; a long one is cut before its closing tokens, if any. */
function tokenize(sentence) {
  const encode = (options) => {
    const found = tokenizer.encode(settings.prompt + sentence, options);
    return found.ids.map((id) => id ?? unknownId);
  };
  const ids = encode();
  const surplus = ids.length - settings.max_seq_length;
  if (surplus <= 0) return ids;
  const own = encode({ add_special_tokens: false });
  const added = ids.length - own.length;
  let opening = 0;
  while (opening < added && own.some((id, i) => id !== ids[opening + i])) opening++;
  const end = opening + own.length;
  return [...ids.slice(0, end - surplus), ...ids.slice(end)];
}

/** Returns embeddings (Float32Array, unit length) of rows of token ids, padded to the longest. */
async function run(rows) {
  const length = Math.max(...rows.map((ids) => ids.length));
  const values = {
    input_ids: (ids, place) => (place < ids.length ? ids[place] : padId),
    attention_mask: (ids, place) => (place < ids.length ? 1 : 0),
    token_type_ids: () => 0,
  };
  const feeds = {};
  for (const name of session.inputNames) {
    // Models differ in their inputs: BERT has token types, RoBERTa has none.
    const data = new BigInt64Array(rows.length * length);
    rows.forEach((ids, row) => {
      for (let place = 0; place < length; place++) {
        data[row * length + place] = BigInt(values[name](ids, place));
      }
    });
    feeds[name] = new ort.Tensor("int64", data, [rows.length, length]);
  }
  // int8 embeddings differ a little from Python's: in WebAssembly LayerNormalization, MatMul,
  // Softmax and Erf differ in the last bits of float32, and QuantizeLinear makes a whole step of
  // that where a value lies between two. From the same values the int8 operators give the same.
  const { sentence_embedding: output } = await session.run(feeds, ["sentence_embedding"]);
  return rows.map((_, row) => {
    const embedding = output.data.slice(row * output.dims[1], (row + 1) * output.dims[1]);
    const norm = Math.hypot(...embedding);
    return embedding.map((value) => value / norm);
  });
}

async function embed({ id, sentences }) {
  const rows = sentences.map(tokenize);
  // Sentences of like length share a batch: less padding.
  const order = [...rows.keys()].sort((a, b) => rows[a].length - rows[b].length);
  const embeddings = new Array(rows.length);
  for (let start = 0; start < order.length; start += BATCH_SIZE) {
    const batch = order.slice(start, start + BATCH_SIZE);
    const found = await run(batch.map((place) => rows[place]));
    batch.forEach((place, row) => (embeddings[place] = found[row]));
    postMessage({ id, done: start + batch.length });
  }
  postMessage({ id, embeddings });
}

let last = Promise.resolve(); // a session runs one batch at a time
onmessage = ({ data }) => {
  last = last
    .then(() => (data.url ? load(data.url).then(() => postMessage({ settings })) : embed(data)))
    .catch((error) => postMessage({ id: data.id, error: error.message }));
};
