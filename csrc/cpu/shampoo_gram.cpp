// effkern::shampoo_gram_ema_ on the CPU: L <- decay L + weight G G^T, one whole matrix per thread.
//
// The Gram matrix goes to a scratch matrix first, as a block that is not finite must leave L as it is. One triangle is
// computed; G is packed once, and its panels are either operand.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/clones.h"
#include "cpu/lapack_parallel.h"
#include "cpu/shampoo_blocks.h"
#include "cpu/shampoo_tiles.h"

namespace effkern::shampoo {
namespace {

// Rows of `lines` are what the Gram matrix is made of: row i with row j.
template <typename W>
class Gram {
 public:
  Gram(int64_t p, int64_t depth)
      : p_(p),
        side_(side_for_tiles(p)),
        // All panels stay in the second-level cache. Shorter ones, for the first, were slower.
        step_(std::min<int64_t>(depth, std::clamp<int64_t>((1 << 18) / std::max<int64_t>(1, side_), 64, 512))),
        panels_((side_ + 48) * step_),
        rows_(48 * std::max(step_, side_)),
        out_(side_ * side_) {}

  const W* operator()(const Block& lines) {
    const int64_t depth = lines.columns;
#if defined(EFFKERN_HAS_BF16)
    if constexpr (sizeof(W) == sizeof(float)) {
      if (tiles()) {
        for (int64_t k = 0; k < depth; k += step_) add(lines, k, std::min(step_, depth - k), k == 0);
        if (depth == 0) std::fill_n(out_.get(), side_ * side_, W(0));
        return out_.get();
      }
    }
#endif
    // Panels [depth][p], of which the library makes the sum.
    std::fill_n(out_.get(), side_ * side_, W(0));
    for (int64_t k = 0; k < depth; k += step_) {
      const int64_t count = std::min(step_, depth - k);
      for (int64_t d = 0; d < count; ++d) load_row(lines.transposed(), k + d, 0, p_, panels_.get() + d * p_);
      for (int64_t j0 = 0; j0 < p_; j0 += 96)
        lapack::gemm('N', 'T', static_cast<int>(std::min<int64_t>(96, p_ - j0)), static_cast<int>(p_ - j0),
                     static_cast<int>(count), W(1), panels_.get() + j0, static_cast<int>(p_), panels_.get() + j0,
                     static_cast<int>(p_), W(1), out_.get() + j0 * side_ + j0, static_cast<int>(side_));
    }
    return out_.get();
  }
  int64_t stride() const { return side_; }

 private:
#if defined(EFFKERN_HAS_BF16)
  EFFKERN_BF16 void add(const Block& lines, int64_t k, int64_t depth, bool first) {
    for (int64_t i0 = 0; i0 < side_; i0 += tiles::kPanel) {
      const int width = static_cast<int>(std::min<int64_t>(tiles::kPanel, side_ - i0));
      pack_lines(lines, i0, width, k, depth, panels_.get() + i0 * step_);
    }
    for (int64_t j0 = 0; j0 < side_; j0 += tiles::kPanel) {
      const int width = static_cast<int>(std::min<int64_t>(tiles::kPanel, side_ - j0));
      const tiles::Panel b{panels_.get() + j0 * step_, width};
      for (int64_t i0 = j0; i0 < side_; i0 += tiles::kRows) {
        const int64_t block = i0 / tiles::kPanel * tiles::kPanel;
        const int64_t step = std::min<int64_t>(tiles::kPanel, side_ - block);
        const tiles::Panel a{panels_.get() + block * step_ + (i0 - block), step};
        const tiles::Out out{out_.get() + i0 * side_ + j0, side_};
        const int needed = tiles::width_of_triangle(i0, j0, width);
        if (first) {
          tiles::tile<tiles::Store::kSet>(a, b, depth, out, needed);
        } else {
          tiles::tile<tiles::Store::kAddScaled>(a, b, depth, out, needed);
        }
      }
    }
  }

  // Panel [depth][width] of the lines i0 ..., zero beyond the last.
  EFFKERN_BF16 void pack_lines(const Block& lines, int64_t i0, int width, int64_t k, int64_t depth, float* panel) {
    const int count = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(width, p_ - i0)));
    if (lines.column_stride != 1 && lines.row_stride == 1) {
      for (int64_t d = 0; d < depth; ++d) {
        load_row(lines.transposed(), k + d, i0, count, panel + d * width);
        std::fill_n(panel + d * width + count, width - count, 0.0f);
      }
      return;
    }
    const float* source = static_cast<const float*>(lines.data) + i0 * lines.row_stride + k;
    int64_t stride = lines.row_stride;
    if (lines.column_stride != 1 || lines.type != ScalarType::Float) {
      for (int i = 0; i < count; ++i) load_row(lines, i0 + i, k, depth, rows_.get() + i * step_);
      source = rows_.get();
      stride = step_;
    }
    tiles::pack(source, stride, count, width, depth, panel);
  }
#endif

  int64_t p_, side_, step_;
  Scratch<W> panels_, rows_, out_;
};

// Row i of both triangles: the new lower part, and its mirror image from the lower parts of later rows.
template <typename W>
void update(W* factor, const W* gram, int64_t p, int64_t stride, W decay, W weight) {
  for (int64_t i = 0; i < p; ++i) combine(weight, gram + i * stride, decay, factor + i * p, i + 1);
  mirror(factor, p, p);
}

template <typename W>
void run(const Tensor& factor, const std::vector<Block>& grads, bool left, double decay, double weight,
         int32_t* failures) {
  const int64_t p = factor.size(1), batch = factor.size(0);
  const int64_t depth = left ? grads[0].columns : grads[0].rows;
  W* factors = static_cast<W*>(factor.mutable_data_ptr());
  const auto task = [&](int64_t begin, int64_t end) {
    Gram<W> gram(p, depth);
    for (int64_t b = begin; b < end; ++b) {
      const W* product = gram(left ? grads[b] : grads[b].transposed());
      bool finite = true;
      for (int64_t i = 0; i < p; ++i) finite = finite && std::isfinite(product[i * gram.stride() + i]);
      if (failures != nullptr) failures[b] = finite ? 0 : failures[b] + 1;
      if (finite) update(factors + b * p * p, product, p, gram.stride(), static_cast<W>(decay), static_cast<W>(weight));
    }
  };
  lapack::parallel_for(batch, task);
}

void gram_ema(Tensor factor, std::vector<Tensor> grads, bool left, double decay, double weight,
              std::optional<Tensor> failures) {
  STD_TORCH_CHECK(lapack::available(), "shampoo_gram_ema_: this libtorch has no LAPACK");
  const std::vector<Block> blocks = blocks_of(grads, "grads");
  const bool wide = factor.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK((wide || factor.scalar_type() == ScalarType::Float) && factor.dim() == 3 &&
                      factor.size(1) == factor.size(2) && factor.is_contiguous() &&
                      factor.size(0) == static_cast<int64_t>(grads.size()),
                  "shampoo_gram_ema_: factor must be contiguous float32 or float64 [B, p, p], one matrix per gradient");
  if (blocks.empty()) return;
  STD_TORCH_CHECK((left ? blocks[0].rows : blocks[0].columns) == factor.size(1),
                  "shampoo_gram_ema_: grads must have the factor's side");
  STD_TORCH_CHECK(!failures.has_value() || (failures->scalar_type() == ScalarType::Int && failures->is_contiguous() &&
                                            failures->numel() == factor.size(0)),
                  "shampoo_gram_ema_: failures must be int32 [B]");
  int32_t* counts = failures.has_value() ? static_cast<int32_t*>(failures->mutable_data_ptr()) : nullptr;
  if (wide) {
    run<double>(factor, blocks, left, decay, weight, counts);
  } else {
    run<float>(factor, blocks, left, decay, weight, counts);
  }
}

}  // namespace
}  // namespace effkern::shampoo

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("shampoo_gram_ema_", TORCH_BOX(&effkern::shampoo::gram_ema)); }
