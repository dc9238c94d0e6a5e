// Runs a model in onnxruntime's WebAssembly: node run_wasm.mjs MODEL < INPUTS.json > OUTPUTS.json
// Tensors are {name: {type, dims, data: base64}}. Put beside node_modules/onnxruntime-web.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web/wasm";

const ARRAYS = {
  float32: Float32Array,
  int64: BigInt64Array,
  uint8: Uint8Array,
  int8: Int8Array,
  bool: Uint8Array,
};
const feeds = {};
for (const [name, { type, dims, data }] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  const bytes = Uint8Array.from(Buffer.from(data, "base64"));
  feeds[name] = new ort.Tensor(type, new ARRAYS[type](bytes.buffer), dims);
}
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(readFileSync(process.argv[2]));
const outputs = {};
for (const [name, { type, dims, data }] of Object.entries(await session.run(feeds))) {
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  outputs[name] = { type, dims, data: bytes.toString("base64") };
}
process.stdout.write(JSON.stringify(outputs));
