/** Tests with the exported files in onnx/models, or in another folder: MODELS=FOLDER npm test */
import assert from "node:assert/strict";
import { copyFileSync, existsSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { load } from "./sentence-encoder.js";

const MODELS = process.env.MODELS ?? join(import.meta.dirname, "../../onnx/models");
const names = existsSync(MODELS) ? readdirSync(MODELS).sort() : [];
const goldens = names.filter((name) => name.endsWith(".golden.json"));
const model = names.find((name) => name.endsWith(".onnx"));
const withoutModel = model ? false : `no .onnx file in ${MODELS}: run onnx/export_onnx.py`;
const readJson = (name) => JSON.parse(readFileSync(join(MODELS, name), "utf8"));

function cosine(first, second) {
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  return dot(first, second) / Math.sqrt(dot(first, first) * dot(second, second));
}

const largestDifference = (first, second) =>
  Math.max(...first.map((value, i) => Math.abs(value - second[i])));

// --- Python's vectors -------------------------------------------------------------------------

if (!goldens.length) {
  const reason = `no .golden.json in ${MODELS}: run onnx/export_onnx.py --golden`;
  test("vectors equal those of Python", { skip: reason }, () => {});
}
for (const golden of goldens) {
  const { sentences, vectors } = readJson(golden);
  for (const [name, expected] of Object.entries(vectors)) {
    test(`vectors equal those of Python: ${name}`, async (context) => {
      const { precision } = readJson(name.replace(/onnx$/, "json"));
      const encoder = await load(join(MODELS, name));
      const together = await encoder.encode(sentences);
      let largest = 0;
      for (const [place, sentence] of sentences.entries()) {
        const [alone] = await encoder.encode([sentence]);
        for (const found of [together[place], alone]) {
          assert.equal(found.length, expected[place].length);
          const difference = largestDifference(found, expected[place]);
          largest = Math.max(largest, difference);
          // Last bits differ between versions and CPUs; where a value lies between two steps of
          // int8 they decide which it gets (tests/test_node.py).
          if (precision === "fp32") assert.ok(difference <= 1e-5, `${place}: ${difference}`);
          else assert.ok(cosine(found, expected[place]) > 0.995, `${place}: ${difference}`);
        }
      }
      context.diagnostic(`largest difference ${largest}`);
      await encoder.close();
    });
  }
}

// --- Sentences --------------------------------------------------------------------------------

test("sentences", { skip: withoutModel }, async () => {
  const encoder = await load(join(MODELS, model));
  assert.deepEqual(await encoder.encode([]), []);
  const long = "긴 문장 ".repeat(2000);
  const [first, second] = await encoder.encode([long, `${long} 다른 끝`]);
  assert.ok(largestDifference(first, second) < 1e-5);
  await assert.rejects(encoder.encode(["가", null]), /^TypeError: sentence 1: no string$/);
  const many = Array.from({ length: 100 }, (_, i) => "가나다라마바사".slice(0, 1 + (i % 7)));
  const found = await encoder.encode(many);
  for (const place of [0, 13, 99]) {
    const [alone] = await encoder.encode([many[place]]);
    assert.ok(cosine(found[place], alone) > 0.9999);
  }
  await encoder.close();
});

// --- Files ------------------------------------------------------------------------------------

const folder = () => join(mkdtempSync(join(tmpdir(), "encoder-")), "model");

test("a missing file is named", async () => {
  const stem = folder();
  for (const ending of [".json", ".tokenizer.json"]) {
    const message = `${stem}${ending}: no such file; onnx/export_onnx.py writes three`;
    await assert.rejects(load(`${stem}.onnx`), { message });
    writeFileSync(stem + ending, "{}");
  }
});

for (const [ending, content, says] of [
  [".onnx", "not a model", "cannot be loaded"],
  [".json", "{", "no JSON of onnx/export_onnx.py"],
  [".json", '{"output": "last_hidden_state"}', "no file of onnx/export_onnx.py"],
  [".tokenizer.json", "{}", "no file of onnx/export_onnx.py"],
]) {
  test(`a bad ${ending} is named: ${content}`, { skip: withoutModel }, async () => {
    const stem = folder();
    for (const each of [".onnx", ".json", ".tokenizer.json"]) {
      copyFileSync(join(MODELS, model.replace(/\.onnx$/, each)), stem + each);
    }
    writeFileSync(stem + ending, content);
    await assert.rejects(load(`${stem}.onnx`), ({ message }) => {
      assert.ok(message.includes(stem) && message.includes(says), message);
      assert.ok(!message.includes("\n"));
      return true;
    });
  });
}
