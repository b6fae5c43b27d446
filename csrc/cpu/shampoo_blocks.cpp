#include "cpu/shampoo_blocks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/lapack.h"
#include "cpu/rows.h"
#include "cpu/shampoo_inverse.h"

namespace effkern::shampoo {
namespace {

EFFKERN_INLINE float widen_any(float x) { return x; }
EFFKERN_INLINE double widen_any(double x) { return x; }
EFFKERN_INLINE float widen_any(BFloat16 x) { return widen(x); }
EFFKERN_INLINE float widen_any(Float16 x) { return widen(x); }

// To nearest even, as the hardware rounds; beyond 65504 + 16 to infinity.
EFFKERN_INLINE uint16_t to_float16(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u;
  const float size = bits_to_float(bits & 0x7fffffffu);
  if (size != size) return static_cast<uint16_t>(sign | 0x7e00u);
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (size < 0x1p-14f) {
    // In units of 2^-24, rounded by the addition.
    const float shifted = size + 0x1p-1f;
    return static_cast<uint16_t>(sign | (static_cast<uint32_t>(float_to_bits(shifted)) - 0x3f000000u));
  }
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (uint32_t{112} << 23)) >> 13));
}

template <typename W>
EFFKERN_INLINE void round_to(float& to, W value) {
  to = static_cast<float>(value);
}
template <typename W>
EFFKERN_INLINE void round_to(double& to, W value) {
  to = static_cast<double>(value);
}
template <typename W>
EFFKERN_INLINE void round_to(BFloat16& to, W value) {
  to.bits = to_bfloat16(static_cast<float>(value));
}
template <typename W>
EFFKERN_INLINE void round_to(Float16& to, W value) {
  to.bits = to_float16(static_cast<float>(value));
}

template <typename T, typename W>
EFFKERN_INLINE void read(const T* x, int64_t stride, int64_t n, W* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<W>(widen_any(x[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<W>(widen_any(x[i * stride]));
  }
}

template <typename T, typename W>
EFFKERN_INLINE void write(T* x, int64_t stride, int64_t n, const W* values) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) round_to(x[i], values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) round_to(x[i * stride], values[i]);
  }
}

// GCC clones functions, not templates.
#define EFFKERN_ROWS(T, W)                                                                        \
  EFFKERN_CLONES void read_row(const T* x, int64_t stride, int64_t n, W* out) { read(x, stride, n, out); } \
  EFFKERN_CLONES void write_row(T* x, int64_t stride, int64_t n, const W* values) { write(x, stride, n, values); }
EFFKERN_ROWS(float, float)
EFFKERN_ROWS(double, float)
EFFKERN_ROWS(BFloat16, float)
EFFKERN_ROWS(Float16, float)
EFFKERN_ROWS(float, double)
EFFKERN_ROWS(double, double)
EFFKERN_ROWS(BFloat16, double)
EFFKERN_ROWS(Float16, double)
#undef EFFKERN_ROWS

template <class F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(BFloat16());
    case ScalarType::Half:
      return f(Float16());
    default:
      return f(float());
  }
}

std::atomic<bool>& tiles_wanted() {
#if defined(EFFKERN_HAS_BF16)
  static std::atomic<bool> wanted{tiles::supported()};
#else
  static std::atomic<bool> wanted{false};
#endif
  return wanted;
}

// Sets it, for tests and timing; returns what it was.
bool choose_tiles(bool wanted) {
#if defined(EFFKERN_HAS_BF16)
  STD_TORCH_CHECK(!wanted || tiles::supported(), "shampoo_tiles: this CPU has no AVX-512 with bfloat16");
#else
  STD_TORCH_CHECK(!wanted, "shampoo_tiles: this build has no tiles");
#endif
  return tiles_wanted().exchange(wanted);
}

}  // namespace

std::vector<Block> blocks_of(const std::vector<Tensor>& tensors, const char* name) {
  std::vector<Block> found;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.dim() == 2 && is_floating(t.scalar_type()), "shampoo: ", name, " must be floating [m, n] matrices");
    found.push_back({t.mutable_data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1), t.scalar_type()});
    STD_TORCH_CHECK(found.back().rows == found[0].rows && found.back().columns == found[0].columns &&
                        found.back().type == found[0].type,
                    "shampoo: ", name, " must have one shape and dtype");
  }
  return found;
}

template <typename W>
void load_row(const Block& x, int64_t r, int64_t first, int64_t count, W* out) {
  with_type(x.type, [&](auto kind) {
    using T = decltype(kind);
    read_row(static_cast<const T*>(x.data) + r * x.row_stride + first * x.column_stride, x.column_stride, count, out);
  });
}

template <typename W>
void load(const Block& x, W* out, int64_t stride) {
  for (int64_t r = 0; r < x.rows; ++r) load_row(x, r, 0, x.columns, out + r * stride);
}

template <typename W>
void store_row(const Block& x, int64_t r, const W* values) {
  with_type(x.type, [&](auto kind) {
    using T = decltype(kind);
    write_row(static_cast<T*>(x.data) + r * x.row_stride, x.column_stride, x.columns, values);
  });
}

#define EFFKERN_WIDE(W)                                                                   \
  template void load_row(const Block& x, int64_t r, int64_t first, int64_t count, W* out); \
  template void load(const Block& x, W* out, int64_t stride);                              \
  template void store_row(const Block& x, int64_t r, const W* values);                     \
  template void mirror(W* x, int64_t n, int64_t stride);
template <typename W>
void mirror(W* x, int64_t n, int64_t stride) {
#if defined(EFFKERN_HAS_BF16)
  if constexpr (sizeof(W) == sizeof(float)) {
    if (tiles() && n % tiles::kLanes == 0) return tiles::mirror(x, n, stride);
  }
#endif
  // In squares, so that the lines written stay in the first cache.
  constexpr int64_t kSquare = 16;
  for (int64_t i0 = 0; i0 < n; i0 += kSquare)
    for (int64_t j0 = 0; j0 <= i0; j0 += kSquare)
      for (int64_t i = i0; i < std::min(i0 + kSquare, n); ++i)
        for (int64_t j = j0; j < std::min(j0 + kSquare, i); ++j) x[j * stride + i] = x[i * stride + j];
}
EFFKERN_WIDE(float)
EFFKERN_WIDE(double)
#undef EFFKERN_WIDE

EFFKERN_CLONES double sum_of_squares(const float* x, int64_t n) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    float lanes[kLanes] = {};
    for_lanes(begin, std::min(begin + kBlock, n), [&](int l, int64_t i) EFFKERN_LAMBDA { lanes[l] += x[i] * x[i]; });
    total += sum_lanes(lanes);
  }
  return total;
}

double sum_of_squares(const double* x, int64_t n) { return dot(x, x, n); }

EFFKERN_CLONES double average(float a, float* m, float b, const float* g, float* before, int64_t n) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    float lanes[kLanes] = {};
    for_lanes(begin, std::min(begin + kBlock, n), [&](int l, int64_t i) EFFKERN_LAMBDA {
      const float x = g[i], y = m[i];
      before[i] = y;
      m[i] = a * y + b * x;
      lanes[l] += x * x;
    });
    total += sum_lanes(lanes);
  }
  return total;
}

double average(double a, double* m, double b, const double* g, double* before, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    total += g[i] * g[i];
    before[i] = m[i];
    m[i] = a * m[i] + b * g[i];
  }
  return total;
}

EFFKERN_CLONES void combine(float a, const float* x, float b, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = a * x[i] + b * y[i];
}

void combine(double a, const double* x, double b, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = a * x[i] + b * y[i];
}

EFFKERN_CLONES bool scan(const float* x, int64_t n, bool* any) {
  uint32_t seen = 0, largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t size = static_cast<uint32_t>(float_to_bits(x[i])) & 0x7fffffffu;
    seen |= size;
    largest = std::max(largest, size);
  }
  *any = *any || seen != 0;
  return largest < 0x7f800000u;
}

bool scan(const double* x, int64_t n, bool* any) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i]);
    *any = *any || x[i] != 0.0;
  }
  return finite;
}

EFFKERN_CLONES float dot(const float* x, const float* y, int64_t n) {
  float lanes[kLanes] = {};
  for_lanes(0, n, [&](int l, int64_t i) EFFKERN_LAMBDA { lanes[l] += x[i] * y[i]; });
  return sum_lanes(lanes);
}

double dot(const double* x, const double* y, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += x[i] * y[i];
  return total;
}

bool tiles() { return tiles_wanted(); }

int64_t side_for_tiles(int64_t n) {
#if defined(EFFKERN_HAS_BF16)
  return tiles::padded(n);
#else
  return n;
#endif
}

namespace {

// By the library: blocks of columns, each from its diagonal on.
template <typename W>
void gram_by_library(const W* p, int64_t depth, int64_t n, int64_t stride, W* out, int64_t out_stride) {
  constexpr int64_t kColumns = 96;
  for (int64_t j0 = 0; j0 < n; j0 += kColumns) {
    const int64_t columns = std::min(kColumns, n - j0);
    // Row by row: out[j0:, j0:j0+columns] = p[:, j0:]^T p[:, j0:j0+columns].
    lapack::gemm('N', 'T', static_cast<int>(columns), static_cast<int>(n - j0), static_cast<int>(depth), W(1), p + j0,
                 static_cast<int>(stride), p + j0, static_cast<int>(stride), W(0), out + j0 * out_stride + j0,
                 static_cast<int>(out_stride));
  }
}

}  // namespace

template <>
void gram_of_rows(const float* p, int64_t depth, int64_t n, int64_t stride, float* out, int64_t out_stride) {
#if defined(EFFKERN_HAS_BF16)
  if (tiles()) {
    const int64_t side = tiles::padded(n);
    std::fill_n(out, (side - 1) * out_stride + side, 0.0f);
    tiles::add_gram_of_rows(p, depth, side, stride, 1.0f, out, out_stride);
    return;
  }
#endif
  gram_by_library(p, depth, n, stride, out, out_stride);
}

template <>
void gram_of_rows(const double* p, int64_t depth, int64_t n, int64_t stride, double* out, int64_t out_stride) {
  gram_by_library(p, depth, n, stride, out, out_stride);
}

}  // namespace effkern::shampoo

STABLE_TORCH_LIBRARY_IMPL(effkern, CompositeExplicitAutograd, m) {
  m.impl("shampoo_tiles", TORCH_BOX(&effkern::shampoo::choose_tiles));
  m.impl("shampoo_lapack", TORCH_BOX(&effkern::lapack::available));
}
