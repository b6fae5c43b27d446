// 16-bit floats to float in integer operations that every vector unit has; exact, NaN stays NaN.
#pragma once

#include <cstdint>

#include "cpu/fast_exp.h"

namespace effkern {

// Storage types: distinct, so that kernels are chosen by overload.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

EFFKERN_INLINE float widen(float value) { return value; }
EFFKERN_INLINE float widen(BFloat16 value) { return from_bfloat16(value.bits); }

EFFKERN_INLINE float widen(Float16 value) {
  constexpr uint32_t kExponent = 0x7c00u << 13, kBiasGap = uint32_t{127 - 15} << 23;
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const uint32_t exponent = magnitude & kExponent;
  // Subnormals get an implicit one that is then subtracted; infinity and NaN need the largest exponent.
  const uint32_t subnormal =
      float_to_bits(bits_to_float(magnitude + kBiasGap + (1u << 23)) - 0x1p-14f);
  const uint32_t normal = magnitude + kBiasGap + (exponent == kExponent ? kBiasGap : 0);
  return bits_to_float(sign | (exponent == 0 ? subnormal : normal));
}

}  // namespace effkern
