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

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "products.h"
#include "tasks.h"
#include "vectors.h"

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
