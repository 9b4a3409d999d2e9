// orthograd.py
#pragma once
#include "common.h"

inline void project(const float* w, const float* g, int64_t n, float* out) {
  const double length = std::sqrt(dot(g, g, n));
  const float along = float(dot(w, g, n) / (dot(w, w, n) + 1e-30));
  SIMD for (int64_t i = 0; i < n; ++i) out[i] = g[i] - along * w[i];
  const double rest = std::sqrt(dot(out, out, n));
  const float scale = rest <= 4 * double(FLT_EPSILON) * length ? 0.0f : float(length / (rest + 1e-30));
  SIMD for (int64_t i = 0; i < n; ++i) out[i] *= scale;
}
