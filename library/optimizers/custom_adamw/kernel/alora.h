// alora.py: the Gram trick; one factor for each row of lora_up
#pragma once
#include "common.h"

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;  // longer vectors than the processor's would go through memory
#endif
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

inline Lanes load(const float* x) {
  Lanes y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

inline Lanes load(const float* x, int64_t count) {  // zeros after the first `count`
  Lanes y = {};
  std::memcpy(&y, x, std::min<int64_t>(count, LANES) * sizeof(float));
  return y;
}

inline float total(Lanes x) {
  float y[LANES];
  std::memcpy(y, &x, sizeof y);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) y[i] += y[i + half];
  return y[0];
}

inline int64_t padded(int64_t rank) { return (rank + LANES - 1) / LANES * LANES; }

// lora_down times its transpose, in tiles of 4 x 4: lines of `gram` are padded to whole Lanes with zeros
inline void gram_matrix(const float* down, int64_t rank, int64_t columns, float* gram) {
  const int64_t width = padded(rank);
  std::fill(gram, gram + rank * width, 0.0f);
  for (int64_t i = 0; i < rank; i += 4)
    for (int64_t j = 0; j <= i; j += 4) {
      const float *a[4], *b[4];
      for (int64_t k = 0; k < 4; ++k) {
        a[k] = down + std::min(i + k, rank - 1) * columns;
        b[k] = down + std::min(j + k, rank - 1) * columns;
      }
      Lanes sums[4][4] = {};
      int64_t at = 0;
      for (; at + LANES <= columns; at += LANES) {
        const Lanes y[4] = {load(b[0] + at), load(b[1] + at), load(b[2] + at), load(b[3] + at)};
        for (int k = 0; k < 4; ++k)
          for (int l = 0; l < 4; ++l) sums[k][l] += load(a[k] + at) * y[l];
      }
      for (int k = 0; k < 4 && at < columns; ++k)
        for (int l = 0; l < 4; ++l) sums[k][l] += load(a[k] + at, columns - at) * load(b[l] + at, columns - at);
      for (int64_t k = 0; k < 4 && i + k < rank; ++k)
        for (int64_t l = 0; l < 4 && j + l < rank; ++l)
          gram[(i + k) * width + j + l] = gram[(j + l) * width + i + k] = total(sums[k][l]);
    }
}

inline void row_factors(const Tensor& t, const Recipe& r, const float* up, const float* gram, float* f) {
  const int64_t rank = t.rank, width = padded(rank), rows = t.n / rank;
  for (int64_t row = 0; row < rows; row += 4) {  // four at a time: they share what is loaded
    const float* b[4];
    for (int64_t k = 0; k < 4; ++k) b[k] = up + std::min(row + k, rows - 1) * rank;
    Lanes squares[4] = {};
    for (int64_t at = 0; at < rank; at += LANES) {
      Lanes lines[4] = {};
      for (int64_t i = 0; i < rank; ++i) {
        const Lanes column = load(gram + i * width + at);
        for (int k = 0; k < 4; ++k) lines[k] += b[k][i] * column;
      }
      for (int k = 0; k < 4; ++k)
        squares[k] += lines[k] * (at + LANES <= rank ? load(b[k] + at) : load(b[k] + at, rank - at));
    }
    for (int64_t k = 0; k < 4 && row + k < rows; ++k) f[row + k] = total(squares[k]);
  }
  const float scale = float(r.alora_eta * r.alora_eta * r.lora_scale);
  const float ratio = std::isnan(r.lora_plus_ratio) ? float(r.alora_ratio) : 1.0f;  // NaN: the group has none
  SIMD for (int64_t row = 0; row < rows; ++row) {
    const float norm = std::sqrt(f[row] > 0 ? f[row] : 0.0f);
    f[row] = ratio / std::sqrt(1 + scale * norm);
  }
}

// the factors of the values at ... at + c - 1
inline void spread(const float* rows, int64_t rank, int64_t at, int c, float* f) {
  int64_t row = at / rank, left = rank - at % rank;
  for (int i = 0; i < c; ++row, left = rank) {
    const int end = int(std::min<int64_t>(c, i + left));
    for (; i < end; ++i) f[i] = rows[row];
  }
}
