// What a CPU's generic kernels do slowly: attention with short heads whose values are its keys, and
// GELU. Compiled by cpu_kernels.py; maps are channels-last, arithmetic is float32 throughout but for the
// products of bfloat16 pairs.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#else
constexpr int kLanes = 8, kVectors = 2;
#endif
constexpr int kQueries = kLanes * kVectors;
constexpr int kKeys = 64;  // of a block
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));

inline Vec all(float x) { return Vec{} + x; }  // GCC and Clang: in every lane
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x <= 0: 2^n through the exponent's bits, e^r for |r| <= ln(2) / 2 by its series.
inline Vec exponential(Vec x) {
  x = larger(x, all(-87.f));
  Vec n = x * 1.44269504f + 12582912.f;  // the nearest integer, in the low bits
  const IVec bits = (IVec)n;
  n -= 12582912.f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * (1.f / 720) + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return (Vec)((IVec)p + (bits << 23));
}

inline float load(const float* x) { return *x; }
inline float load(const uint16_t* x) {  // bfloat16
  const uint32_t bits = uint32_t(*x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(float* x, float value) { *x = value; }
inline void store(uint16_t* x, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *x = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Attention.
//
// A task is a block of queries of one head, laid across the lanes of vectors, so that the largest
// score, the sum and the output of a query stay in its lane and the keys come in as scalars. Keys
// are taken in blocks; scores, weights and outputs of a block stay in the first-level cache.

// The products of a block of keys, in float32: scores[key][query] and out[dimension][query].
struct Single {
  std::vector<float> keys;
  int dim;

  template <typename T>
  Single(const T* source, int64_t count, int64_t padded, int64_t stride, int dim)
      : keys(padded * dim), dim(dim) {
    for (int64_t j = 0; j < count; ++j)
      for (int i = 0; i < dim; ++i) keys[j * dim + i] = load(source + j * stride + i);
  }

  static void scores(const Single& s, const Vec* queries, int64_t first, Vec* out) {
    const float* keys = s.keys.data() + first * s.dim;
    for (int j = 0; j < kKeys; j += 4) {
      Vec sum[4][kVectors] = {};
      for (int i = 0; i < s.dim; ++i)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            sum[k][v] += keys[(j + k) * s.dim + i] * queries[i * kVectors + v];
#pragma GCC unroll 16
      for (int k = 0; k < 4 * kVectors; ++k) out[j * kVectors + k] = sum[k / kVectors][k % kVectors];
    }
  }
  static void output(const Single& s, const Vec* weights, int64_t first, Vec* out) {
    const float* keys = s.keys.data() + first * s.dim;
    for (int i = 0; i < s.dim; i += 4) {
      Vec sum[4][kVectors];
#pragma GCC unroll 16
      for (int k = 0; k < 4 * kVectors; ++k) sum[k / kVectors][k % kVectors] = out[i * kVectors + k];
      for (int j = 0; j < kKeys; ++j)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            sum[k][v] += keys[j * s.dim + i + k] * weights[j * kVectors + v];
#pragma GCC unroll 16
      for (int k = 0; k < 4 * kVectors; ++k) out[i * kVectors + k] = sum[k / kVectors][k % kVectors];
    }
  }
};

#if defined(__AVX512BF16__)
inline __m512bh pairs(uint32_t x) { return (__m512bh)_mm512_set1_epi32(x); }
// Two vectors of floats, rounded to bfloat16, as pairs.
inline Vec pack(Vec low, Vec high) {
  const IVec a = ((IVec)low + 0x8000) >> 16, b = (IVec)high + 0x8000;
  return (Vec)((a & 0xffff) | (b & ~0xffff));
}

// Products of blocks in bfloat16 with float32 sums: pairs of dimensions, then pairs of keys.
struct Half {
  std::vector<uint32_t> by_dim, by_key;
  int dim;

  Half(const uint16_t* source, int64_t count, int64_t padded, int64_t stride, int dim)
      : by_dim(padded * dim / 2), by_key(padded * dim / 2), dim(dim) {
    for (int64_t j = 0; j < count; ++j)
      for (int i = 0; i < dim; ++i) {
        const uint32_t value = source[j * stride + i];
        by_dim[(j * dim + i) / 2] |= value << 16 * (i % 2);
        by_key[j / 2 * dim + i] |= value << 16 * (j % 2);
      }
  }
  static void scores(const Half& s, const Vec* queries, int64_t first, Vec* out) {
    const int half = s.dim / 2;
    const uint32_t* keys = s.by_dim.data() + first * half;
    for (int j = 0; j < kKeys; j += 4) {
      __m512 sum[4][kVectors] = {};
      for (int i = 0; i < half; ++i)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            sum[k][v] = _mm512_dpbf16_ps(sum[k][v], (__m512bh)queries[i * kVectors + v],
                                         pairs(keys[(j + k) * half + i]));
#pragma GCC unroll 16
      for (int k = 0; k < 4 * kVectors; ++k) out[j * kVectors + k] = sum[k / kVectors][k % kVectors];
    }
  }
  static void output(const Half& s, const Vec* weights, int64_t first, Vec* out) {
    const uint32_t* keys = s.by_key.data() + first / 2 * s.dim;
    for (int i = 0; i < s.dim; i += 4) {
      __m512 sum[4][kVectors];
#pragma GCC unroll 16
      for (int k = 0; k < 4 * kVectors; ++k) sum[k / kVectors][k % kVectors] = out[i * kVectors + k];
      for (int j = 0; j < kKeys / 2; ++j)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            sum[k][v] = _mm512_dpbf16_ps(sum[k][v], (__m512bh)weights[j * kVectors + v],
                                         pairs(keys[j * s.dim + i + k]));
#pragma GCC unroll 16
      for (int k = 0; k < 4 * kVectors; ++k) out[i * kVectors + k] = sum[k / kVectors][k % kVectors];
    }
  }
};
#endif

template <typename T, typename Products, bool kPacked>
void attend(const T* x, const T* kv, T* out, int64_t images, int64_t queries, int64_t count,
            int64_t heads, int64_t dim) {
  const int64_t channels = heads * dim, padded = (count + kKeys - 1) / kKeys * kKeys;
  const int64_t blocks = (queries + kQueries - 1) / kQueries;
  std::vector<Products> keys;
  keys.reserve(images * heads);
  for (int64_t g = 0; g < images * heads; ++g)
    keys.emplace_back(kv + g / heads * count * channels + g % heads * dim, count, padded, channels,
                      int(dim));
  const float scale = 1 / std::sqrt(float(dim));
  at::parallel_for(0, images * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Vec> query(dim * kVectors), score(kKeys * kVectors), sums(dim * kVectors);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / blocks, first = task % blocks * kQueries;
      const int64_t real = std::min<int64_t>(kQueries, queries - first);
      const int64_t place = (g / heads * queries + first) * channels + g % heads * dim;
      float* lanes = reinterpret_cast<float*>(query.data());
      std::memset(lanes, 0, dim * kQueries * 4);
      for (int64_t q = 0; q < real; ++q)
        for (int64_t i = 0; i < dim; ++i)
          lanes[i * kQueries + q] = load(x + place + q * channels + i) * scale;
#if defined(__AVX512BF16__)
      if (kPacked)
        for (int i = 0; i < dim / 2; ++i)
          for (int v = 0; v < kVectors; ++v)
            query[i * kVectors + v] = pack(query[2 * i * kVectors + v],
                                           query[(2 * i + 1) * kVectors + v]);
#endif
      std::memset((void*)sums.data(), 0, dim * kQueries * 4);
      Vec top[kVectors], total[kVectors];
      for (int v = 0; v < kVectors; ++v) top[v] = all(-INFINITY), total[v] = Vec{};
      for (int64_t start = 0; start < count; start += kKeys) {
        Products::scores(keys[g], query.data(), start, score.data());
        const int here = int(std::min<int64_t>(kKeys, count - start));
        for (int v = 0; v < kVectors; ++v) {
          Vec most = top[v];
          for (int j = 0; j < here; ++j) most = larger(most, score[j * kVectors + v]);
          const Vec shrink = exponential(top[v] - most);
          top[v] = most;
          total[v] *= shrink;
          for (int i = 0; i < dim; ++i) sums[i * kVectors + v] *= shrink;
          for (int j = 0; j < here; ++j) {
            const Vec weight = exponential(score[j * kVectors + v] - most);
            total[v] += weight;
            score[j * kVectors + v] = weight;
          }
          for (int j = here; j < kKeys; ++j) score[j * kVectors + v] = Vec{};
        }
#if defined(__AVX512BF16__)
        if (kPacked)
          for (int j = 0; j < kKeys / 2; ++j)
            for (int v = 0; v < kVectors; ++v)
              score[j * kVectors + v] = pack(score[2 * j * kVectors + v],
                                             score[(2 * j + 1) * kVectors + v]);
#endif
        Products::output(keys[g], score.data(), start, sums.data());
      }
      for (int i = 0; i < dim; ++i)
        for (int v = 0; v < kVectors; ++v) sums[i * kVectors + v] /= total[v];
      const float* result = reinterpret_cast<const float*>(sums.data());
      for (int64_t q = 0; q < real; ++q)
        for (int64_t i = 0; i < dim; ++i)
          store(out + place + q * channels + i, result[i * kQueries + q]);
    }
  });
}

// GELU.

typedef uint16_t Short __attribute__((vector_size(kLanes * 2)));

inline Vec load_lanes(const float* x) {
  Vec value;
  std::memcpy(&value, x, sizeof(value));
  return value;
}
inline Vec load_lanes(const uint16_t* x) {
  Short bits;
  std::memcpy(&bits, x, sizeof(bits));
  return (Vec)(__builtin_convertvector(bits, IVec) << 16);
}
inline void store_lanes(float* x, Vec value) { std::memcpy(x, &value, sizeof(value)); }
inline void store_lanes(uint16_t* x, Vec value) {
  IVec bits = (IVec)value;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Short narrow = __builtin_convertvector(bits, Short);
  std::memcpy(x, &narrow, sizeof(narrow));
}

inline Vec inverse(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);
  return guess * (2.f - x * guess);
#else
  return 1.f / x;
#endif
}

// x times the normal distribution's share below x, by Abramowitz and Stegun, 7.1.26 (error 1e-7).
inline Vec gelu(Vec x) {
  const Vec z = larger(x, -x) * 0.70710678f;
  const Vec t = inverse(z * 0.3275911f + 1.f);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = p * t * exponential(-z * z) * 0.5f;
  return x * (x < 0.f ? tail : 1.f - tail);
}

template <typename T>
void gelu(T* x, int64_t count) {
  constexpr int64_t kGrain = 1 << 14;
  at::parallel_for(0, (count + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(count, end * kGrain);
    int64_t i = begin * kGrain;
    for (; i + kLanes <= last; i += kLanes) store_lanes(x + i, gelu(load_lanes(x + i)));
    if (i < last) {
      T rest[kLanes] = {};
      std::copy(x + i, x + last, rest);
      store_lanes(rest, gelu(load_lanes(rest)));
      std::copy(rest, rest + (last - i), x + i);
    }
  });
}

}  // namespace

extern "C" void gelu_float(float* x, int64_t count) { gelu(x, count); }

extern "C" void gelu_bfloat16(uint16_t* x, int64_t count) { gelu(x, count); }

extern "C" void attend_float(const float* x, const float* kv, float* out, int64_t images,
                             int64_t queries, int64_t keys, int64_t heads, int64_t dim) {
  attend<float, Single, false>(x, kv, out, images, queries, keys, heads, dim);
}

extern "C" void attend_bfloat16(const uint16_t* x, const uint16_t* kv, uint16_t* out,
                                int64_t images, int64_t queries, int64_t keys, int64_t heads,
                                int64_t dim) {
#if defined(__AVX512BF16__)
  attend<uint16_t, Half, true>(x, kv, out, images, queries, keys, heads, dim);
#else
  attend<uint16_t, Single, false>(x, kv, out, images, queries, keys, heads, dim);
#endif
}
