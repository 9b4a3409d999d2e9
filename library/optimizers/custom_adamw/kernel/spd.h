// spd.py
#pragma once
#include "common.h"

inline void decay_selectively(float* w, int64_t n, const Recipe& r, double pull, const double* squares) {
  const double before = std::sqrt(squares[0]), after = std::sqrt(squares[1]);
  if (!(pull > 0) || !(after > before)) return;  // c = -pull
  const float shrink = float(r.spd_lambda) * float((after - before) / after);
  SIMD for (int64_t i = 0; i < n; ++i) w[i] = w[i] - shrink * w[i];
}
