// agr.py
#pragma once
#include "common.h"

inline void regularize(const float* g, int64_t n, double sizes, float* out) {
  const float total = sizes == 0 ? 1.0f : float(sizes);
  SIMD for (int64_t i = 0; i < n; ++i) out[i] = g[i] * (1.0f - std::fabs(g[i]) / total);
}
