// Float32 tiles of 8 x 48 numbers for the symmetric products of Shampoo, where the CPU has AVX-512.
//
// An operand is a panel [depth][lines]: what lies side by side are lines of the result. A matrix stored row by row is
// such a panel of itself where the sum runs over its rows, as in W^T W; otherwise pack_wide transposes it.
#pragma once

#include "cpu/gemm_bf16.h"

#if defined(EFFKERN_HAS_BF16)
namespace effkern::tiles {

using bf16::ceil_div;

constexpr int kLanes = bf16::kLanes;
constexpr int kRows = bf16::kRows;
// Lines of a panel.
constexpr int kPanel = bf16::kColumns;

// Sizes are padded to it, so that a tile needs no mask.
inline int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }

inline bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

enum class Store { kSet, kNegate, kSubtract, kAddScaled };

struct Panel {
  const float* data;
  int64_t step;
};

struct Out {
  float* data;
  int64_t stride;
  float scale = 1.0f;
};

// out (8 x 16 kWidth) <- what kStore says of a^T b.
template <Store kStore, int kWidth>
EFFKERN_BF16_INLINE void tile_of(Panel a, Panel b, int64_t depth, Out out) {
  if constexpr (kStore == Store::kSubtract || kStore == Store::kAddScaled) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < kWidth; ++j) __builtin_prefetch(out.data + i * out.stride + j * kLanes, 1);
  }
  __m512 sum[kRows][kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kWidth; ++j) sum[i][j] = _mm512_setzero_ps();
  const float *x = a.data, *y = b.data;
  for (int64_t k = 0; k < depth; ++k) {
    __m512 line[kWidth];
#pragma GCC unroll 3
    for (int j = 0; j < kWidth; ++j) line[j] = _mm512_loadu_ps(y + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512 factor = _mm512_set1_ps(x[i]);
#pragma GCC unroll 3
      for (int j = 0; j < kWidth; ++j) sum[i][j] = _mm512_fmadd_ps(factor, line[j], sum[i][j]);
    }
    x += a.step;
    y += b.step;
  }
  const __m512 scale = _mm512_set1_ps(out.scale);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kWidth; ++j) {
      float* to = out.data + i * out.stride + j * kLanes;
      __m512 value = sum[i][j];
      if constexpr (kStore == Store::kNegate) value = _mm512_sub_ps(_mm512_setzero_ps(), value);
      if constexpr (kStore == Store::kSubtract) value = _mm512_sub_ps(_mm512_loadu_ps(to), value);
      if constexpr (kStore == Store::kAddScaled) value = _mm512_fmadd_ps(scale, value, _mm512_loadu_ps(to));
      _mm512_storeu_ps(to, value);
    }
}

template <Store kStore>
EFFKERN_BF16 inline void tile(Panel a, Panel b, int64_t depth, Out out, int width) {
  switch (width) {
    case 16:
      return tile_of<kStore, 1>(a, b, depth, out);
    case 32:
      return tile_of<kStore, 2>(a, b, depth, out);
    default:
      return tile_of<kStore, 3>(a, b, depth, out);
  }
}

// Columns of the tile of rows i0 ... i0 + 7 that the lower triangle needs, of the `width` from j0 on.
inline int width_of_triangle(int64_t i0, int64_t j0, int width) {
  return static_cast<int>(std::min<int64_t>(width, padded(i0 + kRows - j0)));
}

// The upper triangle of a square, from the lower one; `n` a multiple of 16.
EFFKERN_BF16 inline void mirror(float* x, int64_t n, int64_t stride) {
  __m512i square[kLanes];
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t j = 0; j <= i; j += kLanes) {
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = _mm512_loadu_si512(x + (i + r) * stride + j);
      bf16::transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r)
        if (i == j) {
          // What lies right of the diagonal.
          _mm512_mask_storeu_epi32(x + (j + r) * stride + i, static_cast<__mmask16>(0xfffeu << r), square[r]);
        } else {
          _mm512_storeu_si512(x + (j + r) * stride + i, square[r]);
        }
    }
}

// The panel of up to 48 rows of a float32 matrix whose sums run along the rows; `width` lines, zero beyond `rows`.
EFFKERN_BF16 inline void pack(const float* x, int64_t stride, int rows, int width, int64_t depth, float* panel) {
  bf16::pack_wide({reinterpret_cast<const uint16_t*>(x), 2 * stride}, rows, width / kLanes, 2 * depth,
                  reinterpret_cast<uint32_t*>(panel));
}

}  // namespace effkern::tiles
#endif
