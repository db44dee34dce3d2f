/** The model, in a worker so that the page stays free: `calls` are what the page asks for. */
import { labelsOf } from './pixels.js';

/** @typedef {import('./pixels.js').Size} Size */
/** @type {any} */
let ort;
/** @type {any} */
let session;
/** @type {any} */
let images;
/** @type {Map<string, {data: Float32Array, dims: number[]}>} */
const logits = new Map(); // of the image, by ratio

/**
 * Fetch files, and tell the page how far that is.
 * @param {Record<string, number>} files and how many bytes they have
 * @returns {Promise<Uint8Array[]>}
 */
async function download(files) {
  const total = Object.values(files).reduce((sum, size) => sum + size, 0);
  let loaded = 0;
  return Promise.all(Object.entries(files).map(async ([name, size]) => {
    const answer = await fetch(name);
    if (!answer.ok || !answer.body) throw new Error(`${name} cannot be loaded: ${answer.status}`);
    const content = new Uint8Array(size), reader = answer.body.getReader();
    let at = 0;
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      content.set(part.value, at);
      at += part.value.length;
      loaded += part.value.length;
      postMessage({ progress: loaded / total });
    }
    if (at !== size) throw new Error(`${name} has ${at} bytes in place of ${size}`);
    return content;
  }));
}

const calls = {
  /**
   * Load the model into a runtime, on the GPU or with threads of the CPU.
   * @param {Record<string, number>} files
   * @param {boolean} gpu
   * @param {number} threads
   */
  async load(files, gpu, threads) {
    const kind = gpu ? 'jspi' : 'wasm';
    const wasm = Object.keys(files).find(name => name.endsWith('.wasm')) ?? '';
    const [content, model] = await download(files);
    ort = await import(`./ort/ort.${kind}.min.mjs`);
    ort.env.wasm.wasmBinary = content;
    ort.env.wasm.wasmPaths = { mjs: new URL(wasm.replace('.wasm', '.mjs'), import.meta.url).href };
    ort.env.wasm.numThreads = threads;
    session = await ort.InferenceSession.create(model, {
      executionProviders: gpu ? ['webgpu', 'wasm'] : ['wasm'], logSeverityLevel: 3 });
  },

  /**
   * Take an image, H x W x 3.
   * @param {Uint8Array} rgb
   * @param {Size} size
   */
  async take(rgb, size) {
    logits.clear();
    images = new ort.Tensor('uint8', rgb, [1, ...size, 3]);
  },

  /**
   * Predict the image, and return the milliseconds that it took.
   * @param {number[]} ratio
   */
  async predict(ratio) {
    const start = performance.now();
    const isr_ratio = new ort.Tensor('int64', BigInt64Array.from(ratio, BigInt), [ratio.length]);
    const { data, dims } = (await session.run({ images, isr_ratio })).logits;
    logits.set(`${ratio}`, { data, dims: dims.slice(1) });
    return performance.now() - start;
  },

  /**
   * Return the labels of the last predictions at a size, and forget those of other ratios.
   * @param {number[][]} ratios
   * @param {Size} size
   */
  async labels(ratios, size) {
    const wanted = new Set(ratios.map(String));
    for (const name of logits.keys()) if (!wanted.has(name)) logits.delete(name);
    return ratios.map(ratio => {
      const known = logits.get(`${ratio}`);
      if (!known) throw new Error(`nothing was predicted at ${ratio}`);
      return labelsOf(known.data, /** @type {[number, number, number]} */ (known.dims), size);
    });
  },
};

addEventListener('message', async ({ data: { id, name, values } }) => {
  try {
    const result = await /** @type {any} */ (calls)[name](...values);
    postMessage({ id, result });
  } catch (error) {
    postMessage({ id, error: error instanceof Error ? error.message : String(error) });
  }
});
