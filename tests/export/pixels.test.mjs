/** Pre- and post-processing of the page against numbers from Python, in the file of $NUMBERS. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import test from 'node:test';
import * as pixels from '../../mmseg_edaformer/export/web/pixels.js';

const numbers = JSON.parse(readFileSync(process.env.NUMBERS, 'utf8'));

for (const { name, args, wanted } of numbers) {
  test(name, () => {
    const values = args.map(value => value?.float32 ? Float32Array.from(value.float32) :
      value?.uint8 ? Uint8ClampedArray.from(value.uint8) : value);
    const found = pixels[name](...values);
    if (wanted.ties) { // where the best two are equal within rounding, either is right
      const differing = wanted.labels.filter((label, i) => label !== found[i] && !wanted.ties[i]);
      assert.equal(found.length, wanted.labels.length);
      assert.equal(differing.length, 0);
    } else {
      assert.deepEqual(ArrayBuffer.isView(found) ? [...found] : found, wanted);
    }
  });
}

test('logits that are not numbers', () => {
  assert.throws(() => pixels.labelsOf(Float32Array.of(NaN, 1), [2, 1, 1], [2, 2]), /not numbers/);
});
