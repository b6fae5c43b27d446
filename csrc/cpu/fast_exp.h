// exp and tanh as plain arithmetic, so that a loop over lanes becomes vector code in every clone.
#pragma once

#include <cstdint>
#include <cstring>

#include "clones.h"

namespace effkern {

EFFKERN_INLINE float bits_to_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

EFFKERN_INLINE int32_t float_to_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// `a` where `which`, else `b`: by bits, so that both are computed in all lanes. Of a conditional the compiler may make
// arithmetic under a mask, whose other lanes hold what was there before; where that is subnormal, the processor assists at
// every operation.
EFFKERN_INLINE float select(bool which, float a, float b) {
  const int32_t mask = -static_cast<int32_t>(which);
  return bits_to_float((float_to_bits(a) & mask) | (float_to_bits(b) & ~mask));
}

// exp(x) for x <= 88, relative error below 2e-7; 0 below -87.3, NaN for NaN.
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; exp(r) = 1 + r + r^2 P(r) with P fitted to the
// smallest relative error, 3e-9.
EFFKERN_INLINE float fast_exp(float x) {
  const float low = -87.33654f;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits; 127 is the exponent's bias.
  const float shift = 12582912.0f + 127.0f;
  // Comparisons are written so that NaN passes through.
  const float bounded = x < low ? low : x;
  const float rounded = bounded * 1.44269504f + shift;
  const float n = rounded - shift;
  // ln 2 in two parts: the first has so few bits that n * part is exact.
  float r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.38144672e-3f;
  p = p * r + 8.36878084e-3f;
  p = p * r + 4.16683927e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r * r + r;
  // Unsigned, as NaN leaves any bits here.
  const float scale = bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(float_to_bits(rounded)) << 23));
  return x < low ? 0.0f : p * scale + scale;
}

// log(sum + lost) for sum in [0, 2] and a `lost` of its rounding, relative error below 4e-7; -inf for 0, NaN for NaN.
// sum + lost = 2^n (1 + f), 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f^2 / 2 + f^3 P(f), P fitted to 6e-9.
EFFKERN_INLINE float fast_log(float sum, float lost) {
  const int32_t root_half = 0x3f3504f3;
  const int32_t n = (float_to_bits(sum) - root_half) >> 23;
  // 2^-n; both products are exact, and so is the difference.
  const float scale = bits_to_float(static_cast<int32_t>(0x3f800000u - (static_cast<uint32_t>(n) << 23)));
  const float f = (sum * scale - 1.0f) + lost * scale;
  float p = -0.0763449302f;
  p = p * f + 0.127615756f;
  p = p * f - 0.131601831f;
  p = p * f + 0.142017582f;
  p = p * f - 0.166233573f;
  p = p * f + 0.200012269f;
  p = p * f - 0.25000821f;
  p = p * f + 0.333333317f;
  const float exponent = static_cast<float>(n);
  const float log_f = f - (0.5f * f * f - f * f * f * p);
  const float result = exponent * 0.693359375f + (log_f - exponent * 2.12194440e-4f);
  return sum > 0.0f ? result : (sum == 0.0f ? bits_to_float(static_cast<int32_t>(0xff800000u)) : sum);
}

// x^2 S(x) = x + exp(-x) - 1 for |x| < 1/2, relative error below 1e-8.
EFFKERN_INLINE float excess_series(float x) {
  float s = 2.48015873e-5f;
  s = s * x - 1.98412698e-4f;
  s = s * x + 1.38888889e-3f;
  s = s * x - 8.33333333e-3f;
  s = s * x + 4.16666667e-2f;
  s = s * x - 1.66666667e-1f;
  s = s * x + 0.5f;
  return x * x * s;
}

// tanh(x), absolute error below 2e-7, relative below 4e-7; +-1 at +-inf, NaN for NaN.
EFFKERN_INLINE float fast_tanh(float x) {
  float square = x * x;
  float p = 0.021869488f;
  p = p * square - 0.053968254f;
  p = p * square + 0.13333333f;
  p = p * square - 0.33333333f;
  float small = x + x * square * p;
  // Beyond 10, tanh is 1 in float.
  float bounded = x > 10.0f ? 10.0f : x;
  float large = 1.0f - 2.0f / (fast_exp(2.0f * bounded) + 1.0f);
  return (x < 0.3f) & (x > -0.3f) ? small : large;
}

// Round to nearest even; NaN stays NaN.
EFFKERN_INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits = static_cast<uint32_t>(float_to_bits(value));
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

EFFKERN_INLINE float from_bfloat16(uint16_t value) {
  return bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(value) << 16));
}

}  // namespace effkern
