/**
 * What happens to pixels before and after the network; it needs neither a page nor a runtime.
 *
 * Shapes: C classes, h x w logits, H x W pixels. Labels are indices of classes, H x W, uint8.
 */

/** @typedef {[height: number, width: number]} Size */
/**
 * What the images of training and testing went through: `scale` is mmseg's, with the ratio of the
 * sides kept, or null; sides are rounded up to a multiple of `multiple`.
 * @typedef {{scale: Size | null, multiple: number}} Resize
 */

/**
 * The size that the network sees a picture at: that of the model's own test pipeline, or the
 * picture's where that resizes nothing, scaled down to `side` pixels on the longer side.
 * @param {Size} size of the picture
 * @param {number} side
 * @param {Resize} resize
 * @param {Size} minimum of each side; a side below it is stretched
 * @returns {Size}
 */
export function networkSize([height, width], side, { scale, multiple }, minimum) {
  const [long, short] = [Math.max(height, width), Math.min(height, width)];
  const wanted = scale ? Math.min(Math.max(...scale) / long, Math.min(...scale) / short) : 1;
  const factor = Math.min(wanted, side / long);
  const fit = (/** @type {number} */ length, /** @type {number} */ least) => multiple * Math.ceil(
    Math.max(least, Math.floor(length * factor + 0.5)) / multiple);
  return [fit(height, minimum[0]), fit(width, minimum[1])];
}

/**
 * The network's input, H x W x 3, from a canvas' pixels, H x W x 4.
 * @param {Uint8ClampedArray} rgba
 * @returns {Uint8Array}
 */
export function toRGB(rgba) {
  const rgb = new Uint8Array(rgba.length / 4 * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    rgb[to++] = rgba[from];
    rgb[to++] = rgba[from + 1];
    rgb[to++] = rgba[from + 2];
  }
  return rgb;
}

/**
 * Source positions of each target along one axis of a bilinear resize (`align_corners=False`).
 * `starts[i]` is the first target whose lower neighbour is source `i`, `weights` are of the upper.
 * @param {number} source
 * @param {number} target
 */
function axis(source, target) {
  const starts = new Int32Array(source + 1).fill(target);
  const weights = new Float64Array(target);
  for (let i = target - 1; i >= 0; i--) {
    const position = Math.max(0, (i + 0.5) * source / target - 0.5);
    const lower = Math.min(source - 1, Math.floor(position));
    weights[i] = lower === source - 1 ? 0 : position - lower;
    starts[lower] = i;
  }
  for (let i = source - 1; i >= 0; i--) starts[i] = Math.min(starts[i], starts[i + 1]);
  return { starts, weights };
}

/**
 * The largest class of each pixel of logits that are resized bilinearly to a size.
 *
 * Between four neighbouring logits, a class can only win if its largest reaches the largest of all
 * classes' smallest ones. Mostly a single class is left, so that nothing needs to be resized.
 * @param {Float32Array} logits C x h x w
 * @param {[classes: number, height: number, width: number]} shape of the logits
 * @param {Size} size
 * @returns {Uint8Array}
 */
export function labelsOf(logits, [classes, h, w], [height, width]) {
  const labels = new Uint8Array(height * width);
  const rows = axis(h, height), columns = axis(w, width);
  const candidates = new Int32Array(classes), least = new Float32Array(classes);
  const most = new Float32Array(classes), at = Int32Array.from({ length: classes }, (_, k) => k * h * w);
  for (let y = 0; y < h; y++) {
    const [top, bottom] = [y * w, Math.min(y + 1, h - 1) * w];
    for (let x = 0; x < w && rows.starts[y] < rows.starts[y + 1]; x++) {
      const right = Math.min(x + 1, w - 1);
      let floor = -Infinity, count = 0;
      for (let k = 0; k < classes; k++) {
        const a = logits[at[k] + top + x], b = logits[at[k] + top + right];
        const c = logits[at[k] + bottom + x], d = logits[at[k] + bottom + right];
        least[k] = Math.min(a, b, c, d);
        most[k] = Math.max(a, b, c, d);
        if (least[k] > floor) floor = least[k];
      }
      for (let k = 0; k < classes; k++) if (most[k] >= floor) candidates[count++] = k;
      const [first, last] = [columns.starts[x], columns.starts[x + 1]];
      for (let i = rows.starts[y]; i < rows.starts[y + 1]; i++) {
        if (count === 1) labels.fill(candidates[0], i * width + first, i * width + last);
        for (let j = first; j < last && count > 1; j++) {
          const down = rows.weights[i], along = columns.weights[j];
          let best = -Infinity;
          for (let n = 0; n < count; n++) {
            const base = at[candidates[n]];
            const left = logits[base + top + x] * (1 - down) + logits[base + bottom + x] * down;
            const other = logits[base + top + right] * (1 - down) + logits[base + bottom + right] * down;
            const value = left * (1 - along) + other * along;
            if (value > best) {
              best = value;
              labels[i * width + j] = candidates[n];
            }
          }
        }
      }
    }
  }
  return labels;
}

/**
 * The colours of labels, H x W x 4, opaque.
 * @param {Uint8Array} labels
 * @param {number[][]} palette RGB of each class
 * @returns {Uint8ClampedArray<ArrayBuffer>}
 */
export function paint(labels, palette) {
  const table = new Uint32Array(256);
  palette.forEach(([red, green, blue], k) => {
    table[k] = new Uint32Array(Uint8Array.of(red, green, blue, 255).buffer)[0];
  });
  const pixels = new Uint32Array(labels.length);
  for (let i = 0; i < labels.length; i++) pixels[i] = table[labels[i]];
  return new Uint8ClampedArray(pixels.buffer);
}

/**
 * The number of pixels of each class.
 * @param {Uint8Array} labels
 * @param {number} classes
 */
export function count(labels, classes) {
  const counts = new Array(classes).fill(0);
  for (let i = 0; i < labels.length; i++) counts[labels[i]]++;
  return counts;
}

/**
 * The share of the pixels whose label differs.
 * @param {Uint8Array} one
 * @param {Uint8Array} other
 */
export function changed(one, other) {
  let differing = 0;
  for (let i = 0; i < one.length; i++) differing += Number(one[i] !== other[i]);
  return differing / one.length;
}

/** @param {number[]} values */
export function median(values) {
  const sorted = [...values].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/**
 * A ratio as the command line takes it and as `ISRRatio` prints it.
 * @param {number[]} multipliers of each stage
 * @param {number} encoder the number of stages that are the encoder's
 */
export function ratioText(multipliers, encoder) {
  if (new Set(multipliers).size === 1) return multipliers[0] === 1 ? 'none' : `${multipliers[0]}`;
  return [multipliers.slice(0, encoder), multipliers.slice(encoder)].map(
    part => part.join('')).join('-');
}
