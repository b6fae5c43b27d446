// Widening loads and the exponential, for nvcc and for the host build.
#pragma once

#include "cuda/launch.h"

namespace effkern {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

// 16 bytes of T: one load instruction.
template <typename T>
struct alignas(16) Vec16 {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// exp(x), 2 ulp of exp2 plus the rounding of x * log2(e); results below 2^-126 are zero.
__device__ __forceinline__ float fast_exp(float x) {
#if defined(EFFKERN_HOST_CUDA)
  return std::exp(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
#endif
}

}  // namespace effkern
