// The formulas, each as in the file that its comment names.
#pragma once
#include "common.h"

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

// what AGR and SPD need to know about the whole tensor
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

// agr.py
inline void regularize(const float* g, int64_t n, double sizes, float* out) {
  const float total = sizes == 0 ? 1.0f : float(sizes);
  SIMD for (int64_t i = 0; i < n; ++i) out[i] = g[i] * (1.0f - std::fabs(g[i]) / total);
}

// orthograd.py
inline void project(const float* w, const float* g, int64_t n, float* out) {
  const double length = std::sqrt(dot(g, g, n));
  const float along = float(dot(w, g, n) / (dot(w, w, n) + 1e-30));
  SIMD for (int64_t i = 0; i < n; ++i) out[i] = g[i] - along * w[i];
  const double rest = std::sqrt(dot(out, out, n));
  const float scale = rest <= 4 * double(FLT_EPSILON) * length ? 0.0f : float(length / (rest + 1e-30));
  SIMD for (int64_t i = 0; i < n; ++i) out[i] *= scale;
}

// adopt.py
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

// tam.py: <m, x>, <m, m>, <x, x> of a block, added to the sums so far
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

// tam.py: what the entering gradient is multiplied with, from the sums of `align`
inline float torque(const Tensor& t, const Recipe& r, const Rates& q, const double* sums) {
  const double lengths = std::sqrt(sums[1]) * std::sqrt(sums[2]);
  *t.s = float(r.tam_beta * *t.s + (1 - r.tam_beta) * (sums[0] / (lengths == 0 ? 1 : lengths)));
  const double steps = r.adopt ? double(*t.k) : q.step;
  const double s = r.tam_bias_correction ? *t.s / (1 - std::pow(r.tam_beta, steps)) : *t.s;
  return float(1e-8 + (1 + s) / 2);
}

// cautious.py: the scale of what agrees. u has the sign of m
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
  return 1.0f / std::max(float(double(agreeing) / double(t.n)), r.cautious_min);
}

// spd.py
inline void decay_selectively(float* w, int64_t n, const Recipe& r, double pull, const double* squares) {
  const double before = std::sqrt(squares[0]), after = std::sqrt(squares[1]);
  if (!(pull > 0) || !(after > before)) return;  // c = -pull
  const float shrink = r.spd_lambda * float((after - before) / after);
  SIMD for (int64_t i = 0; i < n; ++i) w[i] = w[i] - shrink * w[i];
}
