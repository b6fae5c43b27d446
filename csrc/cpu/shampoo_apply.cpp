// effkern::shampoo_apply_ on the CPU: one block per thread, from its gradient to its new weights.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <optional>

#include "cpu/lapack_parallel.h"
#include "cpu/shampoo_blocks.h"

namespace effkern::shampoo {
namespace {

struct Options {
  double momentum_decay, momentum_weight;
  bool nesterov;
  double lr, weight_decay, norm;
  const float* norms;
};

template <typename W>
class Update {
 public:
  Update(int64_t m, int64_t n, const W* left, const W* right, const Options& options)
      : options_(options), m_(m), n_(n), left_(left), right_(right), d_(m * n), u_(m * n), row_(n) {}

  // The norm of U; NaN where the block was left as it is.
  float operator()(const Block& weight, const Block* momentum, const Block& grad, int64_t b) {
    constexpr float kLeft = std::numeric_limits<float>::quiet_NaN();
    const W* u = nullptr;
    double length = 0.0;
    if (momentum != nullptr && in_place(*momentum)) {
      // The product reads the momentum where it lies; d_ keeps what it was.
      const double square = advance(*momentum, grad);
      if (std::isfinite(square)) {
        u = multiply(b, static_cast<const W*>(momentum->data), momentum->row_stride);
        length = norm_of(u);
      }
      if (u == nullptr || !std::isfinite(static_cast<float>(length))) {
        for (int64_t i = 0; i < m_; ++i) store_row(*momentum, i, d_.get() + i * n_);
        return kLeft;
      }
    } else {
      double square = 0.0;
      for (int64_t i = 0; i < m_; ++i) {
        W* d = d_.get() + i * n_;
        load_row(grad, i, 0, n_, d);
        square += sum_of_squares(d, n_);
        if (momentum != nullptr) direction(*momentum, i, d);
      }
      if (!std::isfinite(square)) return kLeft;
      u = multiply(b, d_.get(), n_);
      length = norm_of(u);
      if (!std::isfinite(static_cast<float>(length))) return kLeft;
      if (momentum != nullptr) keep(*momentum, grad, u);
    }
    double step = 1.0;
    if (options_.norms != nullptr || options_.norm > 0.0)
      step = length > 0.0 ? (options_.norms != nullptr ? options_.norms[b] : options_.norm) / length : 0.0;
    const W rate = static_cast<W>(-options_.lr * step), rest = static_cast<W>(1.0 - options_.lr * options_.weight_decay);
    for (int64_t i = 0; i < m_; ++i) {
      W* w = packed_row<W>(weight, i);
      if (w != nullptr) {
        combine(rate, u + i * n_, rest, w, n_);
        continue;
      }
      load_row(weight, i, 0, n_, row_.get());
      combine(rate, u + i * n_, rest, row_.get(), n_);
      store_row(weight, i, row_.get());
    }
    return static_cast<float>(length);
  }

 private:
  bool in_place(const Block& momentum) const {
    return !options_.nesterov && (left_ == nullptr) != (right_ == nullptr) && packed_row<W>(momentum, 0) != nullptr &&
           momentum.row_stride >= n_;
  }

  double advance(const Block& momentum, const Block& grad) {
    double square = 0.0;
    for (int64_t i = 0; i < m_; ++i) {
      const W* g = packed_row<W>(grad, i);
      if (g == nullptr) {
        load_row(grad, i, 0, n_, row_.get());
        g = row_.get();
      }
      square += average(static_cast<W>(options_.momentum_decay), packed_row<W>(momentum, i),
                        static_cast<W>(options_.momentum_weight), g, d_.get() + i * n_, n_);
    }
    return square;
  }

  double norm_of(const W* u) const {
    double square = 0.0;
    for (int64_t i = 0; i < m_; ++i) square += sum_of_squares(u + i * n_, n_);
    return std::sqrt(square);
  }

  // Row i from G to the momentum, or a step beyond it. The momentum itself is written once the block is known to be
  // finite.
  void direction(const Block& momentum, int64_t i, W* d) {
    const W decay = static_cast<W>(options_.momentum_decay), weight = static_cast<W>(options_.momentum_weight);
    load_row(momentum, i, 0, n_, row_.get());
    if (options_.nesterov) {
      combine(weight, d, decay, row_.get(), n_);
      combine(decay, row_.get(), weight, d, n_);
    } else {
      combine(decay, row_.get(), weight, d, n_);
    }
  }

  void keep(const Block& momentum, const Block& grad, const W* u) {
    const W decay = static_cast<W>(options_.momentum_decay), weight = static_cast<W>(options_.momentum_weight);
    // D is there yet, unless U took its place.
    W* g = (u == d_.get() ? u_ : d_).get();
    const bool there = !options_.nesterov && (u != d_.get() || (left_ == nullptr && right_ == nullptr));
    for (int64_t i = 0; i < m_; ++i) {
      if (there) {
        store_row(momentum, i, d_.get() + i * n_);
        continue;
      }
      load_row(momentum, i, 0, n_, row_.get());
      load_row(grad, i, 0, n_, g);
      combine(weight, g, decay, row_.get(), n_);
      store_row(momentum, i, row_.get());
    }
  }

  // U = L D R, D with rows `stride` apart. Row by row, so that the library sees the transposes.
  const W* multiply(int64_t b, const W* from, int64_t stride) {
    const int m = static_cast<int>(m_), n = static_cast<int>(n_);
    W* to = u_.get();
    if (left_ != nullptr) {
      lapack::gemm('N', 'N', n, m, m, W(1), from, static_cast<int>(stride), left_ + b * m_ * m_, m, W(0), to, n);
      from = to;
      to = d_.get();
      stride = n_;
    }
    if (right_ != nullptr) {
      lapack::gemm('N', 'N', n, m, n, W(1), right_ + b * n_ * n_, n, from, static_cast<int>(stride), W(0), to, n);
      from = to;
    }
    return from;
  }

  const Options& options_;
  int64_t m_, n_;
  const W *left_, *right_;
  Scratch<W> d_, u_, row_;
};

template <typename W>
void run(const std::vector<Block>& weights, const std::vector<Block>& momenta, const std::vector<Block>& grads,
         const std::optional<Tensor>& left, const std::optional<Tensor>& right, const Options& options,
         int32_t* failures, float* norms) {
  const W* l = left.has_value() ? static_cast<const W*>(left->const_data_ptr()) : nullptr;
  const W* r = right.has_value() ? static_cast<const W*>(right->const_data_ptr()) : nullptr;
  lapack::parallel_for(static_cast<int64_t>(weights.size()), [&](int64_t begin, int64_t end) {
    Update<W> update(weights[0].rows, weights[0].columns, l, r, options);
    for (int64_t b = begin; b < end; ++b) {
      norms[b] = update(weights[b], momenta.empty() ? nullptr : &momenta[b], grads[b], b);
      if (failures != nullptr) failures[b] = std::isfinite(norms[b]) ? 0 : failures[b] + 1;
    }
  });
}

void check_root(const std::optional<Tensor>& root, ScalarType type, int64_t batch, int64_t side) {
  if (!root.has_value()) return;
  STD_TORCH_CHECK(root->scalar_type() == type && root->dim() == 3 && root->size(0) == batch && root->size(1) == side &&
                      root->size(2) == side && root->is_contiguous(),
                  "shampoo_apply_: roots must be contiguous [B, p, p], float32 (float64 for float64 weights)");
}

Tensor apply(std::vector<Tensor> weights, std::vector<Tensor> momenta, std::vector<Tensor> grads,
             std::optional<Tensor> left, std::optional<Tensor> right, double momentum_decay, double momentum_weight,
             bool nesterov, double lr, std::optional<Tensor> lr_tensor, double weight_decay, double norm,
             std::optional<Tensor> norms, std::optional<Tensor> failures) {
  STD_TORCH_CHECK(lapack::available(), "shampoo_apply_: this libtorch has no BLAS");
  STD_TORCH_CHECK(!weights.empty() && grads.size() == weights.size() &&
                      (momenta.empty() || momenta.size() == weights.size()),
                  "shampoo_apply_: weights, grads and momenta must hold as many blocks, one at least");
  const std::vector<Block> w = blocks_of(weights, "weights"), m = blocks_of(momenta, "momenta"),
                           g = blocks_of(grads, "grads");
  for (const std::vector<Block>* other : {&m, &g})
    STD_TORCH_CHECK(other->empty() || (other->front().rows == w[0].rows && other->front().columns == w[0].columns),
                    "shampoo_apply_: grads and momenta must have the shape of weights");
  const int64_t batch = static_cast<int64_t>(w.size());
  const bool wide = w[0].type == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  check_root(left, type, batch, w[0].rows);
  check_root(right, type, batch, w[0].columns);
  STD_TORCH_CHECK(!norms.has_value() || (norms->scalar_type() == ScalarType::Float && norms->numel() == batch &&
                                         norms->is_contiguous()),
                  "shampoo_apply_: norms must be float32 [B]");
  STD_TORCH_CHECK(!failures.has_value() || (failures->scalar_type() == ScalarType::Int && failures->numel() == batch &&
                                            failures->is_contiguous()),
                  "shampoo_apply_: failures must be int32 [B]");
  STD_TORCH_CHECK(!lr_tensor.has_value() || (lr_tensor->scalar_type() == ScalarType::Double && lr_tensor->numel() == 1),
                  "shampoo_apply_: lr must be one float64 number");
  if (lr_tensor.has_value()) lr = *static_cast<const double*>(lr_tensor->const_data_ptr());
  const Options options{momentum_decay, momentum_weight, nesterov, lr, weight_decay, norm,
                        norms.has_value() ? static_cast<const float*>(norms->const_data_ptr()) : nullptr};
  Tensor found = torch::stable::new_empty(weights[0], {batch}, ScalarType::Float);
  float* lengths = static_cast<float*>(found.mutable_data_ptr());
  int32_t* counts = failures.has_value() ? static_cast<int32_t*>(failures->mutable_data_ptr()) : nullptr;
  if (wide) {
    run<double>(w, m, g, left, right, options, counts, lengths);
  } else {
    run<float>(w, m, g, left, right, options, counts, lengths);
  }
  return found;
}

}  // namespace
}  // namespace effkern::shampoo

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("shampoo_apply_", TORCH_BOX(&effkern::shampoo::apply)); }
