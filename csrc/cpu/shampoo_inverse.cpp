// Inverse Cholesky factors by block elimination of [S | I], in place and from the lower triangle alone.
//
// A block column k of 48 is eliminated at a time. With C_kk of its diagonal block and W_kk = C_kk^-1:
//     R_j = W_kk W_kj for j < k        these are final rows of W
//     C_ik = S_ik W_kk^T for i > k
//     W_ij -= C_ik R_j (j < k),  W_ik = -C_ik W_kk,  S_ij -= C_ik C_jk^T (k < j <= i)
// C_ik is used in its own step alone, so that W may take its place. Two thirds of n^3 operations, all but those of the
// diagonal blocks in tiles. C is packed transposed once per step, and as such is either operand of the last update.
#include "cpu/shampoo_inverse.h"

#if defined(EFFKERN_HAS_BF16)
#include <cmath>
#include <cstring>

namespace effkern::tiles {
namespace {

// 16, 32 or 48 lines from `begin` on.
int width_at(int64_t begin, int64_t n) { return static_cast<int>(std::min<int64_t>(kPanel, n - begin)); }

// The same elimination for one block, a column at a time, with both triangles of S: row k of [W | S] is scaled and
// subtracted from the rows below.
template <int kWidth>
EFFKERN_BF16 bool invert_block(float* d) {
  constexpr int kSize = kWidth * kLanes;
  for (int k = 0; k < kSize; ++k) {
    float* row = d + k * kPanel;
    const float pivot = row[k];
    // Also false for NaN.
    if (!(pivot > 0.0f) || !(pivot < INFINITY)) return false;
    const float inverse = 1.0f / std::sqrt(pivot);
    __m512 scaled[kWidth];
#pragma GCC unroll 3
    for (int j = 0; j < kWidth; ++j) {
      const __mmask16 here = k / kLanes == j ? static_cast<__mmask16>(1u << (k % kLanes)) : 0;
      const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(row + j * kLanes), _mm512_set1_ps(inverse));
      _mm512_storeu_ps(row + j * kLanes, _mm512_mask_mov_ps(product, here, _mm512_set1_ps(inverse)));
      // Below, S_ik = C_ik sqrt(pivot) has to go and -C_ik inverse to come: both are subtracted. Zeros written one by one
      // would each hold up the vector that is read next.
      scaled[j] = _mm512_mask_add_ps(product, here, product, _mm512_set1_ps(inverse));
    }
    for (int i = k + 1; i < kSize; ++i) {
      float* below = d + i * kPanel;
      const __m512 factor = _mm512_set1_ps(below[k] * inverse);
#pragma GCC unroll 3
      for (int j = 0; j < kWidth; ++j)
        _mm512_storeu_ps(below + j * kLanes, _mm512_fnmadd_ps(factor, scaled[j], _mm512_loadu_ps(below + j * kLanes)));
    }
  }
  for (int i = 0; i < kSize; ++i)
    for (int j = i + 1; j < kSize; ++j) d[i * kPanel + j] = 0.0f;
  return true;
}

EFFKERN_BF16 bool invert_diagonal(float* s, int64_t stride, int width, float* d) {
  for (int i = 0; i < width; ++i) {
    std::memcpy(d + i * kPanel, s + i * stride, sizeof(float) * (i + 1));
    for (int j = 0; j < i; ++j) d[j * kPanel + i] = d[i * kPanel + j];
  }
  const bool positive = width == 16 ? invert_block<1>(d) : width == 32 ? invert_block<2>(d) : invert_block<3>(d);
  for (int i = 0; i < width; ++i) std::memcpy(s + i * stride, d + i * kPanel, sizeof(float) * width);
  return positive;
}

// Rows of W at a time: 48 columns of them stay in the first-level cache.
constexpr int64_t kDepth = 3 * kPanel;
constexpr int64_t kBlockFloats = int64_t{kPanel} * kPanel;

}  // namespace

int64_t panel_size(int64_t n) { return (ceil_div(n, kPanel) + 3) * kBlockFloats; }

EFFKERN_BF16 bool invert_factor(float* s, int64_t n, int64_t stride, float* panels) {
  const int64_t blocks = ceil_div(n, kPanel);
  float *diagonal = panels + blocks * kBlockFloats, *transposed = diagonal + kBlockFloats,
        *source = transposed + kBlockFloats;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t k0 = k * kPanel;
    const int depth = width_at(k0, n);
    float* at_k = s + k0 * stride;
    if (!invert_diagonal(at_k + k0, stride, depth, diagonal)) return false;
    pack(diagonal, kPanel, depth, depth, depth, transposed);
    const Panel w_kk{transposed, depth};

    for (int64_t j = 0; j < blocks; ++j) {
      float* panel = panels + j * kBlockFloats;
      const int64_t j0 = j * kPanel;
      const int width = width_at(j0, n);
      if (j == k) {
        for (int r = 0; r < depth; ++r) std::memcpy(panel + r * width, diagonal + r * kPanel, sizeof(float) * width);
        continue;
      }
      if (j < k) {
        for (int r = 0; r < depth; ++r)
          std::memcpy(source + r * width, at_k + r * stride + j0, sizeof(float) * width);
      } else {
        pack(s + j0 * stride + k0, stride, width, width, depth, source);
      }
      for (int r = 0; r < depth; r += kRows)
        tile<Store::kSet>({w_kk.data + r, w_kk.step}, {source, width}, depth, {panel + r * width, width}, width);
      if (j < k)
        for (int r = 0; r < depth; ++r)
          std::memcpy(at_k + r * stride + j0, panel + r * width, sizeof(float) * width);
    }

    for (int64_t i = k + 1; i < blocks; ++i) {
      const int64_t i0 = i * kPanel;
      const int rows = width_at(i0, n);
      const float* c_ik = panels + i * kBlockFloats;
      for (int64_t j = 0; j <= i; ++j) {
        const int64_t j0 = j * kPanel;
        const int width = width_at(j0, n);
        const Panel b{panels + j * kBlockFloats, width};
        for (int r = 0; r < rows; r += kRows) {
          const Out out{s + (i0 + r) * stride + j0, stride};
          if (j == k) {
            tile<Store::kNegate>({c_ik + r, rows}, b, depth, out, width);
          } else {
            tile<Store::kSubtract>({c_ik + r, rows}, b, depth, out, j == i ? width_of_triangle(r, 0, width) : width);
          }
        }
      }
    }
  }
  return true;
}

EFFKERN_BF16 void add_gram_of_triangle(const float* w, int64_t n, int64_t stride, float weight, float* x,
                                       int64_t x_stride) {
  for (int64_t k = 0; k < n; k += kDepth) {
    const int64_t last = std::min(k + kDepth, n);
    // Rows of W above a block of columns are zero, or memory that is not W.
    for (int64_t j0 = 0; j0 < last; j0 += kPanel)
      for (int64_t i0 = j0; i0 < last; i0 += kRows) {
        const int64_t first = std::max(k, i0 / kPanel * kPanel);
        tile<Store::kAddScaled>({w + first * stride + i0, stride}, {w + first * stride + j0, stride}, last - first,
                                {x + i0 * x_stride + j0, x_stride, weight},
                                width_of_triangle(i0, j0, width_at(j0, n)));
      }
  }
}

EFFKERN_BF16 void add_gram_of_rows(const float* p, int64_t depth, int64_t n, int64_t stride, float weight, float* x,
                                   int64_t x_stride) {
  for (int64_t k = 0; k < depth; k += kDepth)
    for (int64_t j0 = 0; j0 < n; j0 += kPanel)
      for (int64_t i0 = j0; i0 < n; i0 += kRows)
        tile<Store::kAddScaled>({p + k * stride + i0, stride}, {p + k * stride + j0, stride},
                                std::min(kDepth, depth - k), {x + i0 * x_stride + j0, x_stride, weight},
                                width_of_triangle(i0, j0, width_at(j0, n)));
}

}  // namespace effkern::tiles
#endif
