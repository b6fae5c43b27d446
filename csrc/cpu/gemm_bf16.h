// Blocks of float32 out (+)= a b from bfloat16 operands by vdpbf16ps, for CPUs with AVX512-BF16.
//
// Operands packed along their length may be float32 just as well: 32 bits are then one number instead of two, a float32
// matrix is given as one of 16-bit halves, twice as deep, and only the instruction is another.
//
// vdpbf16ps adds two products to each of 16 float32 lanes, so the depth goes in pairs: an operand is packed into panels
// [pair][line], an element being the 32 bits of two neighbours along the depth, zero beyond its end. Lines of `a` are
// broadcast, lines of `b` fill the lanes. The instruction rounds to nearest even and takes and gives subnormal numbers
// as zero, whatever the thread's floating-point mode is: factors and partial sums below 1.2e-38 are lost.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__) && defined(__GNUC__) && __has_include(<avx512bf16intrin.h>)
#define EFFKERN_HAS_BF16
// GCC 12 takes its own "undefined" registers in there for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#define EFFKERN_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prfchw")))
#define EFFKERN_BF16_INLINE EFFKERN_BF16 inline __attribute__((always_inline))

namespace effkern::bf16 {

// 24 accumulators, 3 lines of b and a broadcast are 28 of 32 registers. On a Zen 4 core 8 x 3 reaches 0.92 of the
// instruction's rate, 6 x 4, 7 x 4 and 9 x 3 up to 0.91, 12 x 2 and 14 x 2 up to 0.88, and it wastes the least of a
// product that is 256 or 512 wide.
constexpr int kRows = 8;
constexpr int kVectors = 3;
constexpr int kLanes = 16;
constexpr int kColumns = kVectors * kLanes;

// Memory for panels: whole cache lines.
class Panels {
 public:
  explicit Panels(int64_t elements)
      : memory_(static_cast<uint32_t*>(::operator new(static_cast<size_t>(elements) * 4 + 64, std::align_val_t{64}))) {}
  uint32_t* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(uint32_t* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<uint32_t, Free> memory_;
};

// A bfloat16 matrix; `stride` between its rows.
struct Matrix {
  const uint16_t* data;
  int64_t stride;
  Matrix at(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

// out (+)= a b, [rows, columns], where `depth` is the length of the sums. Each operand lies as its function says.
struct Product {
  Matrix a, b;
  int64_t rows, columns, depth;
  float* out;
  int64_t out_stride;
  // Add to `out` instead of overwriting it.
  bool add;
};

// Products per task below which handing it out costs more than it saves, about 10 microseconds.
constexpr int64_t kGrain = 1 << 20;

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Fetches rows of a matrix into the second-level cache, in as many shares as are asked for.
class Prefetch {
 public:
  Prefetch(Matrix x, int64_t rows, int64_t depth, int64_t shares)
      : x_(x),
        lines_(ceil_div(depth, kLine)),
        end_(rows * lines_),
        share_(ceil_div(end_, std::max<int64_t>(1, shares))) {}
  void share() {
    for (const int64_t stop = std::min(next_ + share_, end_); next_ < stop; ++next_)
      __builtin_prefetch(x_.data + next_ / lines_ * x_.stride + next_ % lines_ * kLine, 0, 2);
  }

 private:
  // Elements of a cache line.
  static constexpr int64_t kLine = 32;
  Matrix x_;
  int64_t lines_, end_, share_, next_ = 0;
};

// kRows rows, packed along their length: panel[pair][row]. Only for an operand that is small beside the product.
inline void pack_rows(Matrix x, int rows, int64_t depth, uint32_t* panel) {
  for (int i = 0; i < kRows; ++i) {
    const uint16_t* row = x.data + (i < rows ? i * x.stride : 0);
    const int64_t whole = i < rows ? depth / 2 : 0;
    for (int64_t pair = 0; pair < whole; ++pair) std::memcpy(panel + pair * kRows + i, row + 2 * pair, 4);
    for (int64_t pair = whole; 2 * pair < depth; ++pair)
      panel[pair * kRows + i] = i < rows ? row[2 * pair] : 0;
  }
}

EFFKERN_BF16_INLINE void transpose(__m512i (&x)[kLanes]) {
  __m512i y[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kLanes; i += 8)
#pragma GCC unroll 4
    for (int j = i; j < i + 4; ++j) {
      y[j] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88);
      y[j + 4] = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
  }
}

// Up to kColumns rows, packed along their length: panel[pair][row], `vectors` * kLanes wide.
EFFKERN_BF16 inline void pack_wide(Matrix x, int rows, int vectors, int64_t depth, uint32_t* panel) {
  for (int64_t k = 0; k < depth; k += 2 * kLanes) {
    const int64_t left = depth - k;
    const __mmask32 inside = left >= 2 * kLanes ? 0xffffffffu : (1u << left) - 1;
    for (int j = 0; j < vectors; ++j) {
      __m512i block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int row = j * kLanes + i;
        block[i] = row < rows ? _mm512_maskz_loadu_epi16(inside, x.data + row * x.stride + k) : _mm512_setzero_si512();
      }
      transpose(block);
      uint32_t* out = panel + (k / 2 * vectors + j) * kLanes;
      const int pairs = static_cast<int>(left >= 2 * kLanes ? kLanes : (left + 1) / 2);
      for (int i = 0; i < pairs; ++i) _mm512_store_si512(out + i * vectors * kLanes, block[i]);
    }
  }
}

// Pairs of 16 columns of two rows; `odd` rows beyond the end are null.
EFFKERN_BF16_INLINE __m512i zip(const uint16_t* even, const uint16_t* odd, __mmask16 inside) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, even));
  if (odd == nullptr) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, odd)), 16));
}

EFFKERN_BF16_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffffu : count <= 0 ? 0 : (1u << count) - 1);
}

// Columns of `depth` rows: panel[pair][column], `vectors` * kLanes wide.
EFFKERN_BF16 inline void pack_columns_wide(Matrix x, int columns, int vectors, int64_t depth, uint32_t* panel) {
  for (int64_t k = 0; k < depth; k += 2)
    for (int j = 0; j < vectors; ++j) {
      const uint16_t* even = x.data + k * x.stride + j * kLanes;
      const uint16_t* odd = k + 1 < depth ? even + x.stride : nullptr;
      _mm512_store_si512(panel + (k / 2 * vectors + j) * kLanes, zip(even, odd, first_lanes(columns - j * kLanes)));
    }
}

// The same into panels of kRows columns, two of them at a time; `pairs` * kRows from one panel to the next.
EFFKERN_BF16 inline void pack_columns(Matrix x, int64_t columns, int64_t depth, int64_t panel_size, uint32_t* panel) {
  static_assert(2 * kRows == kLanes);
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const uint16_t* even = x.data + k * x.stride + j;
      const __m512i both = zip(even, k + 1 < depth ? even + x.stride : nullptr, first_lanes(columns - j));
      uint32_t* out = panel + j / kRows * panel_size + k / 2 * kRows;
      _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(both));
      if (j + kRows < columns)
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + panel_size), _mm512_extracti64x4_epi64(both, 1));
    }
}

// One block of the result in registers.
struct Block {
  float* out;
  int64_t stride;
  int rows;
  int columns;
  // Add to `out` instead of overwriting it.
  bool add;
};

// What the 32 bits of a panel's element are.
enum class Type { kBFloat16Pair, kFloat };

template <Type kType>
EFFKERN_BF16_INLINE __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
  if constexpr (kType == Type::kFloat) return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

template <Type kType, int kWidth>
EFFKERN_BF16_INLINE void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, const Block& block) {
  // What the block needs at its end comes while it is computed: 8% of a product that is 256 deep.
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    if (i < block.rows)
#pragma GCC unroll 3
      for (int j = 0; j < kWidth; ++j) __builtin_prefetch(block.out + i * block.stride + j * kLanes, 1);

  __m512 sum[kRows][kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kWidth; ++j) sum[i][j] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512i line[kWidth];
#pragma GCC unroll 3
    for (int j = 0; j < kWidth; ++j) line[j] = _mm512_load_si512(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512i factor = _mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 3
      for (int j = 0; j < kWidth; ++j) sum[i][j] = multiply_add<kType>(sum[i][j], factor, line[j]);
    }
    a += kRows;
    b += kWidth * kLanes;
  }

  const __mmask16 inside = first_lanes(block.columns - (kWidth - 1) * kLanes);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    if (i < block.rows)
#pragma GCC unroll 3
      for (int j = 0; j < kWidth; ++j) {
        float* out = block.out + i * block.stride + j * kLanes;
        if (j < kWidth - 1 || inside == 0xffff) {
          if (block.add) sum[i][j] = _mm512_add_ps(_mm512_loadu_ps(out), sum[i][j]);
          _mm512_storeu_ps(out, sum[i][j]);
        } else {
          if (block.add) sum[i][j] = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, out), sum[i][j]);
          _mm512_mask_storeu_ps(out, inside, sum[i][j]);
        }
      }
}

// Panels as wide as the block needs: `block.columns` in vectors.
template <Type kType>
EFFKERN_BF16 inline void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, const Block& block) {
  switch ((block.columns + kLanes - 1) / kLanes) {
    case 1:
      return multiply<kType, 1>(a, b, pairs, block);
    case 2:
      return multiply<kType, 2>(a, b, pairs, block);
    default:
      return multiply<kType, 3>(a, b, pairs, block);
  }
}

}  // namespace effkern::bf16
#endif
