// orthogonalize.py, through the short side: with G = X X^T all its polynomials commute, so that five steps on r x r
// matrices in double give P with NS(X) = P X. Two passes over X instead of fifteen.
#pragma once
#include <vector>

#include "alora.h"
#include "common.h"

constexpr int64_t TILE = 16;  // rows and columns that are transposed together

// to = from^T, from [rows, columns]
inline void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; row += TILE)
    for (int64_t column = 0; column < columns; column += TILE)
      for (int64_t j = column; j < std::min(column + TILE, columns); ++j)
        for (int64_t i = row; i < std::min(row + TILE, rows); ++i) to[j * rows + i] = from[i * columns + j];
}

// c = a b, all [r, r]
inline void multiply(const double* a, const double* b, int64_t r, double* c) {
  std::fill(c, c + r * r, 0.0);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t k = 0; k < r; ++k) {
      const double x = a[i * r + k];
      SIMD for (int64_t j = 0; j < r; ++j) c[i * r + j] += x * b[k * r + j];
    }
}

// `p` [r, padded(r)] of x [r, n], whose Gram matrix comes in `p`
inline void newton_schulz(float* p, int64_t r) {
  const int64_t width = padded(r), size = r * r;
  std::vector<double> room(5 * size);
  double *g = room.data(), *q = g + size, *product = q + size, *next = product + size, *all = next + size;
  double trace = 0;
  for (int64_t i = 0; i < r; ++i) trace += p[i * width + i];
  const double scale = trace == 0 ? 0 : 1 / trace;  // NaN stays
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) {
      g[i * r + j] = p[i * width + j] * scale;
      all[i * r + j] = i == j ? std::sqrt(scale) : 0.0;
    }
  for (int step = 0; step < 5; ++step) {
    multiply(g, g, r, product);
    for (int64_t i = 0; i < size; ++i) q[i] = -4.775 * g[i] + 2.0315 * product[i];
    for (int64_t i = 0; i < r; ++i) q[i * r + i] += 3.4445;
    multiply(q, all, r, next);
    std::swap(all, next);
    multiply(q, g, r, product);
    multiply(product, q, r, g);
  }
  std::fill(p, p + r * width, 0.0f);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) p[i * width + j] = float(all[i * r + j]);
}

// y = s P x, all [r, n] but P [r, padded(r)]
inline void apply(const float* p, const float* x, int64_t r, int64_t n, float s, float* y) {
  const int64_t width = padded(r);
  for (int64_t at = 0; at < n; at += LANES) {
    const int64_t count = std::min<int64_t>(LANES, n - at);
    for (int64_t i = 0; i < r; i += 4) {
      Lanes sums[4] = {};
      for (int64_t j = 0; j < r; ++j) {
        const Lanes column = count == LANES ? load(x + j * n + at) : load(x + j * n + at, count);
        for (int64_t k = 0; k < 4; ++k) sums[k] += p[std::min(i + k, r - 1) * width + j] * column;
      }
      for (int64_t k = 0; k < 4 && i + k < r; ++k) {
        sums[k] *= s;
        std::memcpy(y + (i + k) * n + at, &sums[k], count * sizeof(float));
      }
    }
  }
}

// the orthogonalised momentum, in y; x and y are scratch
inline void orthogonalize(const float* m, const float* g, const Tensor& t, const Recipe& r, float* x, float* y) {
  const int64_t rows = t.rows, columns = t.n / rows, side = std::min(rows, columns), length = t.n / side;
  const float ahead = r.orthogonalize_nesterov ? r.one_minus_beta1 : 0.0f;
  float* const straight = rows <= columns ? x : y;
  float peak = 0;
  SIMD for (int64_t i = 0; i < t.n; ++i) straight[i] = m[i] + ahead * (g[i] - m[i]);
  SIMD_MAX(peak) for (int64_t i = 0; i < t.n; ++i) peak = std::max(peak, std::fabs(straight[i]));
  const float unit = peak > 0 ? 1 / peak : 1.0f;
  SIMD for (int64_t i = 0; i < t.n; ++i) straight[i] *= unit;
  if (rows > columns) transpose(y, rows, columns, x);
  std::vector<float> p(side * padded(side));
  gram_matrix(x, side, length, p.data());
  newton_schulz(p.data(), side);
  const float size = float(r.orthogonalize_scale * std::sqrt(double(length)));
  apply(p.data(), x, side, length, size, y);
  if (rows > columns) {
    transpose(y, side, length, x);
    std::copy(x, x + t.n, y);
  }
}

// the scale of the entries that agree with the gradient
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
