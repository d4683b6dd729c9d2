// Small matrix products: tiles of many queries, and a few queries or one.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "tasks.h"
#include "vectors.h"

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

// to[i] = x . row[i]; both grow to whole vectors.
static void products(const float* x, std::vector<const float*>& row, int64_t dim, std::vector<float>& to) {
  const int64_t n = row.size();
  row.resize(up_to(n, LANES), n ? row.back() : nullptr);
  to.resize(row.size());
  for (int64_t i = 0; i < n; i += LANES) dots(x, 1, &row[i], dim, &to[i], 0);
  row.resize(n);
}
