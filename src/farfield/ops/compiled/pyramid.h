// Cells from the cells or tokens below them, level by level, and the gradients down again: ops/multipole/pyramid.py,
// compiled.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tasks.h"
#include "vectors.h"

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
