// Storage of weights and moments: bfloat16 (rounding.py), 8-bit codes (codec.py).
#pragma once
#include "common.h"

inline float to_float(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline const float* floats(const void* data, bool bfloat16, int64_t n, float* room) {
  if (!bfloat16) return static_cast<const float*>(data);
  const uint16_t* from = static_cast<const uint16_t*>(data);
  SIMD for (int64_t i = 0; i < n; ++i) room[i] = to_float(from[i]);
  return room;
}

// rounding.py
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

inline void store_bfloat16(const float* x, uint16_t* to, int64_t n, bool stochastic, uint32_t ordinal, uint32_t step) {
  const uint32_t row = mix(mix(ordinal) + step);
  SIMD for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]);
    const uint32_t nearest = 0x7FFFu + ((bits >> 16) & 1);  // ties to even
    const uint32_t noise = mix(row + uint32_t(i) * 0x9E3779B9u) >> 16;
    const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
    const uint32_t rounded = (bits + (stochastic ? noise : nearest)) >> 16;
    const uint32_t special = (bits >> 16) | ((bits & 0x7FFFFFu) ? 0x40u : 0u);
    to[i] = uint16_t(finite ? rounded : special);
  }
}

// codec.py
inline void decode(const uint8_t* codes, const float* peaks, const Codec& map, int64_t n, float* x) {
  for (int64_t at = 0; at < n; at += BLOCK) {
    const float peak = peaks[at / BLOCK];
    const int64_t end = std::min<int64_t>(at + BLOCK, n);
    SIMD for (int64_t i = at; i < end; ++i) x[i] = map.values[codes[i]] * peak;
  }
}

template <bool is_signed>
void encode_block(const float* x, int c, const Call& call, uint8_t* codes, float* peak_out) {
  float peak = 0;
  SIMD_MAX(peak) for (int i = 0; i < c; ++i) peak = std::max(peak, std::fabs(x[i]));
  if (!(peak >= FLT_MIN)) peak = 0;
  *peak_out = peak;
  const float scale = 1.0f / (peak > 0 ? peak : 1.0f);
  const float* t = (is_signed ? call.signed_map : call.unsigned_map).thresholds;
  const float t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3], t4 = t[4], t5 = t[5], t6 = t[6], t7 = t[7];
  constexpr int32_t first = is_signed ? 1 : 2;  // values in the lowest decade, twice as many in each next one
  int32_t found[BLOCK];
  SIMD for (int i = 0; i < c; ++i) {
    const float y = x[i] * scale, a = std::fabs(y);
    float tens = 1e6f;
    int32_t count = first;
    tens = a > t1 ? 1e5f : tens, count = a > t1 ? first << 1 : count;
    tens = a > t2 ? 1e4f : tens, count = a > t2 ? first << 2 : count;
    tens = a > t3 ? 1e3f : tens, count = a > t3 ? first << 3 : count;
    tens = a > t4 ? 1e2f : tens, count = a > t4 ? first << 4 : count;
    tens = a > t5 ? 1e1f : tens, count = a > t5 ? first << 5 : count;
    tens = a > t6 ? 1e0f : tens, count = a > t6 ? first << 6 : count;
    // NaN compares false, so that no undefined value is cast to an integer
    const int32_t place = int32_t(a > t0 ? (a * tens - 0.1f) * float(1 / 0.9) * float(count) : 0.0f);
    int32_t code = std::min(place, count - 1) + count - (is_signed ? 0 : 1);
    code = (a > t0 ? code : 0) + (y > t7);
    if (is_signed) code = y < 0 ? 127 - code : 127 + code;
    else code = (code == 0 && y > 0) ? 1 : code;  // a second moment stays positive
    found[i] = code;
  }
  SIMD for (int i = 0; i < c; ++i) codes[i] = uint8_t(found[i]);
}
