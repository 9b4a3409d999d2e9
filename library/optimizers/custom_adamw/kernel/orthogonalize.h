// orthogonalize.py, through the short side: with G = X X^T all its polynomials commute, so that five steps on r x r
// matrices in double give P with NS(X) = P X. Two passes over X instead of fifteen.
#pragma once
#include <vector>

#include "alora.h"
#include "common.h"

constexpr int64_t PACKED = 256;  // columns of a wide matrix that are worked on together, side by side in a cache

// x^T x of x [n, r], lines of `gram` padded to whole Lanes
inline void gram_of_rows(const float* x, int64_t n, int64_t r, float* gram) {
  const int64_t width = padded(r);
  std::fill(gram, gram + r * width, 0.0f);
  for (int64_t from = 0; from < n; from += PACKED)
    for (int64_t i = 0; i < r; i += 4)
      for (int64_t at = 0; at < r; at += LANES) {
        const int64_t count = std::min<int64_t>(LANES, r - at), to = std::min(from + PACKED, n);
        const int64_t line[4] = {i, std::min(i + 1, r - 1), std::min(i + 2, r - 1), std::min(i + 3, r - 1)};
        Lanes sums[4] = {};
        for (const float* row = x + from * r; row < x + to * r; row += r) {
          const Lanes y = count == LANES ? load(row + at) : load(row + at, count);
          for (int k = 0; k < 4; ++k) sums[k] += row[line[k]] * y;
        }
        for (int64_t k = 0; k < 4 && i + k < r; ++k) {
          const Lanes whole = load(gram + (i + k) * width + at) + sums[k];
          std::memcpy(gram + (i + k) * width + at, &whole, sizeof whole);
        }
      }
}

typedef double Four __attribute__((vector_size(32)));

// c = a b, all [w, w], w a multiple of 4
inline void multiply(const double* a, const double* b, int64_t w, double* c) {
  for (int64_t i = 0; i < w; i += 4)
    for (int64_t j = 0; j < w; j += 4) {
      Four sums[4] = {};
      for (int64_t k = 0; k < w; ++k) {
        Four line;
        std::memcpy(&line, b + k * w + j, sizeof line);
        for (int l = 0; l < 4; ++l) sums[l] += a[(i + l) * w + k] * line;
      }
      for (int l = 0; l < 4; ++l) std::memcpy(c + (i + l) * w + j, &sums[l], sizeof sums[l]);
    }
}

// `p` [r, padded(r)] of x [r, n], whose Gram matrix comes in `p`
inline void newton_schulz(float* p, int64_t r) {
  const int64_t width = padded(r), w = (r + 3) / 4 * 4, size = w * w;
  std::vector<double> room(5 * size);  // zeros, as beyond r they stay
  double *g = room.data(), *q = g + size, *product = q + size, *next = product + size, *all = next + size;
  double trace = 0;
  for (int64_t i = 0; i < r; ++i) trace += p[i * width + i];
  const double scale = trace == 0 ? 0 : 1 / trace;  // NaN stays
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) g[i * w + j] = p[i * width + j] * scale;
    all[i * w + i] = std::sqrt(scale);
  }
  for (int step = 0; step < 5; ++step) {
    multiply(g, g, w, product);
    for (int64_t i = 0; i < size; ++i) q[i] = -4.775 * g[i] + 2.0315 * product[i];
    for (int64_t i = 0; i < r; ++i) q[i * w + i] += 3.4445;
    multiply(q, all, w, next);
    std::swap(all, next);
    if (step == 4) break;
    multiply(q, g, w, product);
    multiply(product, q, w, g);
  }
  std::fill(p, p + r * width, 0.0f);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) p[i * width + j] = float(all[i * w + j]);
}

// y = s x P for x, y [n, r], P [r, padded(r)] symmetric
inline void apply_to_rows(const float* p, const float* x, int64_t n, int64_t r, float s, float* y) {
  const int64_t width = padded(r);
  for (int64_t row = 0; row < n; row += 4) {
    const float* from[4];
    for (int64_t k = 0; k < 4; ++k) from[k] = x + std::min(row + k, n - 1) * r;
    for (int64_t at = 0; at < r; at += LANES) {
      Lanes sums[4] = {};
      for (int64_t j = 0; j < r; ++j) {
        const Lanes line = load(p + j * width + at);
        for (int k = 0; k < 4; ++k) sums[k] += from[k][j] * line;
      }
      const int64_t count = std::min<int64_t>(LANES, r - at);
      for (int64_t k = 0; k < 4 && row + k < n; ++k) {
        sums[k] *= s;
        std::memcpy(y + (row + k) * r + at, &sums[k], count * sizeof(float));
      }
    }
  }
}

// y = s P x for x, y [r, n]: by packed columns, since whole rows may lie so far apart that a cache has no room for them
inline void apply_to_columns(const float* p, const float* x, int64_t r, int64_t n, float s, float* y) {
  const int64_t width = padded(r);
  std::vector<float> room(r * PACKED);
  for (int64_t from = 0; from < n; from += PACKED) {
    const int64_t c = std::min(PACKED, n - from);
    for (int64_t j = 0; j < r; ++j) {
      float* const line = room.data() + j * PACKED;
      std::copy(x + j * n + from, x + j * n + from + c, line);
      std::fill(line + c, line + PACKED, 0.0f);
    }
    for (int64_t i = 0; i < r; i += 4)
      for (int64_t at = 0; at < c; at += LANES) {
        const int64_t line[4] = {i, std::min(i + 1, r - 1), std::min(i + 2, r - 1), std::min(i + 3, r - 1)};
        Lanes sums[4] = {};
        for (int64_t j = 0; j < r; ++j) {
          const Lanes column = load(room.data() + j * PACKED + at);
          for (int k = 0; k < 4; ++k) sums[k] += p[line[k] * width + j] * column;
        }
        for (int64_t k = 0; k < 4 && i + k < r; ++k) {
          sums[k] *= s;
          std::memcpy(y + (i + k) * n + from + at, &sums[k], std::min<int64_t>(LANES, c - at) * sizeof(float));
        }
      }
  }
}

// the orthogonalised momentum, in y; x and y are scratch
inline void orthogonalize(const float* m, const float* g, const Tensor& t, const Recipe& r, float* x, float* y) {
  const int64_t rows = t.rows, columns = t.n / rows, side = std::min(rows, columns), length = t.n / side;
  const float ahead = r.orthogonalize_nesterov ? r.one_minus_beta1 : 0.0f;
  float peak = 0;
  SIMD_MAX(peak) for (int64_t i = 0; i < t.n; ++i) {
    x[i] = m[i] + ahead * (g[i] - m[i]);
    peak = std::max(peak, std::fabs(x[i]));
  }
  const float unit = peak > 0 ? 1 / peak : 1.0f;
  SIMD for (int64_t i = 0; i < t.n; ++i) x[i] *= unit;
  std::vector<float> p(side * padded(side));
  if (rows <= columns) gram_matrix(x, side, length, p.data());
  else gram_of_rows(x, length, side, p.data());
  newton_schulz(p.data(), side);
  const float size = float(r.orthogonalize_scale * std::sqrt(double(length)));
  if (rows <= columns) apply_to_columns(p.data(), x, side, length, size, y);
  else apply_to_rows(p.data(), x, length, side, size, y);
}
