/** The page: an image in, its masks as trained and at the chosen ratio out. */
import { compare, median, networkSize, paint, ratioText, toRGB } from './pixels.js';

const SHOWN = 2048; // pixels on the longer side, above which an image is shown smaller
const ROUNDS = 6, PATIENCE = 2000; // turns of a timing, and milliseconds after which none begins
const MOST = 8; // the largest multiplier

/** @type {any} model.json; the image, its sizes and times; the chosen ratio; the worker */
let model, picture, ratio, worker;
let calls = 0, asked = 0, opened = 0, running = false, warning = '';
const waiting = new Map(); // promises of the worker's answers

const $ = id => /** @type {any} */ (document.getElementById(id));
const make = (tag, values = {}, ...inside) => {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...inside);
  return made;
};
const say = (id, text) => $(id).replaceChildren(...text ? [make('p', {
  className: `eda-${id}` }, text)] : []);
const tell = text => say('note', text), complain = text => say('problem', text);
const percent = share => share > 0 && share < 0.0005 ? '< 0.1%' : `${(100 * share).toFixed(1)}%`;
const threads = count => `${count} thread${count > 1 ? 's' : ''}`;
const by = ([height, width]) => `${width} x ${height}`;

/** Ask the worker for one of its calls. @returns {Promise<any>} */
function call(name, ...values) {
  return new Promise((resolve, reject) => {
    if (!worker) return reject(new Error('the model is not loaded: choose the image again'));
    waiting.set(++calls, { resolve, reject });
    worker.postMessage({ id: calls, name, values });
  });
}

/** End the worker, and what waits for it. @param {string} reason */
function stop(reason) {
  worker = worker?.terminate();
  for (const { reject } of waiting.values()) reject(new Error(reason));
  waiting.clear();
}

/** Load the model where it shall run. */
async function start() {
  const gpu = $('backend').value === 'gpu', count = Number($('backend').value) || 1;
  const files = model.files[gpu ? 'gpu' : 'cpu'], sizes = Object.values(files);
  worker = new Worker('worker.js', { type: 'module' });
  worker.onerror = event => stop(event.message || 'worker.js cannot be loaded');
  worker.onmessage = ({ data: { id, result, error, progress } }) => {
    if (progress) $('progress').value = progress;
    if (error) waiting.get(id)?.reject(new Error(error));
    else waiting.get(id)?.resolve(result);
    waiting.delete(id);
  };
  tell(`Loading the model and its runtime, ${((sizes[0] + sizes[1]) / 1e6).toFixed(0)} MB ...`);
  $('progress').hidden = false;
  await call('load', files, gpu, count).finally(() => $('progress').hidden = true);
  $('device').textContent = gpu ? 'WebGPU' : 'WebAssembly';
  $('threads').textContent = gpu ? '' : threads(count);
  picture.times = new Map();
}

/** Predict what the page shows; what changes meanwhile begins again. */
async function refresh() {
  asked++;
  if (running || !picture) return;
  running = true;
  for (let turn = 0; turn !== asked;) {
    try {
      await update(turn = asked);
    } catch (error) {
      if (turn === asked) fail(/** @type {Error} */ (error).message);
    }
  }
  running = false;
}

/** Say why there is no prediction; the next one begins with a new worker. @param {string} reason */
function fail(reason) {
  stop(reason);
  tell('');
  if ($('backend').value !== 'gpu') return complain(
    !/memory|alloc/i.test(reason) ? `The model cannot run in this browser: ${reason}` :
      'Too little memory for this size: choose a smaller longer side under "more"');
  $('backend').value = $('backend').options[1].value;
  warning = `The CPU computes, because the model cannot run on the GPU: ${reason}`;
  refresh();
}

/** @param {number} turn that ends as soon as it is no longer the last one `asked` */
async function update(turn) {
  const own = picture, chosen = ratio, ratios = [model.dial[0].ratio, chosen];
  const single = new Map(ratios.map(each => [`${each}`, each]));
  complain('');
  if (!worker) await start();
  if (turn !== asked) return;
  const input = networkSize(own.size, Number($('longer').value), model.resize, model.minimum);
  if (`${own.input}` !== `${input}` || !own.times.size) {
    Object.assign(own, { input, times: new Map() });
    const pixels = draw(own.image, input).getImageData(0, 0, input[1], input[0]);
    await call('take', toRGB(pixels.data), input);
  }
  const begin = performance.now();
  for (let round = 0; round < ROUNDS; round++) {
    if (round > 1 && performance.now() - begin > PATIENCE) return;
    for (const [name, each] of single) {
      const times = own.times.get(name) ?? [];
      if (!round && times.length) continue;
      if (!round) tell('Predicting ...');
      own.times.set(name, [...times, await call('predict', each)]);
      if (turn !== asked) return;
    }
    if (!round) {
      const labels = await call('labels', ratios, own.shown);
      if (turn !== asked) return;
      show(Object.assign(own, { chosen }), labels);
      if (warning) complain(warning);
      warning = '';
    }
    // The first run of a size allocates, so it counts only until there is another.
    const runs = ratios.map(each => own.times.get(`${each}`)).map(all => all.slice(all[1] ? 1 : 0));
    const [before, after] = runs.map(median), change = 100 * (after / before - 1);
    $('times').replaceChildren(`${before.toFixed(0)} → `, make('b', {}, after.toFixed(0)));
    $('rounds').textContent = `${single.size > 1 ? `${change < 0 ? '' : '+'}${change.toFixed(0)}%` :
      'no change'}, ${round ? `median of ${runs[1].length}` : 'first run'}`;
  }
}

/** Draw an image at a size. @param {CanvasImageSource} image @param {number[]} size */
function draw(image, [height, width], canvas = make('canvas')) {
  const context = Object.assign(canvas, { width, height }).getContext('2d');
  Object.assign(context, { imageSmoothingQuality: 'high', fillStyle: '#fff' });
  context.fillRect(0, 0, width, height); // below what is transparent
  context.drawImage(image, 0, 0, width, height);
  return context;
}

function drawMask(labels, [height, width], canvas = make('canvas')) {
  Object.assign(canvas, { width, height }).getContext('2d').putImageData(
    new ImageData(paint(labels, model.palette), width), 0, 0);
  return canvas;
}

/** Show masks, shares and sizes; labels are those as trained and at the ratio. */
function show({ name, size, shown, input, chosen }, labels) {
  const { shares: [trained, other], changed } = compare(labels[0], labels[1], model.classes.length);
  drawMask(labels[0], shown, $('trained'));
  drawMask(labels[1], shown, $('chosen'));
  $('changed').textContent = `${(100 * changed).toFixed(2)}%`;
  $('size').textContent = `of ${by(shown)}`;
  const found = [...trained.keys()].filter(k => trained[k] + other[k]);
  $('classes').replaceChildren(...found.sort((a, b) => trained[b] - trained[a]).map(k => {
    const colour = make('span'), shares = [trained[k], other[k]].map(percent);
    colour.style.background = `rgb(${model.palette[k]})`;
    return make('tr', {}, make('td', {}, colour), make('th', { scope: 'row' }, model.classes[k]),
      ...shares.map(share => make('td', {}, share)));
  }));
  const scaled = `${input}` === `${size}` ? '' : `, resized to ${by(input)} for the network`;
  $('notes').textContent = `${name}: ${by(size)} pixels${scaled}. Ratio of the right side: ` +
    `--isr-ratio ${ratioText(chosen, model.stages)}`;
  $('save-mask').disabled = $('save-overlay').disabled = false;
  tell('');
}

/** Take an image. @param {Blob | HTMLVideoElement} source @param {string} name */
async function open(source, name) {
  const own = ++opened, image = await createImageBitmap(source).catch(() => null);
  if (own !== opened) return; // another one was taken meanwhile
  if (!image) {
    return complain(`${name} is no image that this browser can decode: choose a JPEG or PNG file`);
  }
  for (const track of $('camera').srcObject?.getTracks() ?? []) track.stop();
  Object.assign($('camera'), { srcObject: null, hidden: true });
  $('webcam').textContent = 'Webcam';
  picture?.image.close();
  const size = /** @type {[number, number]} */ ([image.height, image.width]);
  const shown = networkSize(size, SHOWN, { scale: null, multiple: 1 }, [1, 1]);
  picture = { image, name, size, shown, times: new Map() };
  draw(image, shown, $('picture'));
  $('trained').width = $('chosen').width = 0; // the masks of the last one
  $('compare').style.setProperty('--ratio', `${size[1] / size[0]}`);
  $('save-mask').disabled = $('save-overlay').disabled = true;
  refresh();
}

/** Save the mask at the shown ratio at its own size. @param {boolean} alone */
async function save(alone) {
  const { image, size, name, chosen } = picture;
  const mask = drawMask((await call('labels', [chosen], size))[0], size);
  const context = draw(image, size);
  context.globalAlpha = alone ? 1 : $('opacity').value / 100;
  context.drawImage(mask, 0, 0);
  context.canvas.toBlob(blob => {
    const href = URL.createObjectURL(blob), kind = alone ? 'mask' : 'overlay';
    make('a', { href, download: `${name.replace(/\.\w+$/, '')}_${kind}.png` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
  });
}

/** Show the camera, or take the image that it shows. */
async function useCamera() {
  try {
    if (!$('camera').hidden) return open($('camera'), 'webcam.png');
    $('camera').srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    await $('camera').play();
    $('camera').hidden = false;
    $('webcam').textContent = 'Take this image';
  } catch (error) {
    complain(`The webcam cannot be used: ${/** @type {Error} */ (error).message}`);
  }
}

/** Set the ratio on all sliders. @param {number[]} chosen */
function choose(chosen) {
  ratio = chosen;
  const known = model.dial.findIndex(position => `${position.ratio}` === `${ratio}`);
  const text = model.dial[known]?.name ?? ratioText(ratio, model.stages);
  if (known >= 0) $('dial').value = known;
  $('dial').ariaValueText = $('dial-text').textContent = $('side').textContent = text;
  $('stages').querySelectorAll('input').forEach((input, i) => {
    input.previousElementSibling.textContent = input.value = ratio[i];
  });
  refresh();
}

/** Fill the page, and listen to it. */
async function main() {
  model = await (await fetch('model.json')).json();
  $('model').textContent = `${model.checkpoint}, ${model.classes.length} classes.`;
  $('stages').append(...model.stages.map((name, i) => make('label', {}, name, make('span'), make(
    'input', { type: 'range', min: 1, max: MOST, oninput: event => choose(
      ratio.map((value, stage) => stage === i ? Number(event.target.value) : value)) }))));
  $('examples').append(...model.examples.map((path, i) => make('button', {
    ariaLabel: `Drawn scene ${i + 1}`, onclick: async () => open(await (await fetch(path)).blob(),
      path.split('/').pop()) }, make('img', { src: path, alt: '' }))));
  const cores = crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
  const gpu = 'Suspending' in (self.WebAssembly ?? {}) && // which its runtime is built for
    (await /** @type {any} */ (navigator).gpu?.requestAdapter())?.info.isFallbackAdapter === false;
  $('backend').append(...gpu ? [make('option', { value: 'gpu' }, 'GPU')] : [],
    ...[cores, 4, 2, 1].filter((count, i) => count < cores || !i).map(
      value => make('option', { value }, `CPU, ${threads(value)}`)));
  Object.assign($('dial'), { max: model.dial.length - 1,
    oninput: () => choose(model.dial[$('dial').value].ratio) });
  Object.assign($('longer'), { value: model.side, onchange: refresh });
  $('backend').onchange = () => { stop('another device was chosen'); refresh(); };
  for (const id of ['divider', 'opacity']) {
    $(id).oninput = () => $('compare').style.setProperty(`--${id}`, `${$(id).value}%`);
  }
  $('file').onchange = ({ target: { files: [file] } }) => file && open(file, file.name);
  $('webcam').onclick = useCamera;
  $('save-mask').onclick = () => save(true).catch(error => complain(error.message));
  $('save-overlay').onclick = () => save(false).catch(error => complain(error.message));
  for (const kind of ['dragover', 'drop', 'paste']) {
    addEventListener(kind, (/** @type {any} */ event) => {
      if (kind !== 'paste') event.preventDefault();
      const [file] = kind === 'dragover' ? [] : (event.dataTransfer ?? event.clipboardData).files;
      if (file) open(file, file.name);
    });
  }
  tell('');
  if (!self.WebAssembly) throw new Error('WebAssembly is missing or off: use another browser');
  choose(model.dial[1].ratio);
  $('examples').firstElementChild.click();
}

/** Return whether the page loads again, which it does once, to get threads. */
async function reloads() {
  if (crossOriginIsolated || sessionStorage.reloaded) return false;
  sessionStorage.reloaded = 1;
  const late = new Promise((_, reject) => setTimeout(reject, 3000));
  const ready = navigator.serviceWorker.register('threads.js').then(
    () => navigator.serviceWorker.ready);
  return Promise.race([ready, late]).then(() => { location.reload(); return true; });
}

// Where storage or the service worker is blocked, there is one thread.
reloads().catch(() => false).then(again => again ? undefined : main()).catch(error => {
  tell('');
  complain(`The page cannot work: ${error.message}`);
});
