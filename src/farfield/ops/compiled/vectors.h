// Vectors of the machine at hand, powers of two, and numbers as they are stored: float32, bfloat16, float16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX512F__
constexpr int LANES = 16, TALL = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, TALL = 6;
#elif defined(__ARM_NEON)
constexpr int LANES = 4, TALL = 8;
#else
constexpr int LANES = 4, TALL = 6;
#endif
constexpr int64_t PANEL = 2 * LANES;   // columns of a register tile; a tile has TALL rows
constexpr int64_t QUERIES = 64;        // queries worked on at once, and
constexpr int64_t KEYS = 48 * TALL;    // keys: their scores stay in the second level cache
constexpr int64_t NEAR = 96;           // rows of one panel that stay in the first level cache, whatever their stride
constexpr float LOG2E = 1.4426950408889634f;
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

#ifdef __clang__
#define shuffle(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define shuffle_all(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define shuffle(a, b, i, j, k, l) __builtin_shuffle(a, b, FourInts{i, j, k, l})
#define shuffle_all(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

static inline Vector load(const float* p) { return *(const Loose*)p; }
static inline void put(float* p, Vector v) { *(Loose*)p = v; }
static inline Vector all(float x) { return x - Vector{}; }

// 2^x for x <= 0 with a relative error below 2e-7; 0 below -126.5, where the exponent's bits are 0; NaN stays NaN.
static inline Vector exp2_of(Vector x) {
  // The bits of x + magic end in the exponent of the nearest power of two, its bias of 127 included.
  const Vector low = all(-127.0f), magic = all(12582912.0f + 127.0f);
  const Vector y = low > x ? low : x;
  const Vector t = y + magic;
  const Vector f = y - (t - magic);
  Vector p = all(1.3264727e-3f);
  p = p * f + 9.6715126e-3f;
  p = p * f + 5.5507337e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.0f;
  return p * (Vector)((Ints)t << 23);
}

// Storage: float32, bfloat16, float16 --------------------------------------------------------------------------------

enum { FLOAT = 0, BFLOAT = 1, HALF = 2 };

static inline int64_t size_of(int dtype) { return dtype == FLOAT ? 4 : 2; }

static inline float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

static inline float from_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  // Subnormal numbers as integers: a processor that flushes them to zero must not see them as such.
  const float magnitude = rest < 0x400 ? (float)rest * from_bits(0x33800000) : from_bits((rest << 13) + 0x38000000);
  return from_bits(sign | to_bits(magnitude));
}

static inline uint16_t to_half(float f) {
  const uint32_t u = to_bits(f), sign = (u >> 16) & 0x8000;
  const float a = from_bits(u & 0x7fffffff);
  if (a != a) return sign | 0x7e00;
  if (a >= 65520.0f) return sign | 0x7c00;
  if (a < from_bits(0x38800000)) return sign | (uint16_t)std::nearbyint(a * 16777216.0f);  // subnormal
  const uint32_t v = to_bits(a);
  return sign | (uint16_t)((v - 0x38000000 + 0xfff + ((v >> 13) & 1)) >> 13);
}

static inline uint16_t to_bfloat(float f) {
  const uint32_t u = to_bits(f);
  if (f != f) return 0x7fc0;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline void read(const void* from, int64_t at, int dtype, int64_t n, float* to) {
  if (dtype == FLOAT) {
    std::memcpy(to, (const float*)from + at, n * 4);
  } else if (dtype == BFLOAT) {
    const uint16_t* p = (const uint16_t*)from + at;
    for (int64_t i = 0; i < n; i++) to[i] = from_bits((uint32_t)p[i] << 16);
  } else {
    const uint16_t* p = (const uint16_t*)from + at;
    for (int64_t i = 0; i < n; i++) to[i] = from_half(p[i]);
  }
}

static inline void write(void* to, int64_t at, int dtype, int64_t n, const float* from, float factor) {
  if (dtype == FLOAT) {
    float* p = (float*)to + at;
    for (int64_t i = 0; i < n; i++) p[i] = from[i] * factor;
  } else if (dtype == BFLOAT) {
    uint16_t* p = (uint16_t*)to + at;
    for (int64_t i = 0; i < n; i++) p[i] = to_bfloat(from[i] * factor);
  } else {
    uint16_t* p = (uint16_t*)to + at;
    for (int64_t i = 0; i < n; i++) p[i] = to_half(from[i] * factor);
  }
}
