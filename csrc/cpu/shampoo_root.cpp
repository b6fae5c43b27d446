// effkern::shampoo_inverse_root_ on the CPU: one whole matrix per thread, LAPACK's eigenvectors or partial fractions.
//
// No value leaves the loop over matrices: what a matrix needs, fallback included, is decided where it is computed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "cpu/lapack_parallel.h"
#include "cpu/shampoo_blocks.h"
#include "cpu/shampoo_inverse.h"

namespace effkern::shampoo {
namespace {

// As in effkern/ops/shampoo/root.py and methods.py.
enum Status : int32_t { kComputed, kFellBack, kZero, kFailed };
enum Method : int64_t { kEigh, kRational };
constexpr int kLargestRoot = 8;
// Of the largest eigenvalue: below it the roundings of a float32 eigh, eps / ridge of the root and more, are seen.
constexpr double kLeastSingleRidge = 1e-5;

struct Options {
  int64_t method;
  double exponent, ridge, scale, pseudo_inverse;
  std::vector<double> poles, weights;
  double residual_bound;
};

// A fixed vector of +-1, as common.signs.
template <typename W>
void signs(W* v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) v[i] = ((static_cast<uint64_t>(i + 1) * 2654435761u) >> 16) & 1 ? W(1) : W(-1);
}

template <typename W>
void times(const W* a, int64_t n, const W* x, W* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = dot(a + i * n, x, n);
}

// The largest eigenvalue of the symmetric tridiagonal (alpha, beta), by bisection on the signs of its pivots.
double largest_of_tridiagonal(const double* alpha, const double* beta, int k) {
  double low = alpha[0], high = alpha[0];
  for (int i = 0; i < k; ++i) {
    const double radius = (i > 0 ? std::abs(beta[i - 1]) : 0.0) + (i + 1 < k ? std::abs(beta[i]) : 0.0);
    low = std::max(low, alpha[i]);
    high = std::max(high, alpha[i] + radius);
  }
  for (int step = 0; step < 60 && high - low > 1e-9 * high; ++step) {
    const double middle = 0.5 * (low + high);
    // All pivots of (T - middle I) negative: all eigenvalues are below.
    bool below = true;
    double pivot = alpha[0] - middle;
    below = pivot < 0.0;
    for (int i = 1; i < k && below; ++i) {
      pivot = alpha[i] - middle - beta[i - 1] * beta[i - 1] / pivot;
      below = pivot < 0.0;
    }
    (below ? high : low) = middle;
  }
  return high;
}

template <typename W>
class Root {
 public:
  explicit Root(int64_t n, const Options& options)
      : options_(options),
        n_(n),
        side_(side_for_tiles(n)),
        // Rows that a power of two lies between would share lines of the cache.
        stride_(side_ % 64 == 0 ? side_ + 16 : side_),
        a_(n * n),
        work_(side_ * stride_),
        x_(side_ * side_),
        vectors_((kLanczos + 2) * n),
        panels_(panel_floats()) {
    const double p = std::round(-1.0 / options.exponent);
    const bool whole = p >= 1 && p <= kLargestRoot && std::abs(options.exponent * p + 1.0) < 1e-12;
    power_ = whole && options.pseudo_inverse < 0.0 && options.ridge > 0.0 ? static_cast<int>(p) : 0;
  }

  // Writes the root of `a` to `out` unless it fails or is zero.
  Status operator()(const W* a, W* out, float* residual) {
    *residual = 0.0f;
    bool any = false;
    for (int64_t i = 0; i < n_; ++i) {
      if (!scan(a + i * n_, i + 1, &any)) return kFailed;
      std::copy_n(a + i * n_, i + 1, a_.get() + i * n_);
    }
    if (!any) return kZero;
    mirror(a_.get(), n_, n_);
    Status status = kComputed;
    if (options_.method == kRational && rational()) {
      *residual = check();
      // Also false for NaN.
      if (*residual <= options_.residual_bound) return write(out, status);
    }
    if (options_.method != kEigh) status = kFellBack;
    if (options_.ridge >= kLeastSingleRidge && eigh<W>()) {
      *residual = check();
      if (*residual <= options_.residual_bound) return write(out, status);
    }
    if (eigh<double>()) {
      *residual = check();
      if (std::isfinite(*residual)) return write(out, options_.ridge >= kLeastSingleRidge ? kFellBack : status);
    }
    *residual = 0.0f;
    return kFailed;
  }

 private:
  static constexpr int kLanczos = 40;

  int64_t panel_floats() const {
#if defined(EFFKERN_HAS_BF16)
    if (sizeof(W) == sizeof(float)) return tiles::panel_size(side_);
#endif
    return 0;
  }

  Status write(W* out, Status status) {
    if (power_ == 0) mirror(x_.get(), n_, side_);
    const W factor = static_cast<W>(std::pow(options_.scale, options_.exponent));
    bool any = false;
    for (int64_t i = 0; i < n_; ++i) {
      W* row = x_.get() + i * side_;
      combine(W(0), row, factor, row, n_);
      if (!scan(row, n_, &any)) return kFailed;
    }
    for (int64_t i = 0; i < n_; ++i) std::copy_n(x_.get() + i * side_, n_, out + i * n_);
    return status;
  }

  // Q f(lambda) Q^T in the lower triangle of x_, by LAPACK in T.
  template <typename T>
  bool eigh() {
    Scratch<T> q(n_ * n_), out(side_ * side_);
    for (int64_t i = 0; i < n_ * n_; ++i) q.get()[i] = static_cast<T>(a_.get()[i]);
    lapack::SymmetricEigen<T> solve(static_cast<int>(n_));
    if (solve(q.get(), static_cast<int>(n_)) != 0) return false;
    top_ = std::max(0.0, static_cast<double>(solve.values()[n_ - 1]));
    if (!std::isfinite(top_) || top_ == 0.0) return false;
    for (int64_t k = 0; k < n_; ++k) {
      const double lambda = std::max(0.0, static_cast<double>(solve.values()[k]));
      const double damped = std::max(lambda + options_.ridge * top_, double{std::numeric_limits<W>::min()});
      const double f = lambda <= options_.pseudo_inverse * top_ ? 0.0 : std::pow(damped, options_.exponent);
      const T root = static_cast<T>(std::sqrt(f));
      for (int64_t i = 0; i < n_; ++i) q.get()[k * n_ + i] *= root;
    }
    return finish(q, out);
  }

  template <typename T>
  bool finish(const Scratch<T>& q, const Scratch<T>& out) {
    // Tiles read whole vectors.
    if (side_ != n_ && sizeof(T) == sizeof(float) && tiles()) {
      Scratch<T> wide(n_ * side_);
      for (int64_t k = 0; k < n_; ++k) {
        std::copy_n(q.get() + k * n_, n_, wide.get() + k * side_);
        std::fill_n(wide.get() + k * side_ + n_, side_ - n_, T(0));
      }
      gram_of_rows(wide.get(), n_, n_, side_, out.get(), side_);
    } else {
      gram_of_rows(q.get(), n_, n_, n_, out.get(), side_);
    }
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j <= i; ++j) x_.get()[i * side_ + j] = static_cast<W>(out.get()[i * side_ + j]);
    return true;
  }

  // sum_k w_k (A / s + (delta + t_k) I)^-1 s^exponent, s = (1 + ridge) lambda_max, in the lower triangle of x_.
  bool rational() {
    // A tenth of what the partial fractions truncate (rational.tolerance).
    top_ = lambda_max(0.1 * std::min(1e-3, 1e-8 / options_.ridge));
    if (!(top_ > 0.0)) return false;
    const double s = (1.0 + options_.ridge) * top_, delta = options_.ridge / (1.0 + options_.ridge);
    const double unit = std::pow(s, options_.exponent);
    std::fill_n(x_.get(), side_ * side_, W(0));
    for (int64_t i = 0; i < n_; ++i) x_.get()[i * side_ + i] = static_cast<W>(options_.weights.back() * unit);
    for (size_t k = 0; k < options_.poles.size(); ++k)
      if (!add_inverse(1.0 / s, delta + options_.poles[k], options_.weights[k] * unit)) return false;
    return true;
  }

  // x_ += weight (scale A + shift I)^-1
  bool add_inverse(double scale, double shift, double weight) {
    W* s = work_.get();
    const W factor = static_cast<W>(scale);
    for (int64_t i = 0; i < n_; ++i) {
      combine(factor, a_.get() + i * n_, W(0), zeroed(s + i * stride_, i + 1), i + 1);
      s[i * stride_ + i] += static_cast<W>(shift);
    }
#if defined(EFFKERN_HAS_BF16)
    if constexpr (sizeof(W) == sizeof(float)) {
      if (tiles()) {
        for (int64_t i = n_; i < side_; ++i) {
          std::fill_n(s + i * stride_, side_, 0.0f);
          s[i * stride_ + i] = 1.0f;
        }
        if (!tiles::invert_factor(s, side_, stride_, panels_.get())) return false;
        tiles::add_gram_of_triangle(s, side_, stride_, static_cast<float>(weight), x_.get(), side_);
        return true;
      }
    }
#endif
    const int n = static_cast<int>(n_), stride = static_cast<int>(stride_);
    if (lapack::potrf(n, s, stride) != 0 || lapack::potri(n, s, stride) != 0) return false;
    for (int64_t i = 0; i < n_; ++i) combine(static_cast<W>(weight), s + i * stride_, W(1), x_.get() + i * side_, i + 1);
    return true;
  }

  // `combine` reads what it adds to.
  static W* zeroed(W* x, int64_t n) {
    std::fill_n(x, n, W(0));
    return x;
  }

  // Lanczos from the longest row and, a tenth of it, the signs, orthogonalised against all vectors before, until four
  // steps more change the eigenvalue by less than `accuracy`. The longest row is no shorter than lambda_max / sqrt(n), and
  // what is found is no less: no direction is overlooked.
  double lambda_max(double accuracy) {
    const int most = static_cast<int>(std::min<int64_t>(kLanczos, n_));
    W* v = vectors_.get();
    double diagonal = 0.0, longest = -1.0;
    for (int64_t i = 0; i < n_; ++i) diagonal = std::max(diagonal, static_cast<double>(a_.get()[i * n_ + i]));
    if (!(diagonal > 0.0)) return 0.0;
    const W* row = nullptr;
    for (int64_t i = 0; i < n_; ++i) {
      // Scaled before it is squared.
      combine(static_cast<W>(1.0 / diagonal), a_.get() + i * n_, W(0), zeroed(v, n_), n_);
      const double square = dot(v, v, n_);
      if (square > longest) {
        longest = square;
        row = a_.get() + i * n_;
      }
    }
    signs(v, n_);
    const double share = 0.1 * std::sqrt(longest / static_cast<double>(n_));
    combine(static_cast<W>(1.0 / diagonal), row, static_cast<W>(share), v, n_);
    double alpha[kLanczos], beta[kLanczos], found = 0.0;
    double length = std::sqrt(static_cast<double>(dot(v, v, n_)));
    for (int k = 0; k < most; ++k) {
      W* q = v + k * n_;
      combine(W(0), q, static_cast<W>(1.0 / length), q, n_);
      W* next = v + (k + 1) * n_;
      times(a_.get(), n_, q, next);
      alpha[k] = dot(q, next, n_);
      for (int j = 0; j <= k; ++j) combine(static_cast<W>(-dot(v + j * n_, next, n_)), v + j * n_, W(1), next, n_);
      length = std::sqrt(static_cast<double>(dot(next, next, n_)));
      beta[k] = length;
      // A space that is closed has the eigenvalue itself.
      const bool closed = !(length > 1e-5 * std::abs(alpha[0]));
      if (closed || k + 1 == most || k % 4 == 3) {
        const double before = found;
        found = largest_of_tridiagonal(alpha, beta, k + 1);
        if (closed || found - before < accuracy * found) break;
      }
    }
    return found;
  }

  // |X^p (max(A, 0) + ridge lambda_max) v - v| / |v| for the signs; x_ is made whole first.
  float check() {
    if (power_ == 0) return 0.0f;
    mirror(x_.get(), n_, side_);
    W *v = vectors_.get(), *y = v + n_;
    signs(v, n_);
    for (int i = 0; i < power_ / 2; ++i) apply(v, y);
    times(a_.get(), n_, v, y);
    combine(static_cast<W>(options_.ridge * top_), v, W(1), y, n_);
    std::copy_n(y, n_, v);
    for (int i = power_ / 2; i < power_; ++i) apply(v, y);
    signs(y, n_);
    combine(W(-1), y, W(1), v, n_);
    return static_cast<float>(std::sqrt(static_cast<double>(dot(v, v, n_)) / static_cast<double>(n_)));
  }

  void apply(W* v, W* y) {
    for (int64_t i = 0; i < n_; ++i) y[i] = dot(x_.get() + i * side_, v, n_);
    std::copy_n(y, n_, v);
  }

  const Options& options_;
  int64_t n_, side_, stride_;
  Scratch<W> a_, work_, x_, vectors_;
  Scratch<float> panels_;
  int power_ = 0;
  double top_ = 0.0;
};

template <typename W>
void run(const Tensor& out, const Tensor& factor, const Options& options, bool fresh, int32_t* failures,
         float* residual, int32_t* status) {
  const int64_t batch = factor.size(0), n = factor.size(1);
  const W* a = static_cast<const W*>(factor.const_data_ptr());
  W* x = static_cast<W*>(out.mutable_data_ptr());
  lapack::parallel_for(batch, [&](int64_t begin, int64_t end) {
    Root<W> root(n, options);
    for (int64_t b = begin; b < end; ++b) {
      W* to = x + b * n * n;
      status[b] = root(a + b * n * n, to, residual + b);
      if (fresh && status[b] >= kZero)
        std::fill_n(to, n * n, status[b] == kZero ? W(0) : std::numeric_limits<W>::quiet_NaN());
      if (failures != nullptr) failures[b] = status[b] == kFailed ? failures[b] + 1 : 0;
    }
  });
}

std::tuple<Tensor, Tensor> inverse_root(Tensor out, Tensor factor, int64_t method, double exponent, double ridge,
                                        double scale, double pseudo_inverse, std::vector<double> poles,
                                        std::vector<double> weights, double residual_bound, bool fresh,
                                        std::optional<Tensor> failures) {
  STD_TORCH_CHECK(lapack::available(), "shampoo_inverse_root_: this libtorch has no LAPACK");
  const ScalarType type = factor.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) && factor.dim() == 3 &&
                      factor.size(1) == factor.size(2) && factor.is_contiguous() && out.scalar_type() == type &&
                      out.dim() == 3 && out.size(0) == factor.size(0) && out.size(1) == factor.size(1) &&
                      out.size(2) == factor.size(2) && out.is_contiguous(),
                  "shampoo_inverse_root_: factor and out must be contiguous float32 or float64 [B, p, p]");
  STD_TORCH_CHECK(method == kEigh || method == kRational, "shampoo_inverse_root_: method must be eigh or rational");
  STD_TORCH_CHECK(method == kEigh || (!poles.empty() && weights.size() == poles.size() + 1),
                  "shampoo_inverse_root_: weights must be one more than poles");
  STD_TORCH_CHECK(exponent < 0.0, "shampoo_inverse_root_: exponent must be negative");
  const int64_t batch = factor.size(0);
  STD_TORCH_CHECK(!failures.has_value() || (failures->scalar_type() == ScalarType::Int && failures->is_contiguous() &&
                                            failures->numel() == batch),
                  "shampoo_inverse_root_: failures must be int32 [B]");
  const Options options{method, exponent, ridge, scale, pseudo_inverse, std::move(poles), std::move(weights), residual_bound};
  Tensor residual = torch::stable::new_empty(factor, {batch}, ScalarType::Float);
  Tensor status = torch::stable::new_empty(factor, {batch}, ScalarType::Int);
  if (batch == 0 || factor.size(1) == 0) return {residual, status};
  int32_t* counts = failures.has_value() ? static_cast<int32_t*>(failures->mutable_data_ptr()) : nullptr;
  float* residuals = static_cast<float*>(residual.mutable_data_ptr());
  int32_t* states = static_cast<int32_t*>(status.mutable_data_ptr());
  if (type == ScalarType::Double) {
    run<double>(out, factor, options, fresh, counts, residuals, states);
  } else {
    run<float>(out, factor, options, fresh, counts, residuals, states);
  }
  return {residual, status};
}

}  // namespace
}  // namespace effkern::shampoo

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("shampoo_inverse_root_", TORCH_BOX(&effkern::shampoo::inverse_root));
}
