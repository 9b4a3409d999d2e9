// cautious.py
#pragma once
#include "common.h"

// The first moment, and with it the scale of the entries that agree: u will have the sign of m
inline float first_moment(float* m, const float* x, const float* g, const Tensor& t, const Recipe& r, float entering) {
  const float weight = r.one_minus_beta1;
  int64_t agreeing = 0;
  for (int64_t at = 0; at < t.n; at += BLOCK) {
    const int64_t end = std::min<int64_t>(at + BLOCK, t.n);
    int32_t agree = 0;
    SIMD_SUM(agree) for (int64_t i = at; i < end; ++i) {
      const float to = entering * x[i];
      // torch.lerp, which takes the nearer end as its base
      const float y = weight < 0.5f ? std::fma(weight, to - m[i], m[i]) : std::fma(weight - 1.0f, to - m[i], to);
      agree += ((y > 0) & (g[i] > 0)) | ((y < 0) & (g[i] < 0));
      m[i] = y;
    }
    agreeing += agree;
  }
  return 1.0f / std::max(float(double(agreeing) / double(t.n)), float(r.cautious_min));
}

// The same scale for an update that has not the signs of m
inline float agreement(const float* u, const float* g, int64_t n, float least) {
  int64_t agreeing = 0;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int64_t end = std::min<int64_t>(at + BLOCK, n);
    int32_t agree = 0;
    SIMD_SUM(agree) for (int64_t i = at; i < end; ++i) agree += ((u[i] > 0) & (g[i] > 0)) | ((u[i] < 0) & (g[i] < 0));
    agreeing += agree;
  }
  return 1.0f / std::max(float(double(agreeing) / double(n)), least);
}

inline void mask(float* u, const float* g, int c, float scale) {
  SIMD for (int i = 0; i < c; ++i) {
    const bool agree = ((u[i] > 0) & (g[i] > 0)) | ((u[i] < 0) & (g[i] < 0));
    u[i] = u[i] * (agree ? scale : 0.0f);  // a product, so that NaN is not masked
  }
}
