/**
 * What happens to pixels before and after the network; it needs neither a page nor a runtime.
 * Shapes: C classes, h x w logits, H x W pixels. Labels are indices of classes, H x W, uint8.
 */

/** @typedef {[height: number, width: number]} Size */
/** @typedef {{scale: Size | null, multiple: number}} Resize of the model's test pipeline */

/**
 * The size that the network sees an image at: that of the model's test pipeline (mmseg's `scale`
 * with the ratio of the sides kept, if there is one), with at most `side` pixels on the longer side
 * and at least the `minimum`, to which shorter sides are stretched, rounded up to the `multiple`.
 * @type {(size: Size, side: number, resize: Resize, minimum: Size) => Size}
 */
export function networkSize([height, width], side, { scale, multiple }, minimum) {
  const long = Math.max(height, width), short = Math.min(height, width);
  const wanted = scale ? Math.min(Math.max(...scale) / long, Math.min(...scale) / short) : 1;
  const factor = Math.min(wanted, side / long);
  const fit = (length, least) => multiple * Math.ceil(
    Math.max(least, 1, Math.floor(length * factor + 0.5)) / multiple);
  return [fit(height, minimum[0]), fit(width, minimum[1])];
}

/** The network's input, H x W x 3, of a canvas' pixels. @param {Uint8ClampedArray} rgba */
export function toRGB(rgba) {
  const rgb = new Uint8Array(rgba.length / 4 * 3);
  for (let i = 0; i < rgb.length; i++) rgb[i] = rgba[i + Math.floor(i / 3)];
  return rgb;
}

/**
 * One axis of a bilinear resize (`align_corners=False`): `starts[i]` is the first target whose
 * lower neighbour is source `i` or a later one, `weights` are those of the upper neighbours.
 * @param {number} source @param {number} target
 */
function axis(source, target) {
  const starts = new Int32Array(source + 1).fill(target), weights = new Float64Array(target);
  for (let i = target - 1; i >= 0; i--) {
    const position = Math.max(0, (i + 0.5) * source / target - 0.5), lower = Math.floor(position);
    weights[i] = lower < source - 1 ? position - lower : 0;
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
 * @param {Float32Array} logits @param {number[]} shape C, h and w @param {Size} size
 */
export function labelsOf(logits, [classes, h, w], [height, width]) {
  const labels = new Uint8Array(height * width);
  const rows = axis(h, height), columns = axis(w, width);
  const candidates = new Int32Array(classes), most = new Float32Array(classes);
  for (let y = 0; y < h; y++) {
    const top = y * w, bottom = Math.min(y + 1, h - 1) * w;
    for (let x = 0; x < w && rows.starts[y] < rows.starts[y + 1]; x++) {
      const right = Math.min(x + 1, w - 1), start = columns.starts[x], end = columns.starts[x + 1];
      let floor = -Infinity, count = 0;
      for (let k = 0, at = 0; k < classes; k++, at += h * w) {
        const a = logits[at + top + x], b = logits[at + top + right];
        const c = logits[at + bottom + x], d = logits[at + bottom + right];
        most[k] = Math.max(a, b, c, d);
        floor = Math.max(floor, Math.min(a, b, c, d));
      }
      for (let k = 0; k < classes; k++) if (most[k] >= floor) candidates[count++] = k;
      if (!count) throw new Error('the logits are not numbers');
      for (let i = rows.starts[y]; i < rows.starts[y + 1]; i++) {
        const row = i * width, down = rows.weights[i];
        if (count === 1) labels.fill(candidates[0], row + start, row + end);
        for (let j = start; j < end && count > 1; j++) {
          const along = columns.weights[j];
          for (let n = 0, best = -Infinity; n < count; n++) {
            const upper = candidates[n] * h * w + top, lower = candidates[n] * h * w + bottom;
            const left = logits[upper + x] * (1 - down) + logits[lower + x] * down;
            const other = logits[upper + right] * (1 - down) + logits[lower + right] * down;
            const value = left * (1 - along) + other * along;
            if (value > best) {
              best = value;
              labels[row + j] = candidates[n];
            }
          }
        }
      }
    }
  }
  return labels;
}

/** The colours of labels, H x W x 4. @param {Uint8Array} labels @param {number[][]} palette */
export function paint(labels, palette) {
  const table = new Uint32Array(256), pixels = new Uint32Array(labels.length);
  palette.forEach((rgb, k) => {
    table[k] = new Uint32Array(Uint8Array.of(...rgb, 255).buffer)[0];
  });
  for (let i = 0; i < labels.length; i++) pixels[i] = table[labels[i]];
  return new Uint8ClampedArray(pixels.buffer);
}

/**
 * The shares of the pixels: of each class in both label maps, and of those that differ.
 * @param {Uint8Array} one @param {Uint8Array} other @param {number} classes
 */
export function compare(one, other, classes) {
  const counts = [new Uint32Array(classes), new Uint32Array(classes)];
  let changed = 0;
  for (let i = 0; i < one.length; i++) {
    counts[0][one[i]]++;
    counts[1][other[i]]++;
    if (one[i] !== other[i]) changed++;
  }
  return { shares: counts.map(part => Array.from(part, value => value / one.length)),
    changed: changed / one.length };
}

/** @param {number[]} values */
export function median(values) {
  const sorted = [...values].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** A ratio as `--isr-ratio` takes it; `stages` are names like "encoder 1". */
export function ratioText(/** @type {number[]} */ multipliers, /** @type {string[]} */ stages) {
  if (new Set(multipliers).size === 1) return multipliers[0] === 1 ? 'none' : `${multipliers[0]}`;
  const parts = ['e', 'd'].map(kind => multipliers.filter((_, i) => stages[i][0] === kind));
  return parts.map(part => part.join('') || '1').join('-');
}
