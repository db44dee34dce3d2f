/** The page: a picture in, its masks as trained and at the chosen ratio out. */
import { changed, count, median, networkSize, paint, ratioText, toRGB } from './pixels.js';

/** @typedef {import('./pixels.js').Size} Size */
const SHOWN = 2048; // pixels on the longer side, above which a picture is shown smaller
const ROUNDS = 6, PATIENCE = 2000; // turns of a timing, and milliseconds after which none begins
const MOST = 8; // the largest multiplier

/** @type {(id: string) => any} */
const $ = id => document.getElementById(id);
/** @type {(tag: string, values?: object, ...inside: (Node | string)[]) => any} */
const make = (tag, values = {}, ...inside) => {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...inside);
  return made;
};
const tell = (/** @type {string} */ text) => $('message').replaceChildren(
  ...text ? [make('p', { className: 'eda-note' }, text)] : []);
const complain = (/** @type {string} */ text) => $('problem').replaceChildren(
  ...text ? [make('p', { className: 'eda-problem' }, text)] : []);
const percent = (/** @type {number} */ share) => share > 0 && share < 0.0005 ? '< 0.1%' :
  `${(100 * share).toFixed(1)}%`;

/** @type {any} what the exporter wrote: classes, palette, stages, dial, resize, minimum, files */
let model;
/** @type {Worker | undefined} */
let worker;
/** @type {Map<number, {resolve: (value: any) => void, reject: (error: Error) => void}>} */
const waiting = new Map();
/** @type {any} the picture: image, name, size; and of its prediction: input, shown, times, labels */
let picture;
/** @type {number[]} */
let ratio;
let calls = 0, asked = 0, running = false;

/** Ask the worker. @param {string} name @param {any[]} values @returns {Promise<any>} */
function call(name, ...values) {
  return new Promise((resolve, reject) => {
    waiting.set(++calls, { resolve, reject });
    worker?.postMessage({ id: calls, name, values });
  });
}

/** End the worker, and what waits for it. @param {string} reason */
function stop(reason) {
  worker?.terminate();
  worker = undefined;
  for (const { reject } of waiting.values()) reject(new Error(reason));
  waiting.clear();
}

/** Load the model as chosen. */
async function start() {
  const gpu = $('backend').value === 'gpu', threads = Number($('backend').value) || 1;
  worker = new Worker('worker.js', { type: 'module' });
  worker.onerror = event => stop(event.message || 'worker.js cannot be loaded');
  worker.onmessage = ({ data: { id, result, error, progress } }) => {
    if (progress !== undefined) return void ($('progress').value = progress);
    const { resolve, reject } = waiting.get(id) ?? {};
    waiting.delete(id);
    if (error) reject?.(new Error(error));
    else resolve?.(result);
  };
  const files = model.files[gpu ? 'gpu' : 'cpu'];
  const bytes = Object.values(files).reduce((sum, size) => sum + size, 0);
  tell(`Loading the model and its runtime, ${(bytes / 1e6).toFixed(0)} MB ...`);
  $('progress').hidden = false;
  await call('load', files, gpu, threads).finally(() => $('progress').hidden = true);
  $('device').textContent = gpu ? 'WebGPU' : 'WebAssembly';
  $('threads').textContent = gpu ? '' : `${threads} thread${threads > 1 ? 's' : ''}`;
  if (picture) picture.times = new Map();
}

/** Predict what is on the page; asked again meanwhile, it begins again. */
async function refresh() {
  asked++;
  if (running || !picture) return;
  running = true;
  try {
    for (let turn = 0; turn !== asked;) await update(turn = asked);
  } catch (error) {
    const text = /** @type {Error} */ (error).message;
    const gpu = $('backend').value === 'gpu';
    if (gpu) $('backend').value = $('backend').options[1].value; // the runtime's CPU is exact
    stop(text);
    tell('');
    complain(/memory|alloc|bad_alloc|RangeError|OOM/i.test(text) ?
      `The browser has too little memory for this size. Choose a smaller longer side under "more". (${text})` :
      `The model cannot run in this browser: ${text}. ${gpu ? 'Move a slider to try it on the CPU.' : ''}`);
  }
  running = false;
}

/** @param {number} turn that ends this one when it is no longer the last */
async function update(turn) {
  complain('');
  const own = picture, chosen = ratio, ratios = [model.dial[0].ratio, chosen];
  if (!worker) await start();
  const { resize, minimum } = model;
  const input = networkSize(own.size, Number($('side-length').value), resize, minimum);
  if (`${own.input}` !== `${input}` || !own.times.size) {
    Object.assign(own, { input, times: new Map(), labels: null });
    await call('take', toRGB(draw(own.image, input).getImageData(0, 0, input[1], input[0]).data), input);
  }
  const begin = performance.now();
  for (let round = 0; round < ROUNDS && (round < 2 || performance.now() - begin < PATIENCE); round++) {
    for (const each of new Map(ratios.map(one => [`${one}`, one])).values()) {
      const times = own.times.get(`${each}`) ?? [];
      if (!round && times.length) continue;
      if (!round) tell('Predicting ...');
      times.push(await call('predict', each));
      own.times.set(`${each}`, times);
      if (turn !== asked) return;
    }
    if (!round) {
      own.labels = await call('labels', ratios, own.shown);
      if (turn !== asked) return;
      show(own, chosen);
    }
    // The first run of a size allocates, so it counts only until there is another.
    const [before, after] = ratios.map(one => own.times.get(`${one}`)).map(
      times => median(times.length > 1 ? times.slice(1) : times));
    $('times').replaceChildren(`${before.toFixed(0)} → `, make('b', {}, after.toFixed(0)));
    const runs = Math.max(1, own.times.get(`${chosen}`).length - 1);
    $('rounds').textContent = `${signed(after / before - 1)}, ${round ? `median of ${runs}` : 'first run'}`;
  }
}

const signed = (/** @type {number} */ change) => `${change < 0 ? '' : '+'}${(100 * change).toFixed(0)}%`;

/** Draw an image at a size. @param {CanvasImageSource} image @param {Size} size */
function draw(image, [height, width], canvas = make('canvas')) {
  Object.assign(canvas, { width, height });
  const context = canvas.getContext('2d', { willReadFrequently: true });
  Object.assign(context, { imageSmoothingQuality: 'high', fillStyle: '#fff' });
  context.fillRect(0, 0, width, height); // below what is transparent
  context.drawImage(image, 0, 0, width, height);
  return context;
}

/** @param {Uint8Array} labels @param {Size} size */
function drawMask(labels, [height, width], canvas = make('canvas')) {
  Object.assign(canvas, { width, height });
  canvas.getContext('2d').putImageData(new ImageData(paint(labels, model.palette), width), 0, 0);
  return canvas;
}

/** Show masks, shares and sizes. @param {any} own @param {number[]} chosen */
function show(own, chosen) {
  const [height, width] = own.shown, { classes, palette } = model;
  drawMask(own.labels[0], own.shown, $('trained'));
  drawMask(own.labels[1], own.shown, $('chosen'));
  $('changed').textContent = `${(100 * changed(own.labels[0], own.labels[1])).toFixed(2)}%`;
  $('size').textContent = `of ${width} x ${height}`;
  const [trained, other] = own.labels.map((/** @type {Uint8Array} */ labels) => count(labels, classes.length));
  const found = [...classes.keys()].filter(k => trained[k] + other[k]);
  const pixels = width * height;
  $('classes').replaceChildren(...found.sort((a, b) => trained[b] - trained[a]).map(k => {
    const colour = make('span');
    colour.style.background = `rgb(${palette[k]})`;
    return make('tr', {}, make('td', {}, colour), make('th', { scope: 'row' }, classes[k]),
      make('td', {}, percent(trained[k] / pixels)), make('td', {}, percent(other[k] / pixels)));
  }));
  const sizes = [['shown', own.shown], ['seen by the network', own.input]].filter(
    ([, size]) => `${size}` !== `${own.size}`).map(([how, [h, w]]) => `${how} at ${w} x ${h}`);
  $('notes').textContent = `${own.name}, ${own.size[1]} x ${own.size[0]} pixels${sizes.length ? ', ' : ''}${
    sizes.join(', ')}. Ratio: --isr-ratio ${ratioText(chosen, model.encoder)}`;
  $('save-mask').disabled = $('save-overlay').disabled = false;
  tell('');
}

/** Take a picture. @param {Blob | HTMLVideoElement} source @param {string} name */
async function open(source, name) {
  try {
    const image = await createImageBitmap(source);
    /** @type {Size} */
    const size = [image.height, image.width];
    const shown = networkSize(size, SHOWN, { scale: null, multiple: 1 }, [1, 1]);
    picture?.image.close();
    picture = { image, name, size, shown, times: new Map() };
    draw(image, shown, $('picture'));
    for (const id of ['trained', 'chosen']) $(id).width = 0; // masks of the last one
    $('compare').style.setProperty('--ratio', `${size[1] / size[0]}`);
    $('save-mask').disabled = $('save-overlay').disabled = true;
    refresh();
  } catch {
    complain(`${name} is no image that this browser can decode: choose a JPEG, PNG or WebP file.`);
  }
}

/** Save the mask at the chosen ratio at the picture's own size, alone or over it. @param {boolean} alone */
async function save(alone) {
  const { image, size, name } = picture;
  const [labels] = await call('labels', [ratio, model.dial[0].ratio], size);
  const mask = drawMask(labels, size), context = alone ? null : draw(image, size);
  if (context) {
    context.globalAlpha = $('opacity').value / 100;
    context.drawImage(mask, 0, 0);
  }
  (context?.canvas ?? mask).toBlob((/** @type {Blob} */ blob) => {
    const link = make('a', { href: URL.createObjectURL(blob),
      download: `${name.replace(/\.\w+$/, '')}_${alone ? 'mask' : 'overlay'}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

/** Show the camera, or take its picture. */
async function useWebcam() {
  const camera = $('camera');
  const on = camera.hidden;
  try {
    if (on) {
      camera.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
      await camera.play();
    } else {
      await open(camera, 'webcam.png');
      for (const track of camera.srcObject.getTracks()) track.stop();
    }
    camera.hidden = !on;
    $('webcam').textContent = on ? 'Take this picture' : 'Webcam';
  } catch (error) {
    complain(`The webcam cannot be used: ${/** @type {Error} */ (error).message}`);
  }
}

/** Choose a ratio, and have all sliders show it. @param {number[]} chosen */
function choose(chosen) {
  ratio = chosen;
  const known = model.dial.findIndex((/** @type {any} */ each) => `${each.ratio}` === `${ratio}`);
  if (known >= 0) $('dial').value = known;
  const text = known < 0 ? ratioText(ratio, model.encoder) : model.dial[known].name;
  $('dial-text').textContent = $('side').textContent = text;
  $('dial').setAttribute('aria-valuetext', text);
  [...$('stages').querySelectorAll('input')].forEach((input, i) => {
    input.value = ratio[i];
    input.previousElementSibling.textContent = ratio[i];
  });
  refresh();
}

/** Fill the page, and listen to it. */
async function main() {
  model = await (await fetch('model.json')).json();
  $('model').textContent = `${model.checkpoint}, ${model.classes.length} classes.`;
  $('stages').append(...model.stages.map((/** @type {string} */ name, /** @type {number} */ i) => make(
    'label', {}, name, make('output'), make('input', { type: 'range', min: 1, max: MOST, oninput: (
      /** @type {any} */ event) => choose(ratio.with(i, Number(event.target.value))) }))));
  $('examples').append(...model.examples.map((/** @type {string} */ name, /** @type {number} */ i) => make(
    'button', { ariaLabel: `Drawn scene ${i + 1}`, onclick: async () => open(
      await (await fetch(name)).blob(), name.replace(/.*\//, '')) }, make('img', { src: name, alt: '' }))));
  $('side-length').value = model.side;
  const cores = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
  const gpu = model.files.gpu && 'Suspending' in (self.WebAssembly ?? {}) &&
    await /** @type {any} */ (navigator).gpu?.requestAdapter().catch(() => null);
  $('backend').append(...gpu ? [make('option', { value: 'gpu' }, 'GPU')] : [], ...new Set(
    [cores, 2, 1].filter(n => n <= cores).map(n => n)).values().map(n => make(
    'option', { value: n }, `CPU, ${n} thread${n > 1 ? 's' : ''}`)));
  $('dial').max = model.dial.length - 1;
  $('dial').oninput = () => choose(model.dial[$('dial').value].ratio);
  $('side-length').onchange = refresh;
  $('backend').onchange = () => { stop('another device was chosen'); refresh(); };
  $('divider').oninput = () => $('compare').style.setProperty('--at', `${$('divider').value}%`);
  $('opacity').oninput = () => $('compare').style.setProperty('--opacity', `${$('opacity').value / 100}`);
  $('file').onchange = () => $('file').files[0] && open($('file').files[0], $('file').files[0].name);
  $('webcam').onclick = useWebcam;
  $('save-mask').onclick = () => save(true);
  $('save-overlay').onclick = () => save(false);
  for (const kind of ['dragover', 'drop', 'paste']) {
    addEventListener(kind, (/** @type {any} */ event) => {
      if (kind !== 'paste') event.preventDefault();
      const file = kind !== 'dragover' && (event.dataTransfer ?? event.clipboardData).files[0];
      if (file) open(file, file.name);
    });
  }
  if (!self.WebAssembly) {
    tell('');
    return complain('This browser has no WebAssembly, or it is switched off, so the model cannot run here.');
  }
  choose(model.dial[1].ratio);
  $('examples').firstElementChild?.click();
}

if (!crossOriginIsolated && isSecureContext && navigator.serviceWorker && !sessionStorage.reloaded) {
  sessionStorage.reloaded = 1; // once: where it changes nothing, there is one thread
  navigator.serviceWorker.register('threads.js').then(() => navigator.serviceWorker.ready).then(
    () => location.reload(), main);
} else {
  main();
}
