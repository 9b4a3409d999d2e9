// adopt.py
#pragma once
#include "common.h"
#include "storage.h"

inline void normalize(const float* g, const float* v, int c, float floor, float bound, float* x) {
  SIMD for (int i = 0; i < c; ++i) {
    const float y = g[i] / std::max(std::sqrt(v[i]), floor);
    x[i] = y < -bound ? -bound : (y > bound ? bound : y);
  }
}

inline bool any(const float* g, int64_t n) {
  int64_t count = 0;
  SIMD_SUM(count) for (int64_t i = 0; i < n; ++i) count += g[i] != 0;
  return count > 0;
}

// the first call: v becomes g^2 and no weight changes; with a gradient of zeros this waits for a later call
inline void seed(const Tensor& t, const Call& call, const float* g, float* v) {
  if (!any(g, t.n)) return;
  for (int64_t at = 0; at < t.n; at += BLOCK) {
    const int c = int(std::min<int64_t>(BLOCK, t.n - at));
    SIMD for (int i = 0; i < c; ++i) v[at + i] = g[at + i] * g[at + i];
    if (t.eight_bit) encode_block<false>(v + at, c, call, static_cast<uint8_t*>(t.v) + at, t.v_peak + at / BLOCK);
  }
  *t.state.adopt_k = 1;
}
