/**
 * Embeds sentences with a file that onnx/export_onnx.py wrote.
 *
 *     import { load } from "./sentence-encoder.js";
 *     const encoder = await load("e5-small-ko.onnx");
 *     const [embedding] = await encoder.encode(["한 남자가 음식을 먹는다."]); // Float32Array
 *
 * Beside NAME.onnx lie NAME.json (the prompt, the longest input) and NAME.tokenizer.json.
 */
import { readFile } from "node:fs/promises";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const OUTPUT = "sentence_embedding";
const BATCH_SIZE = 32;

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

async function readJson(path, reviver) {
  let text;
  try {
    text = await readFile(path, "utf8");
  } catch {
    throw new Error(`${path}: no such file; onnx/export_onnx.py writes three`);
  }
  try {
    return JSON.parse(text, reviver);
  } catch (error) {
    throw new Error(`${path}: no JSON of onnx/export_onnx.py: ${error.message}`);
  }
}

/**
 * Loads an exported file; `threads` 0: as many as there are cores. An error names the file that is
 * missing, damaged or of another program.
 */
export async function load(path, { threads = 0 } = {}) {
  const stem = path.replace(/\.onnx$/, "");
  const settings = await readJson(`${stem}.json`);
  const definition = await readJson(`${stem}.tokenizer.json`, complete);
  if (settings?.output !== OUTPUT || !definition?.padding) {
    throw new Error(`${path}: no file of onnx/export_onnx.py: no ${OUTPUT}`);
  }
  let session;
  try {
    session = await ort.InferenceSession.create(path, { intraOpNumThreads: threads });
  } catch (error) {
    throw new Error(`${path}: cannot be loaded: ${error.message.split("\n")[0]}`);
  }
  return new SentenceEncoder(session, new Tokenizer(definition, {}), definition, settings);
}

class SentenceEncoder {
  constructor(session, tokenizer, definition, settings) {
    Object.assign(this, { session, tokenizer, settings, padding: definition.padding });
    // Unigram models know theirs; of the others some leave a place without an id.
    this.unknownId = definition.model.vocab[definition.model.unk_token];
  }

  /**
   * Returns a Float32Array for each sentence, in their order, as the model gives it (of unit
   * length only where it normalises). The model's prompt goes before each sentence; what is
   * longer than its longest input is cut.
   */
  async encode(sentences) {
    for (const [place, sentence] of sentences.entries()) {
      if (typeof sentence !== "string") throw new TypeError(`sentence ${place}: no string`);
    }
    const rows = sentences.map((sentence) => this.tokenize(sentence));
    // Sentences of like length share a batch: less padding.
    const order = [...rows.keys()].sort((a, b) => rows[b].length - rows[a].length);
    const embeddings = new Array(rows.length);
    for (let start = 0; start < order.length; start += BATCH_SIZE) {
      const batch = order.slice(start, start + BATCH_SIZE);
      const { data, dims } = await this.run(batch.map((place) => rows[place]));
      batch.forEach((place, row) => {
        embeddings[place] = data.slice(row * dims[1], (row + 1) * dims[1]);
      });
    }
    return embeddings;
  }

  /** Returns the token ids of a sentence; a long one is cut before its closing tokens, if any. */
  tokenize(sentence) {
    const encode = (options) => {
      const found = this.tokenizer.encode(this.settings.prompt + sentence, options);
      return found.ids.map((id) => id ?? this.unknownId);
    };
    const ids = encode();
    const surplus = ids.length - this.settings.max_seq_length;
    if (surplus <= 0) return ids;
    const own = encode({ add_special_tokens: false });
    const added = ids.length - own.length;
    let opening = 0;
    while (opening < added && own.some((id, i) => id !== ids[opening + i])) opening++;
    const end = opening + own.length;
    return [...ids.slice(0, end - surplus), ...ids.slice(end)];
  }

  /** Runs rows of token ids, the longest first, padded to its length. */
  async run(rows) {
    const length = rows[0].length;
    const padding = { input_ids: this.padding.pad_id, token_type_ids: this.padding.pad_type_id };
    const values = {
      input_ids: (ids) => ids,
      attention_mask: (ids) => ids.map(() => 1),
      token_type_ids: (ids) => ids.map(() => 0),
    };
    const feeds = {};
    for (const name of this.session.inputNames) {
      // Models differ in their inputs: BERT has token types, RoBERTa has none.
      const data = new BigInt64Array(rows.length * length).fill(BigInt(padding[name] ?? 0));
      rows.forEach((ids, row) => {
        const left = this.padding.direction === "Left" ? length - ids.length : 0;
        data.set(values[name](ids).map(BigInt), row * length + left);
      });
      feeds[name] = new ort.Tensor("int64", data, [rows.length, length]);
    }
    return (await this.session.run(feeds, [OUTPUT]))[OUTPUT];
  }

  /** Releases the session. */
  async close() {
    await this.session.release();
  }
}
