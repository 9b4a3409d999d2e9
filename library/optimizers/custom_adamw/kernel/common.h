// What the parts of the kernel share: the structures that native.py fills in, and how loops are vectorised.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#define SIMD_TEXT(...) #__VA_ARGS__
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(...) _Pragma(SIMD_TEXT(omp simd reduction(+ : __VA_ARGS__)))
#define SIMD_MAX(x) _Pragma(SIMD_TEXT(omp simd reduction(max : x)))

constexpr int BLOCK = 256;  // values that share a maximum in 8 bits; also what a pass works on at a time, in L1
constexpr int SCRATCH_ARRAYS = 6;

enum Direction : int32_t { PLAIN = 0, GRAMS = 1, CAUTIOUS = 2 };

struct Recipe {  // options.Recipe
  int32_t agr, orthograd, adopt, tam, tam_bias_correction, direction, alora, spd, stochastic_rounding;
  float one_minus_beta1, beta2, one_minus_beta2, eps, adopt_eps, cautious_min, spd_lambda;
  double adopt_clip, tam_beta, alora_ratio, alora_eta, lora_scale;
};

struct Rates {  // options.Rates
  double step;
  float lr, decay, step_size, root_correction;
};

struct Tensor {
  void *w, *m, *v;  // moments: float, or uint8 codes with one maximum a block in m_peak, v_peak
  float *m_peak, *v_peak, *k, *s;
  const void* down;  // lora_up's partner, for its row factors
  int64_t n, rank, down_columns;
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
