// The largest of scores, and the descent from coarse cells to the pages that are opened: ops/opened/choose.py, compiled.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "products.h"
#include "tasks.h"
#include "vectors.h"

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
