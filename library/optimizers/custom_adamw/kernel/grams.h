// grams.py
#pragma once
#include "common.h"

inline void redirect(float* u, const float* g, int c) {
  SIMD for (int i = 0; i < c; ++i) {
    const float sign = g[i] > 0 ? 1.0f : (g[i] < 0 ? -1.0f : 0.0f);
    u[i] = sign * std::fabs(u[i]);
  }
}
