// tam.py
#pragma once
#include "common.h"

// <m, x>, <m, m>, <x, x> of a block, added to the sums so far
inline void align(const float* m, const float* x, int c, double* sums) {
  float mx = 0, mm = 0, xx = 0;
  SIMD_SUM(mx, mm, xx) for (int i = 0; i < c; ++i) {
    mx += m[i] * x[i];
    mm += m[i] * m[i];
    xx += x[i] * x[i];
  }
  sums[0] += mx;
  sums[1] += mm;
  sums[2] += xx;
}

// the factor on the entering gradient, from the sums of `align`
inline float torque(const Tensor& t, const Recipe& r, const Rates& q, const double* sums) {
  const double lengths = std::sqrt(sums[1]) * std::sqrt(sums[2]);
  float* const smoothed = t.state.tam_s;
  *smoothed = float(r.tam_beta * *smoothed + (1 - r.tam_beta) * (sums[0] / (lengths == 0 ? 1 : lengths)));
  const double updates = r.use_adopt_stability ? double(*t.state.adopt_k) : q.step;
  const double s = r.tam_bias_correction ? *smoothed / (1 - std::pow(r.tam_beta, updates)) : *smoothed;
  return float(1e-8 + (1 + s) / 2);
}
