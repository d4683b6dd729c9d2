// Softmax attention of tiles of queries over lists of keys, forward and backward: farfield/ops/tiles.py, compiled.
//
// A list is an array of pointers to rows of keys, so that nothing is gathered. Scores are kept transposed, [keys, queries]:
// then every product is one of two small matrix kernels that read their operands where they lie, the softmax runs along
// contiguous vectors without horizontal sums, and a cell that nobody reads costs nothing.
//
//   scores     S'[k][q]  = sum_d K[k][d] Q'[d][q]        rows()      backward: dP' from V and dO'
//   output     O[q][d]  += sum_k P'[k][q] V[k][d]        columns()   backward: dQ from dS' and K
//   gradients  dV[k][d] += sum_q P'[k][q] dO[q][d]       rows()      and dK from dS' and Q
//
// Arithmetic is float32. Exponentials are powers of two. Everything is deterministic for a given number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

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

// Matrix kernels -----------------------------------------------------------------------------------------------------

// C[i][j..j+PANEL) (+)= sum over t in [from, to) of A[i][t] B[t][j..): H rows of A and C, given by pointers.
template <int H, bool ADD>
static inline void row_tile(const float* const* a, float* const* c, int64_t from, int64_t to, const float* b,
                            int64_t step, int64_t j, const float* bias) {
  Vector sum[H][2];
#pragma GCC unroll 16
  for (int i = 0; i < H; i++) {
    sum[i][0] = ADD ? load(c[i] + j) : all(bias ? bias[i] : 0.0f);
    sum[i][1] = ADD ? load(c[i] + j + LANES) : sum[i][0];
  }
#pragma GCC unroll 4
  for (int64_t t = from; t < to; t++) {
    const Vector b0 = load(b + t * step + j), b1 = load(b + t * step + j + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < H; i++) {
      const Vector x = all(a[i][t]);
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < H; i++) {
    put(c[i] + j, sum[i][0]);
    put(c[i] + j + LANES, sum[i][1]);
  }
}

template <bool ADD, int H = TALL>
static void row_tiles(int height, const float* const* a, float* const* c, int64_t from, int64_t to, const float* b,
                      int64_t step, int64_t first, int64_t width, const float* bias) {
  if constexpr (H > 0) {
    if (height < H) return row_tiles<ADD, H - 1>(height, a, c, from, to, b, step, first, width, bias);
    for (int64_t j = first; j < width; j += PANEL) row_tile<H, ADD>(a, c, from, to, b, step, j, bias);
  }
}

// C[i][..] += sum over k of A[k][i] B[k][..] for H columns i of A; k runs over [0, end) and [again, count).
template <int H>
static inline void column_tile(const float* a, int64_t step, const float* const* b, int64_t end, int64_t again,
                               int64_t count, float* c, int64_t width, int64_t j) {
  Vector sum[H][2];
#pragma GCC unroll 16
  for (int i = 0; i < H; i++) {
    sum[i][0] = load(c + i * width + j);
    sum[i][1] = load(c + i * width + j + LANES);
  }
  for (int part = 0; part < 2; part++) {
    const int64_t stop = part ? count : end;
#pragma GCC unroll 4
    for (int64_t k = part ? again : 0; k < stop; k++) {
      const Vector b0 = load(b[k] + j), b1 = load(b[k] + j + LANES);
      const float* x = a + k * step;
#pragma GCC unroll 16
      for (int i = 0; i < H; i++) {
        const Vector y = all(x[i]);
        sum[i][0] += y * b0;
        sum[i][1] += y * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < H; i++) {
    put(c + i * width + j, sum[i][0]);
    put(c + i * width + j + LANES, sum[i][1]);
  }
}

template <int H = TALL>
static void column_tiles(int height, const float* a, int64_t step, const float* const* b, int64_t end, int64_t again,
                         int64_t count, float* c, int64_t width, int64_t j) {
  if constexpr (H > 0) {
    if (height < H) return column_tiles<H - 1>(height, a, step, b, end, again, count, c, width, j);
    column_tile<H>(a, step, b, end, again, count, c, width, j);
  }
}

// Few queries --------------------------------------------------------------------------------------------------------
//
// Where a span has at most FEW queries, panels of queries would be mostly empty. Scores are then kept as [queries, keys]:
//
//   scores     S[q][k]   = sum_d Q[q][d] K[k][d]         dots()      LANES keys at once, along d
//   output     O[q][d]  += sum_k P[q][k] V[k][d]         mix()       all of d in registers where it fits
//   gradients  dV[k][d] += sum_q P[q][k] dO[q][d]        spread()

constexpr int64_t FEW = PANEL / 2;  // from here on a panel of queries costs no more

// Where lane i of the sum of neighbours of two vectors side by side comes from. Neighbours are lanes within four (which
// move cheaply) where BLOCK is 1, and fours where it is 4.
template <int BLOCK>
constexpr int neighbour(int i, int odd) {
  if (BLOCK == 4) return i / 4 * 8 + odd * 4 + i % 4;
  return i / 4 * 4 + i % 2 * 2 + odd + (i % 4 >= 2 ? LANES : 0);
}

template <int BLOCK, size_t... I>
static inline Vector add_neighbours(Vector a, Vector b, std::index_sequence<I...>) {
  return shuffle_all(a, b, neighbour<BLOCK>(I, 0)...) + shuffle_all(a, b, neighbour<BLOCK>(I, 1)...);
}

// Lane i: the sum of the lanes of x[i].
static inline Vector sums(Vector* x) {
  const std::make_index_sequence<LANES> lanes;
#pragma GCC unroll 16
  for (int i = 0; i < LANES / 2; i++) x[i] = add_neighbours<1>(x[2 * i], x[2 * i + 1], lanes);
#pragma GCC unroll 16
  for (int i = 0; i < LANES / 4; i++) x[i] = add_neighbours<1>(x[2 * i], x[2 * i + 1], lanes);
#pragma GCC unroll 16
  for (int n = LANES / 8; n > 0; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) x[i] = add_neighbours<4>(x[2 * i], x[2 * i + 1], lanes);
  return x[0];
}

// to[q * step + i] = x[q] . row[i] for LANES rows of ``dim`` numbers; x is [queries, dim].
static inline void dots(const float* x, int64_t queries, const float* const* row, int64_t dim, float* to, int64_t step) {
  for (int64_t q = 0; q < queries; q++, x += dim, to += step) {
    Vector sum[LANES] = {};
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
      const Vector y = load(x + d);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) sum[i] += y * load(row[i] + d);
    }
    put(to, sums(sum));
    for (; d < dim; d++)
      for (int i = 0; i < LANES; i++) to[i] += x[d] * row[i][d];
  }
}

// into[q][j..j + W vectors) += sum over n keys of weights[q][k] row[k][j..) for H queries.
template <int H, int W>
static inline void mix_tile(const float* weights, int64_t step, const float* const* row, int64_t n, float* into,
                            int64_t wide, int64_t j) {
  Vector sum[H][W];
#pragma GCC unroll 16
  for (int i = 0; i < H * W; i++) sum[i / W][i % W] = load(into + i / W * wide + j + i % W * LANES);
  for (int64_t k = 0; k < n; k++) {
    Vector y[W];
#pragma GCC unroll 16
    for (int v = 0; v < W; v++) y[v] = load(row[k] + j + v * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < H; i++) {
      const Vector x = all(weights[i * step + k]);
#pragma GCC unroll 16
      for (int v = 0; v < W; v++) sum[i][v] += x * y[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < H * W; i++) put(into + i / W * wide + j + i % W * LANES, sum[i / W][i % W]);
}

template <int H, int W>
static inline void mix_rows(const float* weights, int64_t step, const float* const* row, int64_t n, float* into,
                            int64_t wide) {
  int64_t j = 0;
  for (; j + W * LANES <= wide; j += W * LANES) mix_tile<H, W>(weights, step, row, n, into, wide, j);
  for (; j < wide; j += PANEL) mix_tile<H, 2>(weights, step, row, n, into, wide, j);
}

static void mix(const float* weights, int64_t queries, int64_t step, const float* const* row, int64_t n, float* into,
                int64_t wide) {
  for (int64_t q = 0; q < queries; q += 4, weights += 4 * step, into += 4 * wide) {
    if (queries - q == 1) mix_rows<1, 8>(weights, step, row, n, into, wide);
    else if (queries - q == 2) mix_rows<2, 4>(weights, step, row, n, into, wide);
    else if (queries - q == 3) mix_rows<3, 4>(weights, step, row, n, into, wide);
    else mix_rows<4, 2>(weights, step, row, n, into, wide);
  }
}

// row[k][..] += sum over queries of weights[q][k] x[q][..] for n keys, one after the other: a list may hold a row twice.
static void spread(const float* weights, int64_t queries, int64_t step, const float* x, float* const* row, int64_t n,
                   int64_t wide) {
  for (int64_t k = 0; k < n; k++)
    for (int64_t d = 0; d < wide; d += LANES) {
      Vector sum = load(row[k] + d);
      for (int64_t q = 0; q < queries; q++) sum += all(weights[q * step + k]) * load(x + q * wide + d);
      put(row[k] + d, sum);
    }
}

// Calls --------------------------------------------------------------------------------------------------------------

extern "C" {

struct Store {
  const void *keys, *values;            // [shared, rows, width, D]
  float *grad_keys, *grad_values;       // the same in float32, added to; backward only
  const int64_t* table;                 // [tables, U, places], -1: none
  // tables: 1 or G. shared: a divisor of G, the number of groups of keys; G itself in the backward pass.
  int64_t rows, width, places, dtype, tables, shared;
};

struct Call {
  int64_t groups, repeat, units, queries, dim, batch, list;  // G, r, U, M, D, B, K
  const Store* stores;
  int64_t number;                       // of stores
  const void* query;                    // [G, r, U, M, D]
  const float* key_bias;                // [biases, U, K] or null
  int64_t biases;                       // 1, B or G
  const float* head_bias;               // [G / B, r, K] or null
  const float* row_bias;                // [classes, M, biased] or null
  int64_t classes, biased;
  const int64_t* row_class;             // [U] or null
  void* out;                            // [G, r, U, M, D]
  float* lse;                           // [G, r, U, M]; read by the backward pass
  const void* grad_out;                 // backward only, from here on
  const float* delta;
  void* grad_query;
  float* grad_head;                     // [G / B, r, K], added to
  int64_t dtype, threads;
  float scale;
};

}  // extern "C"

static inline int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

static inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory that a thread keeps from call to call (under a megabyte or two): taking it fresh would cost more than a short
// call. Floats from the start of a line of the cache are handed out one after another.
struct Scratch {
  struct Kept {
    void* memory = nullptr;
    size_t floats = 0;
    ~Kept() { std::free(memory); }
  };
  float* next = nullptr;

  void start(size_t floats) {
    static thread_local Kept kept;
    if (kept.floats < floats) {
      std::free(kept.memory);
      kept.floats = 0;
      kept.memory = std::malloc((floats + 16) * 4);
      if (!kept.memory) throw std::bad_alloc();
      kept.floats = floats;
    }
    next = (float*)up_to((int64_t)(uintptr_t)kept.memory, 64);
  }
  float* take(int64_t floats) {
    float* p = next;
    next += floats;
    return p;
  }
};

// The causal (or other) bias inside a block, transposed and times log2(e), the first query that each key is seen by, and
// the end of the queries that have a bias.
struct RowBias {
  std::vector<float> bias;              // [classes, biased, M]
  std::vector<int64_t> first;           // [classes, biased]
  std::vector<int64_t> until;           // [classes, biased]

  explicit RowBias(const Call& c) {
    if (!c.row_bias) return;
    bias.resize(c.classes * c.biased * c.queries);
    first.assign(c.classes * c.biased, c.queries);
    until.assign(c.classes * c.biased, 0);
    for (int64_t i = 0; i < c.classes; i++)
      for (int64_t m = 0; m < c.queries; m++)
        for (int64_t k = 0; k < c.biased; k++) {
          const float x = c.row_bias[(i * c.queries + m) * c.biased + k];
          bias[(i * c.biased + k) * c.queries + m] = x * LOG2E;
          if (x != 0.0f) until[i * c.biased + k] = m + 1;
          int64_t& f = first[i * c.biased + k];
          if (x != NONE && f > m) f = m;
        }
  }
};

// What one unit reads: a row of key and value (and of their gradients) for every key that is not hidden, its biases, and
// the first query that sees it. The first ``lead`` keys are seen by fewer and fewer queries: the causal triangle.
struct List {
  std::vector<const void*> keys, values;
  std::vector<float*> grad_keys, grad_values;
  std::vector<float> bias;
  std::vector<int64_t> column, first;
  std::vector<int> dtype;
  int64_t count = 0, lead = 0;

  explicit List(int64_t most)
      : keys(most + LANES), values(most + LANES), grad_keys(most), grad_values(most), bias(most + LANES), column(most),
        first(most), dtype(most) {}

  // ``extra``: other memory for the gradients, in which those of store s begin at offsets[2 s] and offsets[2 s + 1].
  void read(const Call& c, const RowBias& rows, int64_t g, int64_t u, const float* extra, const int64_t* offsets) {
    const int64_t of_bias = g / (c.groups / c.biases);
    const float* shown = c.key_bias ? c.key_bias + (of_bias * c.units + u) * c.list : nullptr;
    const int64_t kind = c.row_class ? c.row_class[u] : 0;
    // Lists are long beside the work of a few queries. Where no key has a bias of its own there is nothing to look up for
    // single keys, and their biases and first queries stay 0, as they were made.
    const bool plain = !shown && !c.row_bias;
    const void **const key_at = keys.data(), **const value_at = values.data();
    int64_t *const column_at = column.data(), *const first_at = first.data(), col = 0, n = 0, leading = 0;
    float *const bias_at = bias.data(), **const grad_key_at = grad_keys.data(), **const grad_value_at = grad_values.data();
    int* const dtype_at = dtype.data();
    const int64_t *const seen_from = rows.first.data() + kind * c.biased, biased = c.row_bias ? c.biased : 0;
    for (int64_t s = 0; s < c.number; s++) {
      const Store store = c.stores[s];
      const int64_t wide = c.dim * size_of((int)store.dtype), base = g / (c.groups / store.shared) * store.rows;
      const int64_t* table = store.table + ((store.tables == 1 ? 0 : g * c.units) + u) * store.places;
      // The gradients of a further part of the units go to their own memory, laid out like the stores.
      float* const to_keys = extra ? (float*)extra + offsets[2 * s] : store.grad_keys;
      float* const to_values = extra ? (float*)extra + offsets[2 * s + 1] : store.grad_values;
      for (int64_t p = 0; p < store.places; p++) {
        if (table[p] < 0) {
          col += store.width;
          continue;
        }
        const int64_t begin = (base + table[p]) * store.width;
        for (int64_t at = begin; at < begin + store.width; at++, col++) {
          if (!plain) {
            const float b = shown ? shown[col] : 0.0f;
            if (b == NONE) continue;
            const int64_t f = col < biased ? seen_from[col] : 0;
            if (f >= c.queries) continue;
            bias_at[n] = b * LOG2E;
            first_at[n] = f;
            if (leading == n && col < biased && (n == 0 || f >= first_at[n - 1])) leading++;
          }
          key_at[n] = (const char*)store.keys + at * wide;
          value_at[n] = (const char*)store.values + at * wide;
          if (store.grad_keys) grad_key_at[n] = to_keys + at * c.dim, grad_value_at[n] = to_values + at * c.dim;
          column_at[n] = col;
          dtype_at[n] = (int)store.dtype;
          n++;
        }
      }
    }
    count = n, lead = leading;
  }
};

// Queries that are worked on at once: rows [from, to) of the r * M of a unit, cut so that few spans cross heads.
struct Span {
  int64_t from, to;
};

static std::vector<Span> spans(const Call& c) {
  std::vector<Span> out;
  if (2 * c.queries > QUERIES) {
    const int64_t cuts = (c.queries + QUERIES - 1) / QUERIES, size = (c.queries + cuts - 1) / cuts;
    for (int64_t h = 0; h < c.repeat; h++)
      for (int64_t m = 0; m < c.queries; m += size)
        out.push_back({h * c.queries + m, h * c.queries + std::min(m + size, c.queries)});
  } else {
    const int64_t heads = QUERIES / c.queries;
    for (int64_t h = 0; h < c.repeat; h += heads)
      out.push_back({h * c.queries, std::min(h + heads, c.repeat) * c.queries});
  }
  return out;
}

// One task's view of the work: buffers, and the steps that forward and backward share.
struct Worker {
  const Call& c;
  const RowBias& rows;
  const int64_t wide, high, step;       // D and the number of queries, rounded up to a panel; stride of [.., queries]
  const bool backward, in_place;        // rows are read, and their gradients added to, where they lie
  List list;
  Scratch scratch;
  float *query_t, *scores, *keys, *values, *top, *total, *out;
  float *query, *grad, *grad_t, *grad_scores, *grad_query, *grad_keys, *grad_values, *delta;
  std::vector<const float*> key_copy, value_copy;
  std::vector<float*> score_row, grad_score_row, grad_key_copy, grad_value_copy;
  const float **key_row, **value_row;   // of the keys at hand: in the list, or copies
  float **grad_key_row, **grad_value_row;
  std::vector<int64_t> start, seen;     // of every key: see score()
  int64_t g = 0, u = 0;
  Span span{0, 0};
  std::vector<int64_t> place;           // of every row of the span in [G, r, U, M]

  Worker(const Call& call, const RowBias& row_bias, bool back)
      : c(call), rows(row_bias), wide(up_to(call.dim, PANEL)),
        high(up_to(std::min(QUERIES, call.queries * call.repeat), PANEL)),
        step(high + PANEL),  // not a power of two, or the rows of a panel would share the sets of the cache
        backward(back), in_place(call.dim == wide && floats(call)), list(call.list),
        key_copy(KEYS), value_copy(KEYS), score_row(KEYS), grad_score_row(KEYS), grad_key_copy(KEYS),
        grad_value_copy(KEYS), start(KEYS), seen(KEYS), place(std::max(QUERIES, high)) {
    const int64_t small = wide * step, tall = KEYS * step, copies = KEYS * wide;
    scratch.start(6 * small + 2 * tall + 4 * copies + 4 * high);
    query_t = scratch.take(small), out = scratch.take(small), scores = scratch.take(tall);
    keys = scratch.take(copies), values = scratch.take(copies);
    top = scratch.take(high), total = scratch.take(high), delta = scratch.take(high);
    query = scratch.take(small), grad = scratch.take(small), grad_t = scratch.take(small);
    grad_query = scratch.take(small), grad_scores = scratch.take(tall);
    grad_keys = scratch.take(copies), grad_values = scratch.take(copies);
  }

  static bool floats(const Call& c) {
    return std::all_of(c.stores, c.stores + c.number, [](const Store& store) { return store.dtype == FLOAT; });
  }

  int64_t size() const { return span.to - span.from; }

  // Turns to a span of the unit.
  void turn(const Span& next) {
    span = next;
    int64_t head = span.from / c.queries, m = span.from % c.queries;
    for (int64_t i = 0; i < size(); i++) {
      place[i] = ((g * c.repeat + head) * c.units + u) * c.queries + m;
      if (++m == c.queries) m = 0, head++;
    }
  }

  // Rows of the span of a [G, r, U, M, D] tensor as a matrix [rows, wide], 0 where there is none: where they lie, or else
  // copied into ``to``.
  const float* matrix(const void* from, float* to, float factor) {
    if (factor == 1.0f && c.dtype == FLOAT && c.dim == wide && size() == high && one_head())
      return (const float*)from + place[0] * c.dim;
    for (int64_t i = 0; i < size(); i++) {
      read(from, place[i] * c.dim, (int)c.dtype, c.dim, to + i * wide);
      if (factor != 1.0f)
        for (int64_t d = 0; d < c.dim; d++) to[i * wide + d] *= factor;
      for (int64_t d = c.dim; d < wide; d++) to[i * wide + d] = 0.0f;
    }
    std::memset(to + size() * wide, 0, (high - size()) * wide * 4);
    return to;
  }

  // to[d][i] = from[i][d] * factor, four by four
  void transpose(const float* from, float* to, float factor) {
    for (int64_t i = 0; i < high; i += 4)
      for (int64_t d = 0; d < wide; d += 4) {
        Four r[4];
        for (int j = 0; j < 4; j++) std::memcpy(&r[j], from + (i + j) * wide + d, 16), r[j] *= factor;
        const Four a = shuffle(r[0], r[1], 0, 4, 1, 5), b = shuffle(r[0], r[1], 2, 6, 3, 7);
        const Four e = shuffle(r[2], r[3], 0, 4, 1, 5), f = shuffle(r[2], r[3], 2, 6, 3, 7);
        const Four t[4] = {shuffle(a, e, 0, 1, 4, 5), shuffle(a, e, 2, 3, 6, 7), shuffle(b, f, 0, 1, 4, 5),
                           shuffle(b, f, 2, 3, 6, 7)};
        for (int j = 0; j < 4; j++) std::memcpy(to + (d + j) * step + i, &t[j], 16);
      }
  }

  // Points key_row and value_row at keys [from, from + n) of the list, copied where they cannot be read in place.
  void fetch(int64_t from, int64_t n) {
    if (in_place) {
      key_row = (const float**)list.keys.data() + from, value_row = (const float**)list.values.data() + from;
      grad_key_row = list.grad_keys.data() + from, grad_value_row = list.grad_values.data() + from;
      return;
    }
    key_row = key_copy.data(), value_row = value_copy.data();
    grad_key_row = grad_key_copy.data(), grad_value_row = grad_value_copy.data();
    for (int64_t i = 0; i < n; i++) {
      const int64_t k = from + i;
      if (list.dtype[k] == FLOAT && c.dim == wide) {
        key_row[i] = (const float*)list.keys[k], value_row[i] = (const float*)list.values[k];
        if (backward) grad_key_row[i] = list.grad_keys[k], grad_value_row[i] = list.grad_values[k];
        continue;
      }
      float *a = keys + i * wide, *b = values + i * wide;
      read(list.keys[k], 0, list.dtype[k], c.dim, a), read(list.values[k], 0, list.dtype[k], c.dim, b);
      for (int64_t d = c.dim; d < wide; d++) a[d] = b[d] = 0.0f;
      key_row[i] = a, value_row[i] = b;
      if (backward) {
        if (c.dim == wide) {
          grad_key_row[i] = list.grad_keys[k], grad_value_row[i] = list.grad_values[k];
        } else {
          grad_key_row[i] = grad_keys + i * wide, grad_value_row[i] = grad_values + i * wide;
          std::memset(grad_key_row[i], 0, wide * 4), std::memset(grad_value_row[i], 0, wide * 4);
        }
      }
    }
  }

  // Adds the gradients of copied rows to where they belong.
  void give_back(int64_t from, int64_t n) {
    if (c.dim == wide) return;
    for (int64_t i = 0; i < n; i++)
      for (int64_t d = 0; d < c.dim; d++) {
        list.grad_keys[from + i][d] += grad_key_row[i][d];
        list.grad_values[from + i][d] += grad_value_row[i][d];
      }
  }

  bool one_head() const { return span.from / c.queries == (span.to - 1) / c.queries; }

  // Biased scores, times log2(e), of keys [from, from + n): scores[k][i]. seen[k]: the first query that sees a key;
  // start[k]: the first one that its tile of rows was computed for.
  void score(int64_t from, int64_t n) {
    const int64_t offset = span.from % c.queries;
    const bool triangle = one_head();
    for (int64_t k = 0; k < n; k++) {
      seen[k] = triangle ? std::max<int64_t>(0, list.first[from + k] - offset) : 0;
      score_row[k] = scores + k * step;
    }
    for (int64_t i = 0; i < n; i += TALL) {
      const int64_t tall = std::min<int64_t>(TALL, n - i);
      int64_t first = high;
      for (int64_t k = i; k < i + tall; k++) first = std::min(first, seen[k] / PANEL * PANEL);
      for (int64_t k = i; k < i + tall; k++) start[k] = first;
      row_tiles<false>((int)tall, key_row + i, score_row.data() + i, 0, c.dim, query_t, step, first, high,
                       list.bias.data() + from + i);
    }
    if (!c.head_bias && !c.row_bias) return;
    const int64_t head_of_group = g % (c.groups / c.batch), biased = c.row_bias ? c.biased : 0;
    const int64_t kind = biased && c.row_class ? c.row_class[u] * biased : 0;
    for (int64_t i = 0, end; i < size(); i = end) {
      const int64_t head = (span.from + i) / c.queries, m = (span.from + i) % c.queries;
      const float* const of_head = c.head_bias ? c.head_bias + (head_of_group * c.repeat + head) * c.list : nullptr;
      end = std::min(size(), i + c.queries - m);
      for (int64_t k = 0; k < n; k++) {
        const int64_t col = list.column[from + k], first = std::max(i, start[k]);
        float* const row = scores + k * step;
        const float x = of_head ? of_head[col] * LOG2E : 0.0f;
        if (x != 0.0f)
          for (int64_t e = first; e < end; e++) row[e] += x;
        if (col >= biased) continue;
        const float* const b = rows.bias.data() + (kind + col) * c.queries + m - i;
        const int64_t last = std::min(end, rows.until[kind + col] - m + i);
        for (int64_t e = first; e < last; e++) row[e] += b[e];
      }
    }
  }

  // into[i][..] += sum over keys of weights[k][i] row[k][..], for keys [from, from + n).
  void gather(const float* weights, const float* const* row, float* into, int64_t from, int64_t n) {
    for (int64_t first = 0; first < n; first += NEAR) {
      const int64_t count = std::min(NEAR, n - first);
      const int64_t lead = std::max<int64_t>(0, std::min(count, list.lead - from - first));
      for (int64_t j = 0; j < wide; j += PANEL)
        for (int64_t i = 0, end = 0; i < size(); i += TALL) {
          const int64_t tall = std::min<int64_t>(TALL, size() - i);
          while (end < lead && seen[first + end] < i + tall) end++;
          column_tiles((int)tall, weights + first * step + i, step, row + first, end, lead, count, into + i * wide, wide, j);
        }
    }
  }

  // row[k][..] += sum over queries of weights[k][i] x[i][..]. A tile loads all its rows before it stores any, so a row
  // that a list holds twice (some queries of a unit may see one place, others another) has to be added to one by one.
  void scatter(float* const* weights, const float* x, float* const* row, int64_t n) {
    for (int64_t i = 0; i < n; i += TALL) {
      const int64_t end = std::min<int64_t>(i + TALL, n);
      bool distinct = true;
      for (int64_t a = i; a < end; a++)
        for (int64_t b = i; b < a; b++) distinct &= row[a] != row[b];
      const int64_t tall = distinct ? end - i : 1;
      for (int64_t k = i; k < end; k += tall)
        row_tiles<true>((int)tall, weights + k, row + k, start[k], size(), x, wide, 0, wide, nullptr);
    }
  }

  // Turns the scores of n keys into weights, of which every query's largest so far is 1; what ``before`` has been added up
  // shrinks to them. On its own, so that the constants stay in registers.
  __attribute__((noinline)) void weigh(int64_t n, bool before) {
    for (int64_t i = 0; i < high; i += PANEL) {
      // Two vectors at a time: one line of the cache. The keys of a tile of rows are seen together, or not at all.
      float* const panel = scores + i;
      Vector most[2] = {load(top + i), load(top + i + LANES)};
      for (int64_t k = 0; k < n; k += TALL)
        for (int64_t e = k; start[k] <= i && e < std::min<int64_t>(k + TALL, n); e++)
          for (int v = 0; v < 2; v++) {
            const Vector s = load(panel + e * step + v * LANES);
            most[v] = s > most[v] ? s : most[v];
          }
      Vector shift[2], shrink[2], sum[2];
      for (int v = 0; v < 2; v++) {
        shift[v] = most[v] == all(NONE) ? Vector{} : most[v];
        shrink[v] = exp2_of(load(top + i + v * LANES) - shift[v]);
        sum[v] = load(total + i + v * LANES) * shrink[v];
      }
      for (int64_t k = 0; k < n; k += TALL) {
        const int64_t end = std::min<int64_t>(k + TALL, n);
        if (start[k] > i) {
          for (int64_t e = k; e < end; e++) put(panel + e * step, Vector{}), put(panel + e * step + LANES, Vector{});
          continue;
        }
        for (int64_t e = k; e < end; e++)
          for (int v = 0; v < 2; v++) {
            float* const p = panel + e * step + v * LANES;
            const Vector w = exp2_of(load(p) - shift[v]);
            sum[v] += w;
            put(p, w);
          }
      }
      for (int v = 0; v < 2; v++) {
        put(top + i + v * LANES, most[v]), put(total + i + v * LANES, sum[v]);
        for (int64_t e = 0; before && e < LANES; e++)
          for (int64_t d = 0; d < wide; d++) out[(i + v * LANES + e) * wide + d] *= shrink[v][e];
      }
    }
  }

  void forward_span() {
    if (size() <= FEW) return forward_few();
    transpose(matrix(c.query, out, 1.0f), query_t, c.scale * LOG2E);
    std::memset(out, 0, high * wide * 4);
    for (int64_t i = 0; i < high; i++) top[i] = NONE, total[i] = 0.0f;
    for (int64_t from = 0; from < list.count; from += KEYS) {
      const int64_t n = std::min(KEYS, list.count - from);
      fetch(from, n);
      score(from, n);
      weigh(n, from > 0);
      gather(scores, value_row, out, from, n);
    }
    finish();
  }

  // Writes the output and the logarithm of the sum.
  void finish() {
    for (int64_t i = 0; i < size(); i++) {
      const bool none = total[i] == 0.0f;
      c.lse[place[i]] = none ? NONE : (std::log2(total[i]) + top[i]) / LOG2E;
      write(c.out, place[i] * c.dim, (int)c.dtype, c.dim, out + i * wide, none ? 1.0f : 1.0f / total[i]);
    }
  }

  void backward_span(float* grad_head) {
    if (size() <= FEW) return backward_few(grad_head);
    matrix(c.query, query, c.scale);
    transpose(query, query_t, LOG2E);
    const float* const grad_rows = matrix(c.grad_out, grad, 1.0f);
    transpose(grad_rows, grad_t, 1.0f);
    std::memset(grad_query, 0, high * wide * 4);
    for (int64_t i = 0; i < high; i++) {
      const float x = i < size() ? c.lse[place[i]] : NONE;
      top[i] = x == NONE ? -NONE : x * LOG2E;  // a query that sees nothing gives every key the weight 0
      delta[i] = i < size() ? c.delta[place[i]] : 0.0f;
    }
    for (int64_t from = 0; from < list.count; from += KEYS) {
      const int64_t n = std::min(KEYS, list.count - from);
      fetch(from, n);
      score(from, n);
      for (int64_t i = 0; i < n; i += TALL) {
        for (int64_t k = i; k < std::min<int64_t>(i + TALL, n); k++) grad_score_row[k] = grad_scores + k * step;
        row_tiles<false>((int)std::min<int64_t>(TALL, n - i), value_row + i, grad_score_row.data() + i, 0, c.dim,
                         grad_t, step, start[i], high, nullptr);
      }
      for (int64_t k = 0; k < n; k++) {
        float *s = scores + k * step, *t = grad_scores + k * step;
        for (int64_t i = 0; i < start[k]; i += LANES) put(s + i, Vector{}), put(t + i, Vector{});
#pragma GCC unroll 2
        for (int64_t i = start[k]; i < high; i += LANES) {
          // No weight is above 1, but scores of 1e5 are rounded so far that their difference can say so.
          const Vector x = load(s + i) - load(top + i);
          const Vector w = exp2_of(x > Vector{} ? Vector{} : x);
          put(s + i, w);
          put(t + i, w * (load(t + i) - load(delta + i)));
        }
      }
      gather(grad_scores, key_row, grad_query, from, n);
      scatter(score_row.data(), grad_rows, grad_value_row, n);
      scatter(grad_score_row.data(), query, grad_key_row, n);
      give_back(from, n);
      if (grad_head)
        for (int64_t k = 0; k < n; k++)
          for (int64_t i = 0; i < size();) {
            const int64_t at = span.from + i, head = at / c.queries;
            const int64_t end = std::min(size(), i + c.queries - at % c.queries);
            float sum = 0.0f;
            for (; i < end; i++) sum += grad_scores[k * step + i];
            grad_head[head * c.list + list.column[from + k]] += sum;
          }
    }
    for (int64_t i = 0; i < size(); i++)
      write(c.grad_query, place[i] * c.dim, (int)c.dtype, c.dim, grad_query + i * wide, c.scale);
  }

  // Products of a few rows with keys or values [from, from + n): to[q][k], for whole vectors of keys. ``other`` is what
  // will be read after them. Rows lie anywhere and the processor does not guess where: they are asked for ahead, unless
  // one query leaves so little to do meanwhile that asking takes longer.
  void products(const float* x, const float** row, const float* const* other, int64_t n, float* to) {
    for (int64_t k = n; k < up_to(n, LANES); k++) row[k] = row[n - 1];
    for (int64_t k = 0; k < n; k += LANES) {
      for (int64_t i = k; size() > 1 && i < std::min(k + LANES, n); i++)
        for (int64_t d = 0; d < wide; d += 16) {
          __builtin_prefetch(row[std::min(i + 16, n - 1)] + d);
          __builtin_prefetch(other[i] + d);
        }
      dots(x, size(), row + k, wide, to + k, KEYS);
    }
  }

  // score() for a few queries: scores[q][k], -inf behind the last key.
  void score_few(int64_t from, int64_t n) {
    products(query, key_row, value_row, n, scores);
    for (int64_t i = 0; i < size(); i++) {
      float* row = scores + i * KEYS;
      for (int64_t k = 0; k < n; k += LANES)
        put(row + k, load(row + k) * all(LOG2E) + load(list.bias.data() + from + k));
      for (int64_t k = n; k < up_to(n, LANES); k++) row[k] = NONE;
      const int64_t at = span.from + i, head = at / c.queries, m = at % c.queries;
      if (c.head_bias) {
        const float* b = c.head_bias + (g % (c.groups / c.batch) * c.repeat + head) * c.list;
        for (int64_t k = 0; k < n; k++) row[k] += b[list.column[from + k]] * LOG2E;
      }
      if (c.row_bias) {
        const int64_t kind = (c.row_class ? c.row_class[u] : 0) * c.biased;
        for (int64_t k = 0; k < n; k++) {
          const int64_t col = list.column[from + k];
          if (col < c.biased) row[k] += rows.bias[(kind + col) * c.queries + m];
        }
      }
    }
  }

  void forward_few() {
    matrix(c.query, query, c.scale);
    std::memset(out, 0, size() * wide * 4);
    for (int64_t i = 0; i < size(); i++) top[i] = NONE, total[i] = 0.0f;
    for (int64_t from = 0; from < list.count; from += KEYS) {
      const int64_t n = std::min(KEYS, list.count - from);
      fetch(from, n);
      score_few(from, n);
      for (int64_t i = 0; i < size(); i++) {
        float *row = scores + i * KEYS, most = top[i], whole = 0.0f;
        Vector peak = all(NONE), sum{};
        for (int64_t k = 0; k < n; k += LANES) {
          const Vector s = load(row + k);
          peak = s > peak ? s : peak;
        }
        for (int e = 0; e < LANES; e++) most = peak[e] > most ? peak[e] : most;
        const float shift = most == NONE ? 0.0f : most, shrink = exp2_of(all(top[i] - shift))[0];
        for (int64_t k = 0; k < n; k += LANES) {
          const Vector w = exp2_of(load(row + k) - all(shift));
          sum += w;
          put(row + k, w);
        }
        for (int e = 0; e < LANES; e++) whole += sum[e];
        top[i] = most, total[i] = total[i] * shrink + whole;
        for (int64_t d = 0; from && d < wide; d++) out[i * wide + d] *= shrink;
      }
      mix(scores, size(), KEYS, value_row, n, out, wide);
    }
    finish();
  }

  void backward_few(float* grad_head) {
    matrix(c.query, query, c.scale);
    const float* const grad_rows = matrix(c.grad_out, grad, 1.0f);
    std::memset(grad_query, 0, size() * wide * 4);
    for (int64_t from = 0; from < list.count; from += KEYS) {
      const int64_t n = std::min(KEYS, list.count - from);
      fetch(from, n);
      score_few(from, n);
      products(grad_rows, value_row, key_row, n, grad_scores);
      for (int64_t i = 0; i < size(); i++) {
        float *s = scores + i * KEYS, *t = grad_scores + i * KEYS;
        const float x = c.lse[place[i]];
        const Vector most = all(x == NONE ? -NONE : x * LOG2E), less = all(c.delta[place[i]]);
        for (int64_t k = 0; k < n; k += LANES) {
          const Vector y = load(s + k) - most, w = exp2_of(y > Vector{} ? Vector{} : y);
          put(s + k, w);
          put(t + k, w * (load(t + k) - less));
        }
        for (int64_t k = 0; grad_head && k < n; k++)
          grad_head[(span.from + i) / c.queries * c.list + list.column[from + k]] += t[k];
      }
      mix(grad_scores, size(), KEYS, key_row, n, grad_query, wide);
      spread(scores, size(), KEYS, grad_rows, grad_value_row, n, wide);
      spread(grad_scores, size(), KEYS, query, grad_key_row, n, wide);
      give_back(from, n);
    }
    for (int64_t i = 0; i < size(); i++)
      write(c.grad_query, place[i] * c.dim, (int)c.dtype, c.dim, grad_query + i * wide, c.scale);
  }
};

// Runs what may run out of memory; 1 where it did. Nothing may be thrown inside a parallel region: what it needs is
// taken before.
template <class F>
static int guarded(F work) {
  try {
    work();
    return 0;
  } catch (...) {
    return 1;
  }
}

// A worker for every thread, or none of them: where one cannot be had, ``failed`` says so to all.
static std::unique_ptr<Worker> hire(const Call& c, const RowBias& rows, bool backward, bool& failed) {
  std::unique_ptr<Worker> worker;
  try {
    worker.reset(new Worker(c, rows, backward));
  } catch (...) {
#pragma omp atomic write
    failed = true;
  }
#pragma omp barrier
  return worker;
}

static void attend(const Call& c) {
  const RowBias rows(c);
  const std::vector<Span> cut = spans(c);
  const int64_t run = std::max<int64_t>(1, std::min<int64_t>(16, c.units * c.groups / (16 * c.threads)));
  const int64_t runs = (c.units + run - 1) / run, tasks = c.groups * runs;
  bool failed = false;
#pragma omp parallel num_threads((int)c.threads)
  {
    const std::unique_ptr<Worker> hired = hire(c, rows, false, failed);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < (failed ? 0 : tasks); task++) {
      Worker& worker = *hired;
      worker.g = task / runs;
      const int64_t first = task % runs * run;
      for (worker.u = first; worker.u < std::min(first + run, c.units); worker.u++) {
        worker.list.read(c, rows, worker.g, worker.u, nullptr, nullptr);
        for (const Span& span : cut) {
          worker.turn(span);
          worker.forward_span();
        }
      }
    }
  }
  if (failed) throw std::bad_alloc();
}

extern "C" int farfield_attend(const Call* call) {
  return guarded([=] { attend(*call); });
}

// Gradients of keys and values. Different groups share no keys, so that every group is a task of its own; where there
// are fewer groups than threads, the units of a group are cut into parts, whose gradients are kept apart and added in
// order: never with atomics, so that results repeat.
constexpr int64_t PARTS = 8;  // at most: each has memory of its own

struct Parts {
  int64_t count;
  std::vector<int64_t> offsets;                          // of keys and values of every store in the memory of a part
  std::vector<std::pair<float*, int64_t>> owners;        // distinct gradient buffers and their sizes
  std::vector<std::unique_ptr<float, decltype(&std::free)>> memory;  // of all parts but the first

  explicit Parts(const Call& c) {
    count = std::max<int64_t>(1, std::min({(c.threads + c.groups - 1) / c.groups, PARTS, c.units}));
    int64_t floats = 0;
    for (int64_t s = 0; s < c.number; s++)
      for (float* buffer : {c.stores[s].grad_keys, c.stores[s].grad_values}) {
        int64_t at = -1, sum = 0;
        for (const auto& owner : owners) {
          if (owner.first == buffer) at = sum;
          sum += owner.second;
        }
        if (at < 0) {
          at = floats;
          owners.push_back({buffer, c.groups * c.stores[s].rows * c.stores[s].width * c.dim});
          floats += owners.back().second;
        }
        offsets.push_back(at);
      }
    for (int64_t p = 1; p < count; p++) {
      memory.emplace_back((float*)std::calloc(std::max<int64_t>(floats, 1), 4), &std::free);
      if (!memory.back()) throw std::bad_alloc();
    }
  }
  const float* extra(int64_t part) const { return part ? memory[part - 1].get() : nullptr; }
};

static void attend_backward(const Call& c) {
  const RowBias rows(c);
  const std::vector<Span> cut = spans(c);
  const Parts parts(c);
  bool failed = false;
  const int64_t tasks = c.groups * parts.count, heads = c.grad_head ? c.repeat * c.list : 0;
  std::vector<float> head_sums(heads * tasks);
#pragma omp parallel num_threads((int)c.threads)
  {
    const std::unique_ptr<Worker> hired = hire(c, rows, true, failed);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < (failed ? 0 : tasks); task++) {
      Worker& worker = *hired;
      const int64_t part = task % parts.count;
      worker.g = task / parts.count;
      for (worker.u = c.units * part / parts.count; worker.u < c.units * (part + 1) / parts.count; worker.u++) {
        worker.list.read(c, rows, worker.g, worker.u, parts.extra(part), parts.offsets.data());
        for (const Span& span : cut) {
          worker.turn(span);
          worker.backward_span(heads ? head_sums.data() + task * heads : nullptr);
        }
      }
    }
    for (int64_t p = 1; p < parts.count; p++) {
      const float* from = parts.extra(p);
      for (const auto& owner : parts.owners) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < owner.second; i++) owner.first[i] += from[i];
        from += owner.second;
      }
    }
  }
  if (failed) throw std::bad_alloc();
  for (int64_t task = 0; heads && task < tasks; task++) {
    float* to = c.grad_head + (task / parts.count) % (c.groups / c.batch) * heads;
    for (int64_t i = 0; i < heads; i++) to[i] += head_sums[task * heads + i];
  }
}

extern "C" int farfield_attend_backward(const Call* call) {
  return guarded([=] { attend_backward(*call); });
}

// Pyramids -----------------------------------------------------------------------------------------------------------

extern "C" {

struct Reduction {
  int64_t groups, heads, batches, dim, cells, children, dtype, threads;  // batches: of coefficients, 0: none
  int64_t below_stride, stride;         // floats (elements) between groups, of what is below and of the cells
  const int32_t* table;                 // [cells, children], -1: none
  const float* coefficients;            // [batches, cells, children] or null
  const float* weight;                  // [weight_heads, children, D] or null: 1 / children
  int64_t weight_heads;
  const void* from;                     // [G, below, D]
  float* to;                            // [G, cells, D]: written by up, read by down
  float* grad_from;                     // [G, below, D], added to
  float* grad_weight;                   // [weight_heads, children, D], added to, or null
};

}  // extern "C"

struct Cell {
  const Reduction& r;
  int64_t g;
  const float* weight;
  const float* coefficients;

  Cell(const Reduction& reduction, int64_t group) : r(reduction), g(group) {
    const int64_t head = g % r.heads, batch = g / r.heads;
    weight = r.weight ? r.weight + (r.weight_heads == 1 ? 0 : head) * r.children * r.dim : nullptr;
    coefficients =
        r.coefficients ? r.coefficients + (r.batches == 1 ? 0 : batch) * r.cells * r.children : nullptr;
  }
  float coefficient(int64_t cell, int64_t i) const { return coefficients ? coefficients[cell * r.children + i] : 1.0f; }
};

constexpr int64_t RUN = 512;      // cells to a task
constexpr int64_t SHORT = 1 << 17;  // multiply-adds that one thread does before others have begun

static int64_t multiply_adds(const Reduction& r) { return r.groups * r.cells * r.children * r.dim; }

// Shared by the threads of a region; ``row`` is the thread's own.
static void reduce(const Reduction& r, float* row) {
  const int64_t runs = (r.cells + RUN - 1) / RUN;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < r.groups * runs; task++) {
    const Cell at(r, task / runs);
    const int64_t first = task % runs * RUN;
    for (int64_t cell = first; cell < std::min(first + RUN, r.cells); cell++) {
      float* to = r.to + at.g * r.stride + cell * r.dim;
      std::memset(to, 0, r.dim * 4);
      for (int64_t i = 0; i < r.children; i++) {
        const int64_t child = r.table[cell * r.children + i];
        const float x = at.coefficient(cell, i);
        if (child < 0 || x == 0.0f) continue;
        const int64_t place = at.g * r.below_stride + child * r.dim;
        const float* from = (const float*)r.from + place;
        if (r.dtype != FLOAT) {
          read(r.from, place, (int)r.dtype, r.dim, row);
          from = row;
        }
        if (at.weight) {
          const float* w = at.weight + i * r.dim;
          for (int64_t d = 0; d < r.dim; d++) to[d] += x * w[d] * from[d];
        } else {
          const float share = x / r.children;
          for (int64_t d = 0; d < r.dim; d++) to[d] += share * from[d];
        }
      }
    }
  }
}

// One after another: each may read what those before it wrote.
extern "C" int farfield_reduce(const Reduction* reductions, int64_t number) {
  return guarded([=] {
    const int64_t threads = reductions[0].threads, dim = reductions[0].dim;
    std::vector<float> memory(threads * dim);
    for (int64_t i = 0; i < number; i++) {
#pragma omp parallel num_threads((int)threads) if (multiply_adds(reductions[i]) > SHORT)
      reduce(reductions[i], memory.data() + thread() * dim);
    }
  });
}

static void reduce_down(const Reduction& r) {
  const int64_t runs = (r.cells + RUN - 1) / RUN, size = r.grad_weight ? r.children * r.dim : 0;
  std::vector<float> sums(r.groups * runs * size);
  std::vector<float> memory(r.threads * r.dim);
#pragma omp parallel num_threads((int)r.threads) if (multiply_adds(r) > SHORT)
  {
    float* const row = memory.data() + thread() * r.dim;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < r.groups * runs; task++) {
      const Cell at(r, task / runs);
      const int64_t first = task % runs * RUN;
      for (int64_t cell = first; cell < std::min(first + RUN, r.cells); cell++) {
        const float* grad = r.to + at.g * r.stride + cell * r.dim;
        for (int64_t i = 0; i < r.children; i++) {
          const int64_t child = r.table[cell * r.children + i];
          const float x = at.coefficient(cell, i);
          if (child < 0 || x == 0.0f) continue;
          const int64_t place = at.g * r.below_stride + child * r.dim;
          float* into = r.grad_from + place;
          if (at.weight) {
            const float* w = at.weight + i * r.dim;
            for (int64_t d = 0; d < r.dim; d++) into[d] += x * w[d] * grad[d];
            if (size) {
              const float* from = (const float*)r.from + place;
              if (r.dtype != FLOAT) {
                read(r.from, place, (int)r.dtype, r.dim, row);
                from = row;
              }
              float* sum = sums.data() + task * size + i * r.dim;
              for (int64_t d = 0; d < r.dim; d++) sum[d] += x * grad[d] * from[d];
            }
          } else {
            const float share = x / r.children;
            for (int64_t d = 0; d < r.dim; d++) into[d] += share * grad[d];
          }
        }
      }
    }
  }
  for (int64_t task = 0; size && task < r.groups * runs; task++) {
    const int64_t head = task / runs % r.heads;
    float* to = r.grad_weight + (r.weight_heads == 1 ? 0 : head) * size;
    for (int64_t i = 0; i < size; i++) to[i] += sums[task * size + i];
  }
}

extern "C" int farfield_reduce_down(const Reduction* reduction) {
  return guarded([=] { reduce_down(*reduction); });
}

// delta[i] = sum_d a[i][d] b[i][d] - less[i]
extern "C" int farfield_delta(const void* a, const void* b, const float* less, float* delta, int64_t rows, int64_t dim,
                              int64_t dtype, int64_t threads) {
  return guarded([=] {
    std::vector<float> memory(2 * threads * dim);
#pragma omp parallel num_threads((int)threads)
    {
      float *const x = memory.data() + 2 * thread() * dim, *const y = x + dim;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < rows; i++) {
        const float *p = (const float*)a + i * dim, *q = (const float*)b + i * dim;
        if (dtype != FLOAT) {
          read(a, i * dim, (int)dtype, dim, x), read(b, i * dim, (int)dtype, dim, y);
          p = x, q = y;
        }
        Vector sum{};
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES) sum += load(p + d) * load(q + d);
        float whole = 0.0f;
        for (int j = 0; j < LANES; j++) whole += sum[j];
        for (; d < dim; d++) whole += p[d] * q[d];
        delta[i] = whole - less[i];
      }
    }
  });
}

// Choices ------------------------------------------------------------------------------------------------------------

// Integers in the order of the floats, and back.
static inline int32_t ordered(float x) {
  const int32_t bits = (int32_t)to_bits(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

static inline float of_ordered(int32_t x) { return from_bits((uint32_t)(x ^ (x >> 31 & 0x7fffffff))); }

// Places of the ``count`` largest of n scores, rising, into ``to``; how many there are, fewer than ``count`` where no
// more lie above -inf. Of equal scores the first are taken. ``order`` has room for n, rounded up to a vector. The least
// score that is taken is found by halving the range: a few passes over whole vectors, where sorting would guess at
// every comparison.
static int64_t largest(const float* scores, int64_t n, int64_t count, int32_t* order, int64_t* to) {
  typedef Ints LooseInts __attribute__((aligned(4), may_alias));
  const int32_t none = std::numeric_limits<int32_t>::min();
  const Ints nowhere = Ints{} + none, lowest = nowhere + 1;
  Ints least = ~nowhere, most_of = nowhere, seen{};
  for (int64_t i = 0; i < n; i += LANES) {
    float tail[LANES];
    if (i + LANES > n)
      for (int e = 0; e < LANES; e++) tail[e] = i + e < n ? scores[i + e] : NONE;
    const Vector s = load(i + LANES > n ? tail : scores + i) + Vector{};  // -0 is 0
    const Ints is = (Ints)(s != all(NONE)), bits = (Ints)s;
    Ints rank = bits ^ (bits >> 31 & 0x7fffffff);
    rank = rank < lowest ? lowest : rank;
    rank = (rank & is) | (nowhere & ~is);
    *(LooseInts*)(order + i) = rank;
    const Ints other = (rank & is) | (least & ~is);
    least = other < least ? other : least;
    most_of = rank > most_of ? rank : most_of;
    seen -= is;
  }
  int32_t low = ~none, high = none;
  int64_t some = 0;
  for (int e = 0; e < LANES; e++) low = std::min(low, least[e]), high = std::max(high, most_of[e]), some += seen[e];
  int64_t found = 0, spare = 0;  // of those that are equal to the least taken, as many as still fit
  if (some <= count) {
    low = none;
  } else if (count > 0) {
    // At least ``count`` are not below ``low``, and fewer than that are above ``high``.
    int64_t above = some;
    for (int step = 0; low < high; step++) {
      int32_t middle = (int32_t)(low + ((int64_t)high - low + 1) / 2);
      if (step < 16) {  // the middle of the scores is the better guess; that of the integers always comes to an end
        const int32_t guess = ordered(0.5f * of_ordered(low) + 0.5f * of_ordered(high));
        if (guess > low && guess < high) middle = guess;
      }
      Ints sum{};
      for (int64_t i = 0; i < n; i += LANES) sum -= *(const LooseInts*)(order + i) >= middle;
      int64_t not_below = 0;
      for (int e = 0; e < LANES; e++) not_below += sum[e];
      if (not_below >= count) low = middle, above = not_below;
      else high = middle - 1;
      if (above == count) break;
    }
    spare = count;
    if (above > count)
      for (int64_t i = 0; i < n; i++) spare -= order[i] > low;
  } else {
    return 0;
  }
  const int64_t most = std::min(some, count);
  for (int64_t i = 0; found < most; i++) {
    const bool equal = order[i] == low && spare > 0;
    to[found] = i;
    found += (order[i] > low) | equal;
    spare -= equal;
  }
  return found;
}

// index[row]: the places of the ``count`` largest of [rows, width] scores, rising; -1 where fewer lie above -inf. Of equal
// scores the first are taken.
extern "C" int farfield_top(const float* scores, int64_t rows, int64_t width, int64_t count, int64_t* index,
                            int64_t threads) {
  return guarded([=] {
    const int64_t room = up_to(width, LANES);
    std::vector<int32_t> memory(threads * room);
#pragma omp parallel for schedule(static) num_threads((int)threads) if (rows * width > SHORT)
    for (int64_t row = 0; row < rows; row++) {
      int64_t* to = index + row * count;
      const int64_t found = largest(scores + row * width, width, count, memory.data() + thread() * room, to);
      for (int64_t i = found; i < count; i++) to[i] = -1;
    }
  });
}

constexpr int64_t RUN_UNITS = 16;  // units that see the same and are scored together

// scores[q * step + i] = query[q] . keys[number[i]] + bias[number[i]]; -inf where the number is negative.
static void score_cells(const float* query, int64_t queries, const float* keys, const float* bias, const int64_t* number,
                        int64_t n, int64_t dim, float* scores, int64_t step) {
  for (int64_t q = 0; q < queries; q += RUN_UNITS) {
    const int64_t some = std::min(RUN_UNITS, queries - q);
    for (int64_t i = 0; i < n; i += LANES) {
      const int64_t count = std::min<int64_t>(LANES, n - i);
      const float* row[LANES];
      float found[RUN_UNITS * LANES];
      for (int64_t e = 0; e < LANES; e++) row[e] = keys + std::max<int64_t>(0, number[i + std::min(e, count - 1)]) * dim;
      dots(query + q * dim, some, row, dim, found, LANES);
      for (int64_t e = 0; e < count; e++) {
        const float shift = number[i + e] < 0 ? NONE : bias[number[i + e]];
        for (int64_t j = 0; j < some; j++)
          scores[(q + j) * step + i + e] = shift == NONE ? NONE : found[j * LANES + e] + shift;
      }
    }
  }
}

// scores[g][u][i] = query[g][u] . keys[g'][number] + bias[number]; -inf where number < 0. numbers: 1 or G; shared: groups of
// keys, a divisor of G; biases: 1 or shared.
extern "C" int farfield_score(const float* query, const float* keys, const float* bias, const int64_t* number,
                              float* scores, int64_t groups, int64_t units, int64_t places, int64_t cells, int64_t dim,
                              int64_t numbers, int64_t shared, int64_t biases, int64_t threads) {
  return guarded([=] {
#pragma omp parallel for schedule(static) num_threads((int)threads) if (groups * units * places * dim > SHORT)
    for (int64_t row = 0; row < groups * units; row++) {
      const int64_t g = row / units / (groups / shared);
      score_cells(query + row * dim, 1, keys + g * cells * dim, bias + (biases == 1 ? 0 : g * cells),
                  number + (numbers == 1 ? row % units : row) * places, places, dim, scores + row * places, 0);
    }
  });
}

extern "C" {

struct Rung {                           // a level of a descent
  const float *keys, *bias;             // [shared, cells, D], [biases, cells]
  const int64_t* own;                   // [blocks, places] cells that a block sees here, -1: none; or null
  const int64_t* children;              // [cells, below] of the next level, -1: none; or null: the last
  int64_t cells, biases, places, below, take;  // take: of its cells are opened
};

struct Descent {
  int64_t groups, shared, units, each, dim, finer_dim, rungs, widest, width, threads;  // widest: cells seen on a level
  const Rung* rung;
  const float *query, *finer;           // [G, U, dim]; [G, U each, finer_dim], who makes the last choice
  const uint8_t* seen;                  // [blocks, cells of the first rung]
  const int64_t* block;                 // [U]
  int64_t* opened;                      // [G, U each, width], -1: none
};

}  // extern "C"

// What one thread needs to descend.
struct Climber {
  const Descent& d;
  const int64_t room;
  std::vector<float> scores, last;
  std::vector<int32_t> order;
  std::vector<int64_t> number, chosen;

  explicit Climber(const Descent& descent)
      : d(descent), room(up_to(d.widest, LANES)), scores(RUN_UNITS * room), last(d.rungs > 1 ? d.each * room : 0),
        order(room), number(room), chosen(room) {}

  // Scores of all cells of the first rung for units [u, u + n) of one block.
  void first(int64_t g, int64_t u, int64_t n) {
    const Rung& rung = d.rung[0];
    const int64_t of_keys = g / (d.groups / d.shared);
    const float* keys = rung.keys + of_keys * rung.cells * d.dim;
    const float* bias = rung.bias + (rung.biases == 1 ? 0 : of_keys * rung.cells);
    const uint8_t* seen = d.seen + d.block[u] * rung.cells;
    for (int64_t i = 0; i < rung.cells; i += LANES) {
      const int64_t count = std::min<int64_t>(LANES, rung.cells - i);
      const float* row[LANES];
      float shift[LANES];
      bool any = false;
      for (int64_t e = 0; e < LANES; e++) {
        const int64_t cell = i + std::min(e, count - 1);
        row[e] = keys + cell * d.dim;
        shift[e] = seen[cell] ? bias[cell] : NONE;
        any |= shift[e] != NONE;
      }
      if (any) dots(d.query + (g * d.units + u) * d.dim, n, row, d.dim, scores.data() + i, room);
      for (int64_t j = 0; j < n; j++) {
        float* to = scores.data() + j * room + i;
        for (int e = 0; e < LANES; e++) to[e] = shift[e] == NONE ? NONE : to[e] + shift[e];
      }
    }
  }

  void score(int64_t g, int64_t r, const float* query, int64_t queries, int64_t dim, int64_t n, float* to) {
    const Rung& rung = d.rung[r];
    const int64_t of_keys = g / (d.groups / d.shared);
    score_cells(query, queries, rung.keys + of_keys * rung.cells * dim,
                rung.bias + (rung.biases == 1 ? 0 : of_keys * rung.cells), number.data(), n, dim, to, room);
  }

  // The rungs below the first for one unit, whose scores on the first stand in ``at``.
  void descend(int64_t g, int64_t u, float* at) {
    int64_t n = d.rung[0].cells;
    for (int64_t r = 0; r + 1 < d.rungs; r++) {
      const Rung &rung = d.rung[r], &next = d.rung[r + 1];
      if (r) score(g, r, d.query + (g * d.units + u) * d.dim, 1, d.dim, n, at);
      const int64_t found = largest(at, n, rung.take, order.data(), chosen.data());
      for (int64_t i = 0; r && i < found; i++) chosen[i] = number[chosen[i]];
      n = 0;
      if (next.own) std::copy_n(next.own + d.block[u] * next.places, n = next.places, number.data());
      for (int64_t i = 0; i < found; i++, n += rung.below)
        std::copy_n(rung.children + chosen[i] * rung.below, rung.below, number.data() + n);
    }
    const int64_t first = (g * d.units + u) * d.each;
    if (d.rungs > 1) score(g, d.rungs - 1, d.finer + first * d.finer_dim, d.each, d.finer_dim, n, at = last.data());
    for (int64_t j = 0; j < d.each; j++) finish(n, at + j * room, d.opened + (first + j) * d.width);
  }

  // The last choice, of one of those who make it, among the first n of ``number``.
  void finish(int64_t n, const float* at, int64_t* to) {
    const Rung& rung = d.rung[d.rungs - 1];
    const int64_t found = largest(at, n, rung.take, order.data(), chosen.data()), below = rung.children ? rung.below : 1;
    for (int64_t i = 0; i < found; i++) {
      const int64_t cell = d.rungs > 1 ? number[chosen[i]] : chosen[i];
      if (rung.children) std::copy_n(rung.children + cell * below, below, to + i * below);
      else to[i] = cell;
    }
    for (int64_t i = found * below; i < d.width; i++) to[i] = -1;
  }
};

// From the first rung down, the ``take`` largest of the cells that a unit sees are opened; what is opened on the last is
// the result. Scores and numbers never leave the nearest cache.
extern "C" int farfield_descend(const Descent* descent) {
  return guarded([=] {
    const Descent& d = *descent;
    const int64_t runs = (d.units + RUN_UNITS - 1) / RUN_UNITS;
    std::vector<Climber> climbers;
    for (int64_t i = 0; i < d.threads; i++) climbers.emplace_back(d);
#pragma omp parallel for schedule(static) num_threads((int)d.threads) if (d.groups * d.units * d.each * d.widest * d.dim > SHORT)
    for (int64_t task = 0; task < d.groups * runs; task++) {
      Climber& climber = climbers[thread()];
      const int64_t g = task / runs, end = std::min((task % runs + 1) * RUN_UNITS, d.units);
      for (int64_t u = task % runs * RUN_UNITS; u < end;) {
        int64_t n = 1;
        while (u + n < end && d.block[u + n] == d.block[u]) n++;
        climber.first(g, u, n);
        for (int64_t j = 0; j < n; j++) climber.descend(g, u + j, climber.scores.data() + j * climber.room);
        u += n;
      }
    }
  });
}

// Decoding -----------------------------------------------------------------------------------------------------------

// A step of decoding. Every row of [batch, heads] reads, in one softmax: sinks and near field, and the tokens of the pages
// that its leader opens, by a choice among the cells of one level and then among the pages under those.
struct Step {
  const float *query, *queries;                         // [batch, heads, D]; [batch, heads, ring, D], the last ones
  const float *keys, *values;                           // [batch, shared, room, D]
  int64_t* chosen;                                      // [batch, heads, width]: run + 1 of the last choice, its pages, -1
  const float* const* banks;                            // [batch, of, bank_room, D or 2 D] what is scored
  const int64_t *bank_of, *bank_room;
  const int64_t* table;                                 // [heads, HEAD]
  float *out, *lse;                                     // [batch, heads, D], [batch, heads]
  int64_t batch, heads, shared, dim, ring, room, width, at, block, sinks, threads;
  float scale;
};

// What a row of the table says. A bank of -1: the keys themselves. An OPEN of -1: every token is seen.
enum { KEY_HEAD, CELL_BANK, CELL_ROW, PAGE_BANK, PAGE_ROW, CELL, PAGE, BEAM, OPEN, SHARE, BEAM_SHARE, RECENT, BOUNDS, COUNT,
       HEAD };

struct StepMemory {
  std::vector<const float*> row, value;
  std::vector<float> asked, leader, score, weight;
  std::vector<int64_t> number, chosen;
  std::vector<int32_t> order;
};

// to[i] = x . row[i]; both grow to whole vectors.
static void products(const float* x, std::vector<const float*>& row, int64_t dim, std::vector<float>& to) {
  const int64_t n = row.size();
  row.resize(up_to(n, LANES), n ? row.back() : nullptr);
  to.resize(row.size());
  for (int64_t i = 0; i < n; i += LANES) dots(x, 1, &row[i], dim, &to[i], 0);
  row.resize(n);
}

// Leaves the ``count`` largest of the cells m.number of a bank in m.chosen, by the scores that a prefill gives them.
static void choose_cells(const Step& c, int64_t b, const int64_t* t, int64_t bank, int64_t of, int64_t tokens,
                         int64_t count, StepMemory& m) {
  const int64_t n = m.number.size(), wide = t[BOUNDS] && bank >= 0 ? 2 * c.dim : c.dim;
  const float* const from = bank < 0 ? c.keys + (b * c.shared + t[KEY_HEAD]) * c.room * c.dim
                                     : c.banks[bank] + (b * c.bank_of[bank] + of) * c.bank_room[bank] * wide;
  m.leader.resize(wide);
  for (int64_t d = 0; d < c.dim; d++) {
    const float x = m.asked[d] * c.scale;
    m.leader[d] = wide > c.dim && x < 0.0f ? 0.0f : x;
    if (wide > c.dim) m.leader[c.dim + d] = x > 0.0f ? 0.0f : x;
  }
  m.row.clear();
  for (const int64_t i : m.number) m.row.push_back(from + i * wide);
  products(m.leader.data(), m.row, wide, m.score);
  for (int64_t i = 0; i < n; i++) {
    const int64_t left = tokens - std::max<int64_t>(0, std::min(tokens, c.sinks - m.number[i] * tokens));
    m.score[i] = left > 0 ? m.score[i] + (t[COUNT] ? std::log((float)left) : 0.0f) : NONE;
  }
  m.order.resize(up_to(n, LANES));
  m.chosen.resize(std::min(n, count));
  m.chosen.resize(largest(m.score.data(), n, count, m.order.data(), m.chosen.data()));
  for (int64_t& i : m.chosen) i = m.number[i];
}

// Who chooses for the present run of ``share`` queries: its first one, averaged with those before it.
static void lead(const Step& c, int64_t b, int64_t h, int64_t share, StepMemory& m) {
  const float* const ring = c.queries + (b * c.heads + h) * c.ring * c.dim;
  const int64_t first = c.at / share * share, before = std::min(c.table[h * HEAD + RECENT], first);
  m.asked.assign(c.dim, 0.0f);
  for (int64_t i = first - before; i < first; i++)
    for (int64_t d = 0; d < c.dim; d++) m.asked[d] += ring[i % c.ring * c.dim + d];
  for (int64_t d = 0; d < c.dim; d++) {
    const float own = ring[first % c.ring * c.dim + d];
    m.asked[d] = before ? own + (m.asked[d] / (float)before - own) * 0.5f : own;
  }
}

static void choose_pages(const Step& c, int64_t b, int64_t h, StepMemory& m) {
  const int64_t* const t = c.table + h * HEAD;
  const int64_t visible = std::max<int64_t>(0, c.at / c.block - 1) * c.block, per = t[CELL] / t[PAGE];
  int64_t *const kept = c.chosen + (b * c.heads + h) * c.width, run = c.at / t[SHARE];
  if (c.at % t[SHARE] && kept[0] == run + 1) {  // the first of a run always chooses: it may have been taken back
    m.chosen.assign(kept + 1, std::find_if(kept + 1, kept + 1 + t[OPEN], [](int64_t i) { return i < 0; }));
    return;
  }
  lead(c, b, h, per > 1 ? t[BEAM_SHARE] : t[SHARE], m);
  m.number.clear();
  for (int64_t i = 0; i < visible / t[CELL]; i++) m.number.push_back(i);
  choose_cells(c, b, t, t[CELL_BANK], t[CELL_ROW], t[CELL], per > 1 ? t[BEAM] : t[OPEN], m);
  if (per > 1) {
    m.number.clear();
    for (const int64_t cell : m.chosen)
      for (int64_t i = 0; i < per; i++) m.number.push_back(cell * per + i);
    if (t[BEAM_SHARE] != t[SHARE]) lead(c, b, h, t[SHARE], m);
    choose_cells(c, b, t, t[PAGE_BANK], t[PAGE_ROW], t[PAGE], t[OPEN], m);
  }
  kept[0] = run + 1;
  std::fill(std::copy(m.chosen.begin(), m.chosen.end(), kept + 1), kept + 1 + t[OPEN], -1);
}

static void step_row(const Step& c, int64_t b, int64_t h, StepMemory& m) {
  const int64_t* const t = c.table + h * HEAD;
  const int64_t start = t[OPEN] < 0 ? 0 : std::max<int64_t>(0, c.at / c.block - 1) * c.block;
  const int64_t of = b * c.shared + t[KEY_HEAD];
  const float *const query = c.query + (b * c.heads + h) * c.dim, *const key = c.keys + of * c.room * c.dim;
  const float* const value = c.values + of * c.room * c.dim;
  const float factor = c.scale * LOG2E;
  m.row.clear(), m.value.clear(), m.chosen.clear();
  if (t[OPEN] > 0) choose_pages(c, b, h, m);
  m.row.clear();
  const auto see = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) m.row.push_back(key + i * c.dim), m.value.push_back(value + i * c.dim);
  };
  see(0, std::min(c.sinks, start));
  for (const int64_t page : m.chosen) see(std::max(c.sinks, page * t[PAGE]), (page + 1) * t[PAGE]);
  see(start, c.at + 1);
  const int64_t n = m.row.size();
  products(query, m.row, c.dim, m.weight);
  for (int64_t i = 0; i < n; i++) m.weight[i] *= factor;
  std::fill(m.weight.begin() + n, m.weight.end(), NONE);
  float most = NONE, total = 0.0f;
  for (const float s : m.weight) most = s > most || s != s ? s : most;
  for (int64_t i = 0; i < n; i += LANES) put(&m.weight[i], exp2_of(load(&m.weight[i]) - most));
  for (int64_t i = 0; i < n; i++) total += m.weight[i];
  float* const out = c.out + (b * c.heads + h) * c.dim;
  std::memset(out, 0, c.dim * 4);
  for (int64_t i = 0; i < n; i++) {
    const float w = m.weight[i];
    for (int64_t d = 0; d < c.dim; d++) out[d] += w * m.value[i][d];
  }
  for (int64_t d = 0; d < c.dim; d++) out[d] /= total;
  c.lse[b * c.heads + h] = (std::log2(total) + most) / LOG2E;
}

extern "C" int farfield_step(const Step* step) {
  return guarded([=] {
    const Step& c = *step;
    bool failed = false;
    int64_t keys = 0;
    std::vector<int64_t> order;  // those that see everything first: they take longest
    for (const bool exact : {true, false})
      for (int64_t h = 0; h < c.heads; h++)
        if ((c.table[h * HEAD + OPEN] < 0) == exact) order.push_back(h), keys += exact ? c.at : 4 * c.block;
#pragma omp parallel num_threads((int)c.threads) if (c.batch * keys * c.dim > SHORT)
    {
      StepMemory memory;
#pragma omp for schedule(dynamic, 1)
      for (int64_t row = 0; row < c.batch * c.heads; row++) {
        try {
          step_row(c, row % c.batch, order[row / c.batch], memory);
        } catch (...) {
#pragma omp atomic write
          failed = true;
        }
      }
    }
    if (failed) throw std::bad_alloc();
  });
}

// Expansions ---------------------------------------------------------------------------------------------------------

// The least of n numbers, those that are none aside; behind the last there are larger ones to a whole vector.
static float least_of(const float* x, int64_t n) {
  Vector least = all(-NONE);
  for (int64_t i = 0; i < n; i += LANES) {
    const Vector s = load(x + i);
    least = s < least ? s : least;
  }
  float found = least[0];
  for (int e = 1; e < LANES; e++) found = least[e] < found ? least[e] : found;
  return found;
}

// The tokens that a centre keeps out of its cell: the ``open`` largest scores of all that came, of equal ones the first.
struct Kept {
  const int64_t open;
  int64_t count = 0;
  std::vector<int64_t> token;  // rising
  std::vector<float> score;    // +inf behind the last
  std::vector<int64_t> stays;
  std::vector<int32_t> order;

  Kept(int64_t most, int64_t block)
      : open(most), token(most + block), score(up_to(most + block, LANES), -NONE), stays(most + 1), order(score.size()) {}

  void clear() {
    count = 0;
    std::fill(score.begin(), score.end(), -NONE);
  }

  // Takes in n tokens behind all others. Those that are not kept, or no longer, go to ``left``, their scores to
  // ``of_left``; returns how many they are, never more than n.
  int64_t admit(const int64_t* fresh, const float* of_fresh, int64_t n, int64_t* left, float* of_left) {
    // Of those without weight no list has any, and a full list none that are no larger than its least.
    const float least = count < open ? NONE : least_of(score.data(), count);
    int64_t number = 0, all = count, next = 0;
    for (int64_t j = 0; j < n; j++) {
      if (of_fresh[j] <= least) left[number] = fresh[j], of_left[number++] = of_fresh[j];
      else token[all] = fresh[j], score[all++] = of_fresh[j];
    }
    count = all;
    if (all <= open) return number;
    count = largest(score.data(), all, open, order.data(), stays.data());
    for (int64_t j = 0; j < all; j++) {
      if (next < count && stays[next] == j) token[next] = token[j], score[next++] = score[j];
      else left[number] = token[j], of_left[number++] = score[j];
    }
    std::fill(score.begin() + count, score.begin() + all, -NONE);
    return number;
  }
};

// Everything that lies two blocks and more before a query's block: a cell about the centre that is the query's own, and the
// tokens that this centre keeps out of it, in one softmax; see farfield/ops/expansion.py. Sums are in units of exp(peak),
// the largest score so far (or, where a cache had some, of their sum): nothing hangs on later tokens.
struct Expansion {
  const float *query, *key, *value;  // [batch, heads, N, D]; [batch, shared, N, D]
  const float *centres, *bias;       // [heads, number, D]; [heads]
  const int64_t* own;                // [batch, heads, N] the number of a query's centre
  const int64_t* read;               // [heads] the key head of each; null: neighbours share one
  const uint8_t* shown;              // [batch, N] tokens that count
  float *out, *lse;                  // [batch, heads, N, D], [batch, heads, N]; backward reads the latter
  const float *grad_out, *grad_lse;
  float *grad_query, *grad_key, *grad_value;  // [batch, heads, N, D], [parts, batch, heads, N, D]; 0 at first
  int64_t batch, heads, shared, length, dim, number, block, open, parts, threads;
  float scale;
};

struct Expander {
  const Expansion& c;
  const int64_t step;  // from one query's scores of tokens kept to the next one's: no power of two
  std::vector<float> held, fresh;  // of all tokens so far, and of those that join: of k v' row by row, of keys, of values
  float *const rows, *const keys, *const values;  // the parts of the former
  std::vector<float> about, score, weight, weighed, apart, made, exact, grad_exact, more;
  std::vector<const float*> row, read;
  std::vector<float*> written;
  std::vector<int64_t> asked, token, place;
  Kept kept;
  float peak, mass;
  std::vector<float> back;             // gradients of normalised sums, added up from the last unit on
  std::vector<float> level;            // of every unit: log of the sum of weights
  std::vector<int64_t> joined, until;  // what joined, unit by unit, and where each ends; what the scores were
  std::vector<float> of_joined;
  std::vector<float> shares, turns, commons, scores;  // of every query, for gradients of the sums: see ask_backward

  explicit Expander(const Expansion& call)
      : c(call), step(up_to(call.open, PANEL) + LANES), held((call.dim + 2) * call.dim), fresh(held.size()),
        rows(held.data()), keys(rows + call.dim * call.dim), values(keys + call.dim), about(call.dim),
        score(up_to(call.block, LANES)), weight(score.size()), weighed(call.block * call.dim), apart(weighed.size()),
        made(weighed.size()), kept(call.open, call.block) {
    if (!call.grad_out) return;
    back.resize(held.size() + 1), level.resize(units()), until.resize(units()), more.resize(made.size());
    joined.reserve(call.length), of_joined.reserve(call.length);
    for (auto* const x : {&shares, &turns, &commons, &scores}) x->resize(call.length);
  }

  int64_t units() const { return (c.length + c.block - 1) / c.block; }

  // Points ``row`` and ``read`` at the keys and values of tokens, repeated to whole vectors of them.
  void point(int64_t b, int64_t h, const int64_t* tokens, int64_t n) {
    const int64_t dim = c.dim, head = c.read ? c.read[h] : h / (c.heads / c.shared);
    const int64_t at = (b * c.shared + head) * c.length * dim;
    row.resize(up_to(n, LANES)), read.resize(row.size());
    for (int64_t i = 0; i < (int64_t)row.size(); i++) {
      const int64_t j = tokens[std::min(i, n - 1)] * dim;
      row[i] = c.key + at + j, read[i] = c.value + at + j;
    }
  }

  // to[k][i] = x[k] . from[i] of some rows x and whole vectors of keys or values.
  void cross(const float* x, int64_t number, const std::vector<const float*>& from, float* to) const {
    for (size_t i = 0; i < from.size(); i += LANES) dots(x, number, &from[i], c.dim, to + i, step);
  }

  // The tokens that join the sums at unit u: of the block two before it and of those kept so far.
  void find(int64_t b, int64_t h, int64_t u) {
    place.clear();
    for (int64_t j = (u - 2) * c.block; u >= 2 && j < (u - 1) * c.block; j++)
      if (c.shown[b * c.length + j]) place.push_back(j);
    sift(b, h);
  }

  // The tokens at ``place`` come to those kept: some of either join the sums, with their scores at the centre.
  void sift(int64_t b, int64_t h) {
    token.resize(c.block);
    point(b, h, place.data(), place.size());
    cross(about.data(), 1, row, weight.data());
    token.resize(kept.admit(place.data(), weight.data(), place.size(), token.data(), score.data()));
    point(b, h, token.data(), token.size());
    for (size_t i = token.size(); i < row.size(); i++) score[i] = NONE;
  }

  // Adds the tokens that were found.
  void absorb() {
    const int64_t n = token.size();
    if (!n) return;
    Vector largest = all(peak);
    for (int64_t j = 0; j < n; j += LANES) {
      const Vector s = load(&score[j]);
      largest = s > largest || s != s ? s : largest;
    }
    float most = peak;
    for (int e = 0; e < LANES; e++) most = largest[e] > most || largest[e] != largest[e] ? largest[e] : most;
    if (most == NONE) return;  // no weight at all
    if (!(most == peak)) {
      const float factor = peak == NONE ? 0.0f : std::exp(peak - most);
      for (float& x : held) x *= factor;
      mass *= factor, peak = most;
    }
    // A block's sums by themselves, then added once: sums over all tokens one by one would lose digits with the length.
    std::fill(fresh.begin(), fresh.end(), 0.0f);
    float* const of_keys = fresh.data() + c.dim * c.dim;
    float* const of_values = of_keys + c.dim;
    for (int64_t j = 0; j < n; j += LANES) put(&weight[j], exp2_of((load(&score[j]) - all(peak)) * all(LOG2E)));
    for (int64_t j = 0, dim = c.dim; j < n; j++)
      for (int64_t d = 0; d < dim; d += LANES) put(&weighed[j * dim + d], all(weight[j]) * load(row[j] + d));
    add_outer(weighed.data(), read.data(), n, fresh.data());
    mix(weight.data(), 1, 0, row.data(), n, of_keys, c.dim);
    mix(weight.data(), 1, 0, read.data(), n, of_values, c.dim);
    float whole = 0.0f;  // in the order of the sums that are divided by it: then roundings cancel
    for (int64_t j = 0; j < n; j++) whole += weight[j];
    mass += whole;
    for (size_t i = 0; i < held.size(); i++) held[i] += fresh[i];
  }

  // into[d][..] += sum over n of x[k][d] y[k][..]; all D wide.
  void add_outer(const float* x, const float* const* y, int64_t n, float* into) const {
    for (int64_t d = 0; d < c.dim; d += TALL)
      for (int64_t i = 0; i < c.dim; i += PANEL)
        column_tiles(std::min<int64_t>(TALL, c.dim - d), x + d, c.dim, y, n, n, n, into + d * c.dim, c.dim, i);
  }

  // written[k][..] += sum over d of row[k][d] matrix[d][..].
  void multiply(int64_t n, const float* matrix) const {
    for (int64_t k = 0; k < n; k += TALL)
      row_tiles<true>(std::min<int64_t>(TALL, n - k), row.data() + k, written.data() + k, 0, c.dim, matrix, c.dim, 0, c.dim,
                      nullptr);
  }

  // to[k][d] = x[k] . matrix[d] for n rows that lie one after another.
  void multiply_rows(const float* x, int64_t n, const float* matrix, float* to) const {
    const float* from[LANES];
    for (int64_t d = 0; d < c.dim; d += LANES) {
      for (int e = 0; e < LANES; e++) from[e] = matrix + (d + e) * c.dim;
      dots(x, n, from, c.dim, to + d, c.dim);
    }
  }

  // The queries of unit u whose centre this is.
  void ask(int64_t b, int64_t h, int64_t centre, int64_t u) {
    const int64_t of = (b * c.heads + h) * c.length, to = std::min(c.length, (u + 1) * c.block);
    asked.clear();
    for (int64_t i = u * c.block; i < to; i++)
      if (c.own[of + i] == centre) {
        asked.push_back(i);
        for (int64_t d = 0; d < c.dim; d += 16) __builtin_prefetch(c.query + (of + i) * c.dim + d);
      }
  }

  // What the queries asked get from the cell: out in ``made``, lse in ``c.lse``.
  void answer(int64_t b, int64_t h, int64_t centre) {
    const int64_t of = (b * c.heads + h) * c.length, n = asked.size();
    const float* const about_ = c.centres + (h * c.number + centre) * c.dim;
    if (mass == 0.0f) {
      std::fill(made.begin(), made.begin() + n * c.dim, 0.0f);
      for (const int64_t i : asked) c.lse[of + i] = NONE;
      return;
    }
    row.resize(n), written.resize(n);
    for (int64_t k = 0; k < n; k++) {
      const float* const query = c.query + (of + asked[k]) * c.dim;
      float *const x = apart.data() + k * c.dim, *const y = made.data() + k * c.dim;
      float common = 0.0f;
      for (int64_t d = 0; d < c.dim; d++) x[d] = (query[d] - about_[d]) * c.scale, common += x[d] * keys[d];
      common /= mass;
      for (int64_t d = 0; d < c.dim; d++) y[d] = (1.0f - common) * values[d];
      c.lse[of + asked[k]] = std::log(mass) + peak + common + c.bias[h];
      row[k] = x, written[k] = y;
    }
    multiply(n, rows);
    for (int64_t k = 0; k < n; k++)
      for (int64_t d = 0; d < c.dim; d++) written[k][d] /= mass;
  }

  // Copies queries that asked, times a factor.
  void copy(const float* from, int64_t of, float factor, float* to) const {
    for (size_t k = 0; k < asked.size(); k++)
      for (int64_t d = 0; d < c.dim; d++) to[k * c.dim + d] = from[(of + asked[k]) * c.dim + d] * factor;
  }

  // Adds what the centre keeps to the answers, in the same softmax, and writes them.
  void finish(int64_t b, int64_t h) {
    const int64_t of = (b * c.heads + h) * c.length, queries = asked.size(), n = kept.count;
    if (n && queries) {
      point(b, h, kept.token.data(), n);
      exact.resize(std::max<size_t>(exact.size(), queries * step));
      copy(c.query, of, c.scale, apart.data());
      cross(apart.data(), queries, row, exact.data());
      for (int64_t k = 0; k < queries; k++) {
        float *const scores = exact.data() + k * step, *const out = made.data() + k * c.dim, &lse = c.lse[of + asked[k]];
        const float cell = lse;
        for (int64_t i = n; i < up_to(n, LANES); i++) scores[i] = NONE;
        Vector most = all(cell), sum{};
        for (int64_t i = 0; i < n; i += LANES) {
          const Vector s = load(scores + i);
          most = s > most ? s : most;
        }
        float top = cell;
        for (int e = 0; e < LANES; e++) top = most[e] > top ? most[e] : top;
        const float shift = top == NONE ? 0.0f : top, shrink = std::exp(cell - shift);
        for (int64_t i = 0; i < n; i += LANES) {
          const Vector w = exp2_of((load(scores + i) - all(shift)) * all(LOG2E));
          sum += w;
          put(scores + i, w);
        }
        float total = shrink;
        for (int e = 0; e < LANES; e++) total += sum[e];
        const float over = total == 0.0f ? 0.0f : 1.0f / total;
        for (int64_t i = 0; i < n; i += LANES) put(scores + i, load(scores + i) * all(over));
        for (int64_t d = 0; d < c.dim; d++) out[d] *= shrink * over;
        lse = total == 0.0f ? NONE : std::log(total) + shift;
      }
      mix(exact.data(), queries, step, read.data(), n, made.data(), c.dim);
    }
    for (int64_t k = 0; k < queries; k++) std::copy_n(made.data() + k * c.dim, c.dim, c.out + (of + asked[k]) * c.dim);
  }

  void begin(int64_t h, int64_t centre) {
    for (int64_t d = 0; d < c.dim; d++) about[d] = c.centres[(h * c.number + centre) * c.dim + d] * c.scale;
    std::fill(held.begin(), held.end(), 0.0f);
    peak = NONE, mass = 0.0f;
    kept.clear(), joined.clear(), of_joined.clear();
  }

  void run(int64_t b, int64_t h, int64_t centre) {
    begin(h, centre);
    for (int64_t u = 0; u < units(); u++) {
      ask(b, h, centre, u);  // first, so that queries are on their way meanwhile
      find(b, h, u);
      absorb();
      answer(b, h, centre);
      finish(b, h);
    }
  }

  // Gradients of the queries asked, and of the keys and values of the tokens kept. With m the mass, M, V, K the sums of
  // k v', v and k over it, and L = log(m) + peak, the cell has
  //   out = x'M + (1 - x.K) V,  lse = L + x.K + bias.
  // With g what comes up for the output of the whole and e for its lse, a part of weight w and output o gets w g for its
  // output and w (g.o - d) for its lse, d = sum of w g.o - e. What is left for the sums of the cell stays in ``shares``,
  // ``turns``, ``commons`` and ``scores``.
  void ask_backward(int64_t b, int64_t h, int64_t centre, int64_t u, float* grad_key, float* grad_value) {
    const int64_t of = (b * c.heads + h) * c.length, queries = asked.size(), n = kept.count;
    if (!queries) return;
    const float* const about_ = c.centres + (h * c.number + centre) * c.dim;
    const float over = mass == 0.0f ? 0.0f : 1.0f / mass;
    copy(c.query, of, c.scale, apart.data()), copy(c.grad_out, of, 1.0f, weighed.data());
    if (n) {
      point(b, h, kept.token.data(), n);
      exact.resize(std::max<size_t>(exact.size(), queries * step)), grad_exact.resize(exact.size());
      cross(apart.data(), queries, row, exact.data());
      cross(weighed.data(), queries, read, grad_exact.data());
    }
    multiply_rows(weighed.data(), queries, rows, made.data());
    for (int64_t k = 0; k < queries; k++) {
      const int64_t i = asked[k];
      const float *const query = c.query + (of + i) * c.dim, *const given = weighed.data() + k * c.dim;
      const float *const moved = made.data() + k * c.dim, lse = c.lse[of + i];
      float *const s = exact.data() + k * step, *const t = grad_exact.data() + k * step;
      float common = 0.0f, along = 0.0f, whole = 0.0f, beside = 0.0f, kept_along = 0.0f;
      for (int64_t d = 0; d < c.dim; d++) {
        const float x = (query[d] - about_[d]) * c.scale;
        common += x * keys[d], along += given[d] * values[d], whole += x * moved[d];
      }
      common *= over, along *= over, whole *= over;
      // No weight is above 1, but scores of 1e5 are rounded so far that their difference can say so.
      const float less = level[u] + common + c.bias[h] - lse;
      float share = mass == 0.0f ? 0.0f : std::exp(less > 0.0f ? 0.0f : less);
      for (int64_t j = 0; j < n; j += LANES) {
        const Vector y = (load(s + j) - all(lse)) * all(LOG2E);
        put(s + j, exp2_of(y > Vector{} ? Vector{} : y));
      }
      for (int64_t j = 0; j < n; j++) beside += s[j], kept_along += s[j] * t[j];
      // Shares of exactly 1 together: gradients of what all keys have in common cancel.
      const float total = share + beside, norm = total == 0.0f ? 0.0f : 1.0f / total;
      share *= norm, beside *= norm, kept_along *= norm;
      const float inside = whole + (1.0f - common) * along, up = c.grad_lse[of + i];
      const float of_lse = share * (beside * inside - kept_along + up), delta = share * inside + kept_along - up;
      const float turn = of_lse - share * along;
      float* const grad = c.grad_query + (of + i) * c.dim;
      for (int64_t d = 0; d < c.dim; d++) grad[d] += c.scale * over * (share * moved[d] + turn * keys[d]);
      for (int64_t j = 0; j < n; j += LANES) {
        const Vector w = load(s + j) * all(norm);
        put(s + j, w);
        put(t + j, w * (load(t + j) - all(delta)));
      }
      shares[i] = share, turns[i] = turn, commons[i] = common;
      scores[i] = of_lse - share * inside - common * turn;
    }
    if (!n) return;
    std::fill(more.begin(), more.begin() + queries * c.dim, 0.0f);
    mix(grad_exact.data(), queries, step, row.data(), n, more.data(), c.dim);
    for (int64_t k = 0; k < queries; k++)
      for (int64_t d = 0; d < c.dim; d++) c.grad_query[(of + asked[k]) * c.dim + d] += c.scale * more[k * c.dim + d];
    written.resize(n);
    for (int64_t j = 0; j < n; j++) written[j] = grad_value + kept.token[j] * c.dim;
    spread(exact.data(), queries, step, weighed.data(), written.data(), n, c.dim);
    for (int64_t j = 0; j < n; j++) written[j] = grad_key + kept.token[j] * c.dim;
    spread(grad_exact.data(), queries, step, apart.data(), written.data(), n, c.dim);
  }

  // A token has the weight exp(score - L) in M, V and K. So the gradients of what later units read, each times exp(-L) of
  // its own, are all that a token needs; L only grows.
  void run_backward(int64_t b, int64_t h, int64_t centre, int64_t part) {
    begin(h, centre);
    const int64_t of = (b * c.heads + h) * c.length;
    float* const grad_key = c.grad_key + (part * c.batch * c.heads * c.length + of) * c.dim;
    float* const grad_value = c.grad_value + (part * c.batch * c.heads * c.length + of) * c.dim;
    for (int64_t u = 0; u < units(); u++) {
      ask(b, h, centre, u);
      find(b, h, u);
      joined.insert(joined.end(), token.begin(), token.end());
      of_joined.insert(of_joined.end(), score.begin(), score.begin() + token.size());
      until[u] = joined.size();
      absorb();
      level[u] = mass == 0.0f ? NONE : std::log(mass) + peak;
      ask_backward(b, h, centre, u, grad_key, grad_value);
    }
    std::fill(back.begin(), back.end(), 0.0f);
    float *const of_keys = back.data() + c.dim * c.dim, *const of_values = of_keys + c.dim, *const of_score = of_values + c.dim;
    const float* const about_ = c.centres + (h * c.number + centre) * c.dim;
    for (int64_t u = units() - 1; u >= 0 && level[u] != NONE; u--) {
      if (u + 1 < units()) {
        const float factor = std::exp(level[u] - level[u + 1]);
        for (float& x : back) x *= factor;
      }
      ask(b, h, centre, u);
      const int64_t n = asked.size();
      read.resize(n);
      for (int64_t k = 0; k < n; k++) {
        const int64_t i = asked[k];
        float *const x = apart.data() + k * c.dim, *const given = weighed.data() + k * c.dim;
        for (int64_t d = 0; d < c.dim; d++) {
          x[d] = (c.query[(of + i) * c.dim + d] - about_[d]) * c.scale;
          given[d] = shares[i] * c.grad_out[(of + i) * c.dim + d];
          of_keys[d] += turns[i] * x[d];
          of_values[d] += (1.0f - commons[i]) * given[d];
        }
        *of_score += scores[i];
        read[k] = given;
      }
      add_outer(apart.data(), read.data(), n, back.data());
      const int64_t first = u ? until[u - 1] : 0, number = until[u] - first;
      if (!number) continue;
      const int64_t* const tokens = joined.data() + first;
      point(b, h, tokens, number);
      written.resize(number);
      for (int64_t j = 0; j < number; j++) {
        std::memcpy(weighed.data() + j * c.dim, read[j], c.dim * 4);
        written[j] = made.data() + j * c.dim;
        std::copy_n(of_values, c.dim, written[j]);
      }
      multiply(number, back.data());  // made: k'G + of_values
      multiply_rows(weighed.data(), number, back.data(), apart.data());  // apart: G v
      for (int64_t j = 0; j < number; j++) {
        const float weight = std::exp(of_joined[first + j] - level[u]);
        const float* const turned = apart.data() + j * c.dim;
        float sum = *of_score;
        for (int64_t d = 0; d < c.dim; d++)
          sum += row[j][d] * (turned[d] + of_keys[d]) + read[j][d] * of_values[d];
        float *const to_key = grad_key + tokens[j] * c.dim, *const to_value = grad_value + tokens[j] * c.dim;
        for (int64_t d = 0; d < c.dim; d++) {
          to_key[d] += weight * (turned[d] + of_keys[d] + sum * about[d]);
          to_value[d] += weight * made[j * c.dim + d];
        }
      }
    }
  }
};

// Every centre of every head, or, for gradients, every part of a head's centres: those of a part add to one place.
template <class F>
static int expand(const Expansion& c, int64_t tasks, F task) {
  return guarded([&] {
    bool failed = false;
#pragma omp parallel num_threads((int)c.threads) if (c.length * c.dim * c.dim > SHORT)
    {
      std::unique_ptr<Expander> worker;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < tasks; i++) {
        try {
          if (!worker) worker = std::make_unique<Expander>(c);
          task(*worker, i);
        } catch (...) {
#pragma omp atomic write
          failed = true;
        }
      }
    }
    if (failed) throw std::bad_alloc();
  });
}

extern "C" int farfield_expand(const Expansion* expansion) {
  const Expansion& c = *expansion;
  return expand(c, c.batch * c.heads * c.number, [&](Expander& worker, int64_t i) {
    worker.run(i / c.number / c.heads, i / c.number % c.heads, i % c.number);
  });
}

extern "C" int farfield_expand_backward(const Expansion* expansion) {
  const Expansion& c = *expansion;
  return expand(c, c.batch * c.heads * c.parts, [&](Expander& worker, int64_t i) {
    const int64_t part = i % c.parts, of = i / c.parts;
    for (int64_t centre = part; centre < c.number; centre += c.parts)
      worker.run_backward(of / c.heads, of % c.heads, centre, part);
  });
}

// Blocks of tokens added to what a cache has of those before: sums, and tokens kept out of them.
struct Advance {
  const float *key, *value;            // [batch, shared, room, D], token i of the blocks in row i - ``before``
  const int64_t* read;                 // [heads] the key head of each
  const float* centres;                // [heads, number, D]
  float *of_lse, *of_key, *of_rows;    // [batch, heads, places, number], [.., D], [.., D + 1, D]: place n % places has
                                       // what is before block n
  int64_t* kept;                       // [batch, heads, places, number, open] rows, rising; negative: none
  float* scores;                       // of these
  int64_t batch, heads, shared, room, before, dim, number, block, open, sinks, first, last, places, threads;
  float scale;
};

// Where something of block n of one centre lies, in units of it.
static int64_t place_of(const Advance& a, int64_t b, int64_t h, int64_t centre, int64_t n) {
  return ((b * a.heads + h) * a.places + n % a.places) * a.number + centre;
}

// What the cache has before block n, into a worker that has begun; the other way with ``back`` set.
static void exchange(const Advance& a, Expander& w, int64_t at, bool back) {
  float *const key = a.of_key + at * a.dim, *const rows = a.of_rows + at * (a.dim + 1) * a.dim;
  float* const value = rows + a.dim * a.dim;
  int64_t* const kept = a.kept + at * a.open;
  float* const scores = a.scores + at * a.open;
  if (back) {
    const float over = w.mass == 0.0f ? 0.0f : 1.0f / w.mass;
    a.of_lse[at] = w.mass == 0.0f ? NONE : std::log(w.mass) + w.peak;
    for (int64_t i = 0; i < a.dim * a.dim; i++) rows[i] = w.rows[i] * over;
    for (int64_t d = 0; d < a.dim; d++) key[d] = w.keys[d] * over, value[d] = w.values[d] * over;
    std::fill(std::copy_n(w.kept.token.begin(), w.kept.count, kept), kept + a.open, -1);
    std::fill(std::copy_n(w.kept.score.begin(), w.kept.count, scores), scores + a.open, NONE);
    return;
  }
  if (a.of_lse[at] != NONE) {
    w.peak = a.of_lse[at], w.mass = 1.0f;
    std::copy_n(rows, a.dim * a.dim, w.rows), std::copy_n(key, a.dim, w.keys), std::copy_n(value, a.dim, w.values);
  }
  for (; w.kept.count < a.open && kept[w.kept.count] >= 0; w.kept.count++) {
    w.kept.token[w.kept.count] = kept[w.kept.count];
    w.kept.score[w.kept.count] = scores[w.kept.count];
  }
}

extern "C" int farfield_advance(const Advance* advance) {
  const Advance& a = *advance;
  Expansion c{};
  c.key = a.key, c.value = a.value, c.centres = a.centres, c.batch = a.batch, c.heads = a.heads, c.shared = a.shared;
  c.read = a.read, c.length = a.room, c.dim = a.dim, c.number = a.number, c.block = a.block, c.open = a.open, c.threads = a.threads;
  c.scale = a.scale;
  return expand(c, c.batch * c.heads * c.number, [&](Expander& worker, int64_t i) {
    const int64_t b = i / c.number / c.heads, h = i / c.number % c.heads, centre = i % c.number;
    worker.begin(h, centre);
    exchange(a, worker, place_of(a, b, h, centre, a.first), false);
    for (int64_t n = a.first; n < a.last; n++) {
      worker.place.clear();
      for (int64_t j = std::max(a.sinks, n * a.block); j < (n + 1) * a.block; j++) worker.place.push_back(j - a.before);
      worker.sift(b, h);
      worker.absorb();
      if (n + 1 > a.last - a.places) exchange(a, worker, place_of(a, b, h, centre, n + 1), true);
    }
  });
}

// A step of decoding: one query of some heads, from the sums and the tokens kept that a cache has at one of its places,
// merged into what these heads have seen already.
struct ExpansionStep {
  const float *query, *centres, *bias;             // [batch, all, D], [heads, number, D], [heads]
  const int64_t* place;                            // [heads] which of all heads each is
  const float *of_lse, *of_key, *of_rows;          // [batch, heads, places, number], [.., D], [.., D + 1, D]
  const int64_t* kept;                             // [batch, heads, places, number, open]; negative: none
  const float *keys, *values;                      // [batch, shared, room, D]
  const int64_t* read;                             // [heads] the key head of each
  float *out, *lse;                                // [batch, all, D], [batch, all]
  int64_t batch, heads, all, number, dim, places, at, open, shared, room;
  float scale;
};

struct Expanding {
  std::vector<const float*> row;
  std::vector<float> score, x;
  std::vector<const float*> value;
};

static void step_expansion(const ExpansionStep& c, int64_t b, int64_t h, Expanding& m) {
  const int64_t here = b * c.all + c.place[h];
  const float *const query = c.query + here * c.dim, *const centres = c.centres + h * c.number * c.dim;
  m.row.clear();
  for (int64_t i = 0; i < c.number; i++) m.row.push_back(centres + i * c.dim);
  products(query, m.row, c.dim, m.score);
  int64_t own = 0;
  float best = NONE;
  for (int64_t i = 0; i < c.number; i++) {
    float square = 0.0f;
    for (int64_t d = 0; d < c.dim; d++) square += centres[i * c.dim + d] * centres[i * c.dim + d];
    const float near = m.score[i] - 0.5f * square;
    if (near > best || near != near) best = near, own = i;
    if (near != near) break;
  }
  const int64_t at = ((b * c.heads + h) * c.places + c.at) * c.number + own;
  const float *const centre = centres + own * c.dim, *const key = c.of_key + at * c.dim;
  const float* const rows = c.of_rows + at * (c.dim + 1) * c.dim;
  m.x.resize(3 * c.dim);
  float *const x = m.x.data(), *const asked = x + c.dim, *const far = asked + c.dim;
  float common = 0.0f;
  for (int64_t d = 0; d < c.dim; d++) {
    x[d] = (query[d] - centre[d]) * c.scale, asked[d] = query[d] * c.scale;
    common += x[d] * key[d];
  }
  const float cell = c.of_lse[at] == NONE ? NONE : c.of_lse[at] + common + c.bias[h];
  m.row.clear(), m.value.clear();
  const int64_t from = (b * c.shared + c.read[h]) * c.room;
  for (int64_t i = 0; i < c.open; i++) {
    const int64_t token = c.kept[at * c.open + i];
    if (token >= 0) m.row.push_back(c.keys + (from + token) * c.dim), m.value.push_back(c.values + (from + token) * c.dim);
  }
  const int64_t n = m.row.size();
  if (n) products(asked, m.row, c.dim, m.score);
  float peak = cell;
  for (int64_t i = 0; i < n; i++) peak = m.score[i] > peak || m.score[i] != m.score[i] ? m.score[i] : peak;
  if (peak == NONE) return;
  float *const out = c.out + here * c.dim, total = 0.0f;
  std::fill(far, far + c.dim, 0.0f);
  if (cell != NONE) {
    const float weight = std::exp(cell - peak);
    total = weight;
    for (int64_t d = 0; d < c.dim; d++) far[d] = weight * (1.0f - common) * rows[c.dim * c.dim + d];
    for (int64_t i = 0; i < c.dim; i++)
      for (int64_t d = 0; d < c.dim; d++) far[d] += weight * x[i] * rows[i * c.dim + d];
  }
  for (int64_t i = 0; i < n; i++) {
    const float weight = std::exp(m.score[i] - peak);
    total += weight;
    for (int64_t d = 0; d < c.dim; d++) far[d] += weight * m.value[i][d];
  }
  // Into one softmax with what was there: both in units of the larger.
  const float lse = peak + std::log(total), before = c.lse[here], most = before > lse ? before : lse;
  const float old = before == NONE ? 0.0f : std::exp(before - most), fresh = std::exp(lse - most);
  for (int64_t d = 0; d < c.dim; d++) out[d] = (old * out[d] + fresh / total * far[d]) / (old + fresh);
  c.lse[here] = most + std::log(old + fresh);
}

extern "C" int farfield_step_expansions(const ExpansionStep* steps, int64_t count, int64_t threads) {
  return guarded([=] {
    struct Task {
      int64_t of, row;
    };
    std::vector<Task> tasks;
    int64_t work = 0;
    for (int64_t s = 0; s < count; s++) {
      const ExpansionStep& c = steps[s];
      work += c.batch * c.heads * (c.number + c.dim + 2 * c.open) * c.dim;
      for (int64_t row = 0; row < c.batch * c.heads; row++) tasks.push_back({s, row});
    }
    bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads) if (work > SHORT)
    for (int64_t i = 0; i < (int64_t)tasks.size(); i++) {
      try {
        Expanding memory;
        const ExpansionStep& c = steps[tasks[i].of];
        step_expansion(c, tasks[i].row / c.heads, tasks[i].row % c.heads, memory);
      } catch (...) {
#pragma omp atomic write
        failed = true;
      }
    }
    if (failed) throw std::bad_alloc();
  });
}

// So that a caller can see that it speaks of the same structures.
extern "C" int64_t farfield_size(int64_t of) {
  const int64_t sizes[] = {sizeof(Store), sizeof(Call), sizeof(Reduction), sizeof(Rung), sizeof(Descent), sizeof(Step),
                           sizeof(Expansion), sizeof(Advance), sizeof(ExpansionStep)};
  return sizes[of];
}
