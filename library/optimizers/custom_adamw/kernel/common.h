// The common part of the kernel: the structures that native.py fills in, vectorised loops, and sums. The structures
// Recipe and State are derived from the techniques' declarations; native.py writes declared.h when it compiles.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "declared.h"

#define SIMD_TEXT(...) #__VA_ARGS__
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(...) _Pragma(SIMD_TEXT(omp simd reduction(+ : __VA_ARGS__)))
#define SIMD_MAX(x) _Pragma(SIMD_TEXT(omp simd reduction(max : x)))

constexpr int BLOCK = 256;  // values that share a maximum in 8 bits; also the block of one pass, which fits into L1
constexpr int SCRATCH_ARRAYS = 6;

struct Rates {  // options.Rates
  double step;
  float lr, decay, step_size, root_correction;
};

struct Tensor {
  void *w, *m, *v;  // moments: float, or uint8 codes with one maximum a block in m_peak, v_peak
  float *m_peak, *v_peak;
  const void* down;  // lora_up's partner, where a technique reads it
  State state;       // null: not kept
  int64_t n, rank, down_columns, rows;
  int32_t bfloat16, eight_bit, recipe;
  uint32_t ordinal;
};

struct Codec {  // codec.Map
  const float *values, *thresholds;
};

struct Call {
  const Tensor* tensors;
  const int32_t* tasks;  // two tensors each, the second may be -1: done by one thread in this order
  const Recipe* recipes;
  const Rates* rates;
  const void* const* grads;  // one for each tensor; null: no gradient in this step
  const int32_t* rates_of;   // one for each tensor
  float* scratch;
  Codec signed_map, unsigned_map;
  int64_t capacity;  // floats in each of a thread's SCRATCH_ARRAYS arrays
  int32_t n_tasks, threads;
};

// a thread's own arrays
struct Scratch {
  float *w, *g, *x, *m, *v, *f;
};

inline double dot(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int64_t end = std::min<int64_t>(at + BLOCK, n);
    float part = 0;
    SIMD_SUM(part) for (int64_t i = at; i < end; ++i) part += a[i] * b[i];
    sum += part;
  }
  return sum;
}

// sum |g| and <w, g> of the whole tensor
inline void survey(const float* w, const float* g, int64_t n, double* sizes, double* pull) {
  *sizes = *pull = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int64_t end = std::min<int64_t>(at + BLOCK, n);
    float size = 0, part = 0;
    SIMD_SUM(size, part) for (int64_t i = at; i < end; ++i) {
      size += std::fabs(g[i]);
      part += g[i] * w[i];
    }
    *sizes += size;
    *pull += part;
  }
}
