/** The model, in a worker so that the page stays free: `calls` are what the page asks for. */
import { labelsOf } from './pixels.js';

const KEPT = 3; // predictions; what is asked for again later is predicted again
/** @type {any} the runtime, its session with the model, and the image */
let ort, session, images;
/** @type {Map<string, {data: Float32Array, dims: number[]}>} logits by ratio, as trained first */
const logits = new Map();

/** Fetch files, and tell the page how far. @param {Record<string, number>} files and their bytes */
async function download(files) {
  const total = Object.values(files).reduce((sum, size) => sum + size);
  let loaded = 0;
  return Promise.all(Object.entries(files).map(async ([name, size]) => {
    const answer = await fetch(name);
    if (!answer.ok || !answer.body) throw new Error(`${name} cannot be loaded: ${answer.status}`);
    const content = new Uint8Array(size), reader = answer.body.getReader();
    for (let at = 0, part = await reader.read(); !part.done; part = await reader.read()) {
      content.set(part.value, at);
      at += part.value.length;
      loaded += part.value.length;
      postMessage({ progress: loaded / total });
    }
    return content;
  }));
}

const calls = {
  /** Load the runtime, for a GPU or for threads of the CPU, and with it the model. */
  async load(files, gpu, threads) {
    const [wasmBinary, model] = await download(files);
    const mjs = new URL(Object.keys(files)[0].replace(/wasm$/, 'mjs'), import.meta.url).href;
    ort = await import(`./ort/ort.${gpu ? 'jspi' : 'wasm'}.min.mjs`);
    Object.assign(ort.env.wasm, { wasmBinary, wasmPaths: { mjs }, numThreads: threads });
    session = await ort.InferenceSession.create(model, {
      executionProviders: gpu ? ['webgpu', 'wasm'] : ['wasm'], logSeverityLevel: 3 });
  },

  /** Take an image, H x W x 3. @param {Uint8Array} rgb @param {number[]} size */
  async take(rgb, size) {
    logits.clear();
    images = new ort.Tensor('uint8', rgb, [1, ...size, 3]);
  },

  /** Predict the image, and return the milliseconds that took. @param {number[]} ratio */
  async predict(ratio) {
    const start = performance.now();
    const isr_ratio = new ort.Tensor('int64', BigInt64Array.from(ratio, BigInt), [ratio.length]);
    const { data, dims } = (await session.run({ images, isr_ratio })).logits;
    logits.set(`${ratio}`, { data, dims: dims.slice(1) });
    if (logits.size > KEPT) logits.delete([...logits.keys()][1]);
    return performance.now() - start;
  },

  /** Return labels at ratios. @param {number[][]} ratios @param {[number, number]} size */
  async labels(ratios, size) {
    const found = [];
    for (const ratio of ratios) {
      if (!logits.has(`${ratio}`)) await calls.predict(ratio);
      const { data, dims } = /** @type {any} */ (logits.get(`${ratio}`));
      found.push(labelsOf(data, dims, size));
    }
    return found;
  },
};

let last = Promise.resolve(); // a session runs one prediction at a time
addEventListener('message', ({ data: { id, name, values } }) => {
  last = last.then(() => /** @type {any} */ (calls)[name](...values)).then(
    result => postMessage({ id, result })).catch(
    error => postMessage({ id, error: error instanceof Error ? error.message : String(error) }));
});
