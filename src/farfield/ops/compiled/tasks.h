// Threads, and what runs out of memory in them.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

constexpr int64_t SHORT = 1 << 17;  // multiply-adds that one thread does before others have begun

static inline int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

static inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

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
