// effkern::bf16_mm_nt_, effkern::bf16_add_tn_: bfloat16 products with float32 results, and which kernel computes them.
// effkern::f32_mm_nt_: the first of them from float32.
#include "cpu/gemm_bf16.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>

#include "cpu/gemm_amx.h"

namespace effkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In the order of gemm_schema.KERNELS, the fastest first.
enum Kernel : int64_t { kAmx, kAvx512, kNone };

bool runs(int64_t kernel) {
#if defined(EFFKERN_HAS_BF16)
  // Either needs AVX-512 to pack its operands.
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return kernel == kNone;
#if defined(EFFKERN_HAS_AMX)
  if (kernel == kAmx) return amx::available();
#endif
  return kernel == kAvx512 || kernel == kNone;
#else
  return kernel == kNone;
#endif
}

std::atomic<int64_t>& chosen() {
  static std::atomic<int64_t> kernel{runs(kAmx) ? kAmx : runs(kAvx512) ? kAvx512 : kNone};
  return kernel;
}

int64_t bf16_gemm_kernel() { return chosen(); }

void bf16_gemm_choose(int64_t kernel) {
  STD_TORCH_CHECK(kernel >= kAmx && kernel < kNone && runs(kernel), "bf16_gemm_choose: this CPU cannot run the kernel");
  chosen() = kernel;
}

bool is_matrix(const Tensor& x, ScalarType type, int64_t rows, int64_t columns) {
  return x.scalar_type() == type && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns &&
         (columns <= 1 || x.stride(1) == 1);
}

#if defined(EFFKERN_HAS_BF16)
using bf16::ceil_div;
using bf16::kColumns;
using bf16::kGrain;
using bf16::kLanes;
using bf16::kRows;
using bf16::Matrix;
using bf16::Panels;
using bf16::Prefetch;
using bf16::Product;

// Depth of a block, such that its panels stay in the second-level cache: one of b (192 KiB) in bf16_mm_nt_; one of b
// (96 KiB) and a tile of a (512 KiB) in bf16_add_tn_. A deeper product goes over the result once more per block.
constexpr int64_t kDepthNT = 2048;
constexpr int64_t kDepthTN = 1024;
// Panels of a that a thread packs at a time in bf16_add_tn_. 16 were no faster.
constexpr int64_t kTilePanels = 32;
Matrix matrix(const Tensor& x) { return {static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0)}; }

// Of the panel that starts at `column`.
int width(const Product& p, int64_t column) {
  return static_cast<int>(std::min<int64_t>(kColumns, p.columns - column));
}

bf16::Block block(const Product& p, int64_t row, int64_t column, bool first_depth) {
  return {p.out + row * p.out_stride + column, p.out_stride, static_cast<int>(std::min<int64_t>(kRows, p.rows - row)),
          width(p, column), p.add || !first_depth};
}

int vectors(int width) { return (width + kLanes - 1) / kLanes; }

// a [rows, depth], b [columns, depth]. All of a is packed at first; each thread walks over b a panel at a time, and
// fetches the next meanwhile: 5% at 256 rows, 20% at 32.
template <bf16::Type kType>
void mm_nt(const Product& p) {
  const int64_t pairs = ceil_div(p.depth, 2), strips = ceil_div(p.rows, kRows);
  const Panels a(strips * kRows * pairs);
  for (int64_t i = 0; i < p.rows; i += kRows)
    bf16::pack_rows(p.a.at(i, 0), static_cast<int>(std::min<int64_t>(kRows, p.rows - i)), p.depth, a.get() + i * pairs);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.rows * kColumns * p.depth));
  torch::stable::parallel_for(0, ceil_div(p.columns, kColumns), grain, [&](int64_t begin, int64_t end) {
    const Panels b(kColumns * ceil_div(std::min(kDepthNT, p.depth), 2));
    for (int64_t column = begin * kColumns; column < std::min(end * kColumns, p.columns); column += kColumns) {
      const int wide = width(p, column);
      int64_t k = 0;
      // Once even without depth: the result is then zero.
      do {
        const int64_t depth = std::min(kDepthNT, p.depth - k), next = column + wide;
        bf16::pack_wide(p.b.at(column, k), wide, vectors(wide), depth, b.get());
        Prefetch prefetch(p.b.at(next, k), std::min<int64_t>(kColumns, p.columns - next), depth, strips);
        for (int64_t row = 0; row < p.rows; row += kRows) {
          prefetch.share();
          bf16::multiply<kType>(a.get() + row * pairs + k / 2 * kRows, b.get(), ceil_div(depth, 2),
                         block(p, row, column, k == 0));
        }
        k += kDepthNT;
      } while (k < p.depth);
    }
  });
}

// a [depth, rows], b [depth, columns]. All of b is packed at first; each thread walks over a some panels at a time.
void mm_tn(const Product& p) {
  const int64_t pairs = ceil_div(p.depth, 2);
  const Panels b(ceil_div(p.columns, kLanes) * kLanes * pairs);
  for (int64_t j = 0; j < p.columns; j += kColumns)
    bf16::pack_columns_wide(p.b.at(0, j), width(p, j), vectors(width(p, j)), p.depth,
                            b.get() + j * pairs);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.columns * kRows * p.depth));
  torch::stable::parallel_for(0, ceil_div(p.rows, kRows), grain, [&](int64_t begin, int64_t end) {
    const Panels a(kTilePanels * kRows * ceil_div(std::min(kDepthTN, p.depth), 2));
    for (int64_t tile = begin; tile < end; tile += kTilePanels) {
      const int64_t first = tile * kRows, last = std::min({(tile + kTilePanels) * kRows, end * kRows, p.rows});
      int64_t k = 0;
      do {
        const int64_t depth = std::min(kDepthTN, p.depth - k), panel_size = ceil_div(depth, 2) * kRows;
        bf16::pack_columns(p.a.at(k, first), last - first, depth, panel_size, a.get());
        for (int64_t j = 0; j < p.columns; j += kColumns)
          for (int64_t row = first; row < last; row += kRows)
            bf16::multiply<bf16::Type::kBFloat16Pair>(a.get() + (row - first) / kRows * panel_size,
                           b.get() + j * pairs + k / 2 * vectors(width(p, j)) * kLanes, ceil_div(depth, 2),
                           block(p, row, j, k == 0));
        k += kDepthTN;
      } while (k < p.depth);
    }
  });
}
#endif

void bf16_mm_nt(Tensor out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(chosen() != kNone, "bf16_mm_nt_: this CPU has no AVX512-BF16");
  STD_TORCH_CHECK(a.dim() == 2 && is_matrix(a, ScalarType::BFloat16, a.size(0), a.size(1)) && b.dim() == 2 &&
                      is_matrix(b, ScalarType::BFloat16, b.size(0), a.size(1)),
                  "bf16_mm_nt_: a [C, D] and b [V, D] must be bfloat16 with stride 1 along D");
  STD_TORCH_CHECK(is_matrix(out, ScalarType::Float, a.size(0), b.size(0)),
                  "bf16_mm_nt_: out must be float32 [C, V] with stride 1 along V");
#if defined(EFFKERN_HAS_BF16)
  if (out.numel() == 0) return;
  const Product p{matrix(a), matrix(b), a.size(0), b.size(0), a.size(1), static_cast<float*>(out.mutable_data_ptr()),
                  out.stride(0), false};
#if defined(EFFKERN_HAS_AMX)
  if (chosen() == kAmx) return amx::mm_nt(p);
#endif
  mm_nt<bf16::Type::kBFloat16Pair>(p);
#endif
}

void f32_mm_nt(Tensor out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(runs(kAvx512), "f32_mm_nt_: this CPU has no AVX512-BF16");
  STD_TORCH_CHECK(a.dim() == 2 && is_matrix(a, ScalarType::Float, a.size(0), a.size(1)) && b.dim() == 2 &&
                      is_matrix(b, ScalarType::Float, b.size(0), a.size(1)),
                  "f32_mm_nt_: a [C, D] and b [V, D] must be float32 with stride 1 along D");
  STD_TORCH_CHECK(is_matrix(out, ScalarType::Float, a.size(0), b.size(0)),
                  "f32_mm_nt_: out must be float32 [C, V] with stride 1 along V");
#if defined(EFFKERN_HAS_BF16)
  if (out.numel() == 0) return;
  const auto halves = [](const Tensor& x) { return Matrix{static_cast<const uint16_t*>(x.const_data_ptr()), 2 * x.stride(0)}; };
  mm_nt<bf16::Type::kFloat>({halves(a), halves(b), a.size(0), b.size(0), 2 * a.size(1),
                             static_cast<float*>(out.mutable_data_ptr()), out.stride(0), false});
#endif
}

void bf16_add_tn(Tensor total, const Tensor& g, const Tensor& h, [[maybe_unused]] bool first) {
  STD_TORCH_CHECK(chosen() != kNone, "bf16_add_tn_: this CPU has no AVX512-BF16");
  STD_TORCH_CHECK(g.dim() == 2 && is_matrix(g, ScalarType::BFloat16, g.size(0), g.size(1)) && h.dim() == 2 &&
                      is_matrix(h, ScalarType::BFloat16, g.size(0), h.size(1)),
                  "bf16_add_tn_: g [C, V] and h [C, D] must be bfloat16 with stride 1 along V and D");
  STD_TORCH_CHECK(is_matrix(total, ScalarType::Float, g.size(1), h.size(1)),
                  "bf16_add_tn_: total must be float32 [V, D] with stride 1 along D");
#if defined(EFFKERN_HAS_BF16)
  if (total.numel() == 0 || (g.size(0) == 0 && !first)) return;
  const Product p{matrix(g), matrix(h), g.size(1), h.size(1), g.size(0), static_cast<float*>(total.mutable_data_ptr()),
                  total.stride(0), !first};
#if defined(EFFKERN_HAS_AMX)
  if (chosen() == kAmx) return amx::mm_tn(p);
#endif
  mm_tn(p);
#endif
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("bf16_mm_nt_", TORCH_BOX(&effkern::bf16_mm_nt));
  m.impl("f32_mm_nt_", TORCH_BOX(&effkern::f32_mm_nt));
  m.impl("bf16_add_tn_", TORCH_BOX(&effkern::bf16_add_tn));
}
STABLE_TORCH_LIBRARY_IMPL(effkern, CompositeExplicitAutograd, m) {
  m.impl("bf16_gemm_kernel", TORCH_BOX(&effkern::bf16_gemm_kernel));
  m.impl("bf16_gemm_choose", TORCH_BOX(&effkern::bf16_gemm_choose));
}
