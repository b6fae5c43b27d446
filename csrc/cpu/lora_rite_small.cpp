// effkern::lora_rite_precondition_ and lora_rite_rebase_ for CPU tensors: r x r work, float64, one factor per thread.
//
// The formulas are those of effkern/ops/lora_rite/plain.py. Factors 2 p and 2 p + 1 are a pair; the moments of factor f
// are in the basis of f ^ 1.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "cpu/jacobi.h"
#include "cpu/lora_rite.h"

namespace effkern {
namespace lora_rite {
namespace {

// As terms.EQUILIBRATED.
constexpr double kEquilibrated = 1e-5;

// c = alpha op(a) op(b), all [n, n] by rows.
void multiply(int64_t n, char ta, char tb, double alpha, const double* a, const double* b, double* c) {
  const int r = static_cast<int>(n);
  lapack::gemm(tb, ta, r, r, r, alpha, b, r, a, r, 0.0, c, r);
}

void symmetrise(int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) x[i * n + j] = x[j * n + i] = 0.5 * (x[i * n + j] + x[j * n + i]);
}

EFFKERN_CLONES void subtract_row(double* x, double factor, const double* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] -= factor * y[i];
}

EFFKERN_CLONES void scale_row(double* x, double factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] *= factor;
}

double decay(double beta, double t) { return beta * (1 - std::pow(beta, t - 1)) / (1 - std::pow(beta, t)); }

// numbers and flags as in terms.Terms.
struct Terms {
  double beta1, beta2, eps, weight_decay, clip, skip_rms;
  bool relative_eps, escaped_mass, sum_second;

  Terms(const std::vector<double>& numbers, const std::vector<bool>& flags) {
    check(numbers.size() == 7 && flags.size() == 3, "numbers and flags must be those of Terms");
    beta1 = numbers[0], beta2 = numbers[1], eps = numbers[2], weight_decay = numbers[3];
    clip = numbers[4], skip_rms = numbers[5];
    relative_eps = flags[0], escaped_mass = flags[1], sum_second = flags[2];
  }
};

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five precondition_(Tensor grams, Tensor all_traces, Tensor rows, Tensor lr, std::optional<Tensor> grad_scale,
                   Tensor whiten, Tensor second, Tensor transport, Tensor escaped, Tensor steps,
                   std::vector<double> numbers, std::vector<bool> flags) {
  const Terms terms(numbers, flags);
  check(grams.dim() == 3 && grams.size(1) == grams.size(2) && grams.size(1) <= kMaxRank && grams.size(0) % 2 == 0,
        "grams must be [F, r, r] of an even number of factors");
  const int64_t count = grams.size(0), n = grams.size(1), square = n * n;
  const double *H = doubles(grams, count * square), *heights = doubles(rows, count), *rates = doubles(lr, count);
  const double* traces = doubles(all_traces, all_traces.numel());
  double *W = doubles(whiten, count * square), *values = doubles(second, count * n), *mass = doubles(escaped, count);
  const double* P = doubles(transport, count * square);
  const double inverse_scale = grad_scale ? *doubles(*grad_scale, 1) : 1.0;
  check(steps.scalar_type() == ScalarType::Long && steps.is_contiguous() && steps.numel() == count,
        "steps must be int64 [F]");
  auto* done = static_cast<int64_t*>(steps.data_ptr());

  const Tensor gate = torch::stable::new_empty(all_traces, {});
  const Tensor carry = torch::stable::empty_like(grams), take = torch::stable::empty_like(grams);
  const Tensor apply = torch::stable::empty_like(grams), shrink = torch::stable::empty_like(rows);
  double* const to[] = {static_cast<double*>(carry.data_ptr()), static_cast<double*>(take.data_ptr()),
                        static_cast<double*>(apply.data_ptr()), static_cast<double*>(shrink.data_ptr())};
  double total = 0;
  for (int64_t i = 0; i < all_traces.numel(); ++i) total += traces[i];
  double& gate_value = *static_cast<double*>(gate.data_ptr());
  gate_value = total;
  const Five result{gate, carry, take, apply, shrink};
  for (double* x : {to[0], to[1], to[2]}) std::fill_n(x, count * square, 0.0);
  std::fill_n(to[3], count, 1.0);
  if (!std::isfinite(total)) return result;

  const double norm = std::sqrt(total), clip = terms.clip > 0 && norm > terms.clip ? terms.clip / norm : 1.0;
  std::vector<double> V(count * square), E(count * square), lambda(count * n), share(count), new_mass(mass, mass + count);
  std::vector<int32_t> status(count);
  // V = P diag(second) P^T, the second moment carried to the present basis.
  lapack::parallel_for(count, [&](int64_t first, int64_t last) {
    std::vector<double> scaled(square);
    for (int64_t f = first; f < last; ++f) {
      const double* transported = P + (f ^ 1) * square;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) scaled[i * n + j] = transported[i * n + j] * values[f * n + j];
      multiply(n, 'N', 'T', 1.0, scaled.data(), transported, V.data() + f * square);
      symmetrise(n, V.data() + f * square);
      const double own = trace(H + f * square, n);
      share[f] = own == 0 || (terms.skip_rms > 0 && own > terms.skip_rms * terms.skip_rms * heights[f] * n) ? 0.0 : clip;
    }
  });
  if (terms.escaped_mass) {
    jacobi::eigh(V.data(), count, n, jacobi::kAuto, lambda.data(), E.data(), status.data());
    for (int64_t f = 0; f < count; ++f) {
      std::vector<double> before(values + f * n, values + (f + 1) * n);
      std::sort(before.begin(), before.end());
      double drop = 0, sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        drop = std::max(drop, before[i] - lambda[f * n + i]);
        sum += before[i];
      }
      new_mass[f] += std::min(drop, std::max(0.0, sum - trace(V.data() + f * square, n)));
      if (!terms.sum_second) new_mass[f] *= decay(terms.beta2, static_cast<double>(done[f] + 1));
    }
  }
  for (int64_t f = 0; f < count; ++f) {
    const double b2 = decay(terms.beta2, static_cast<double>(done[f] + 1)), power = share[f] * share[f];
    const double keep = terms.sum_second ? 1.0 : b2, add = power * (terms.sum_second ? 1.0 : (1 - b2) / heights[f]);
    double* v = V.data() + f * square;
    for (int64_t i = 0; i < square; ++i) v[i] = keep * v[i] + add * H[f * square + i];
    symmetrise(n, v);
  }
  jacobi::eigh(V.data(), count, n, jacobi::kAuto, lambda.data(), E.data(), status.data());
  for (const double value : lambda)
    if (!std::isfinite(value)) gate_value = std::numeric_limits<double>::quiet_NaN();
  if (!std::isfinite(gate_value)) return result;

  lapack::parallel_for(count, [&](int64_t first, int64_t last) {
    std::vector<double> turned(square);
    for (int64_t f = first; f < last; ++f) {
      const int64_t at = f * square, other = (f ^ 1) * square;
      const double t = static_cast<double>(done[f] + 1), b1 = decay(terms.beta1, t);
      double largest = 0;
      for (int64_t j = 0; j < n; ++j) {
        values[f * n + j] = std::max(0.0, lambda[f * n + j]);
        largest = std::max(largest, std::sqrt(values[f * n + j] + new_mass[f]));
      }
      multiply(n, 'N', 'N', 1.0, W + other, E.data() + at, turned.data());
      multiply(n, 'T', 'N', b1, P + other, E.data() + at, to[0] + at);
      for (int64_t j = 0; j < n; ++j) {
        const double root = std::sqrt(values[f * n + j] + new_mass[f]);
        const double bottom = root + (terms.relative_eps ? terms.eps * largest : terms.eps);
        const double factor = bottom > 0 ? share[f] * inverse_scale * (1 - b1) / bottom : 0.0;
        for (int64_t i = 0; i < n; ++i) {
          to[1][at + i * n + j] = turned[i * n + j] * factor;
          to[2][at + j * n + i] = turned[i * n + j] * rates[f];
        }
      }
      to[3][f] = 1 - rates[f] * terms.weight_decay;
      std::copy_n(turned.data(), square, W + other);
      mass[f] = new_mass[f];
      ++done[f];
    }
  });
  return result;
}

// Upper U with U^T U = c, by rows; false if a pivot cannot be trusted.
bool cholesky(int64_t n, const double* c, double* u) {
  for (int64_t j = 0; j < n; ++j) {
    std::copy_n(c + j * n + j, n - j, u + j * n + j);
    for (int64_t k = 0; k < j; ++k) subtract_row(u + j * n + j, u[k * n + j], u + k * n + j, n - j);
    const double pivot = u[j * n + j];
    if (!(pivot > kEquilibrated * c[j * n + j])) return false;
    scale_row(u + j * n + j, 1 / std::sqrt(pivot), n - j);
  }
  return true;
}

// x <- U^-T x.
void solve(int64_t n, const double* u, double* x) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t k = 0; k < j; ++k) subtract_row(x + j * n, u[k * n + j], x + k * n, n);
    scale_row(x + j * n, 1 / u[j * n + j], n);
  }
}

bool is_finite(const double* x, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += x[i] * 0.0;
  return sum == 0;
}

void transpose(int64_t n, const double* x, double* out, bool single) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) out[j * n + i] = single ? static_cast<float>(x[i * n + j]) : x[i * n + j];
}

// Whether a float32 Gram matrix of X whiten will do in the next step: X's condition is far from the tolerance.
bool is_safe(int64_t n, const double* whiten, double size, double tolerance) {
  double sum = 0;
  for (int64_t i = 0; i < n * n; ++i) sum += whiten[i] * whiten[i];
  return size * sum * tolerance * tolerance < 1;
}

void rebase_(Tensor grams, Tensor crosses, Tensor sizes, std::optional<Tensor> gate, Tensor whiten, Tensor transport,
             Tensor exact, bool single, double tolerance) {
  check(grams.dim() == 3 && grams.size(1) == grams.size(2) && grams.size(1) <= kMaxRank, "grams must be [F, r, r]");
  const int64_t count = grams.size(0), n = grams.size(1), square = n * n;
  const double *given = doubles(grams, count * square), *D = doubles(crosses, count * square);
  const double* size = doubles(sizes, count);
  double *W = doubles(whiten, count * square), *P = doubles(transport, count * square);
  check(exact.scalar_type() == ScalarType::Int && exact.is_contiguous() && exact.numel() == count,
        "exact must be int32 [F]");
  auto* flags = static_cast<int32_t*>(exact.data_ptr());
  if (gate && !std::isfinite(*doubles(*gate, 1))) return;
  std::vector<double> C(given, given + count * square);
  enum Kind : char { kFull, kEigen, kBroken };
  std::vector<char> kind(count);
  lapack::parallel_for(count, [&](int64_t first, int64_t last) {
    std::vector<double> u(square), y(square);
    for (int64_t f = first; f < last; ++f) {
      const int64_t at = f * square;
      symmetrise(n, C.data() + at);
      if (!is_finite(C.data() + at, square)) {
        kind[f] = kBroken;
        continue;
      }
      kind[f] = !flags[f] && cholesky(n, C.data() + at, u.data()) ? kFull : kEigen;
      if (kind[f] == kEigen) continue;
      // whiten^T <- U^-T whiten^T, transport <- U^-T D.
      transpose(n, W + at, y.data(), single);
      solve(n, u.data(), y.data());
      transpose(n, y.data(), W + at, false);
      std::copy_n(D + at, square, P + at);
      solve(n, u.data(), P + at);
      flags[f] = !is_safe(n, W + at, size[f], tolerance);
    }
  });
  std::vector<int64_t> rest;
  for (int64_t f = 0; f < count; ++f)
    if (kind[f] == kEigen) rest.push_back(f);
  if (rest.empty()) return;
  const int64_t num_rest = static_cast<int64_t>(rest.size());
  std::vector<double> packed(num_rest * square), values(num_rest * n), Q(num_rest * square);
  std::vector<int32_t> status(num_rest);
  for (int64_t i = 0; i < num_rest; ++i) std::copy_n(C.data() + rest[i] * square, square, packed.data() + i * square);
  jacobi::eigh(packed.data(), num_rest, n, jacobi::kAuto, values.data(), Q.data(), status.data());
  lapack::parallel_for(num_rest, [&](int64_t first, int64_t last) {
    std::vector<double> base(square), product(square);
    for (int64_t i = first; i < last; ++i) {
      const int64_t f = rest[i], at = f * square;
      double *q = Q.data() + i * square, *w = W + at, *p = P + at;
      const double* lambda = values.data() + i * n;
      const bool was_exact = flags[f] != 0;
      const double cut = (was_exact ? tolerance * tolerance : kEquilibrated) * lambda[n - 1];
      bool full = true;
      // q <- Q Lambda^-1/2, without what is cut.
      for (int64_t j = 0; j < n; ++j) {
        const bool kept = lambda[j] > cut;
        full = full && kept;
        const double root = kept ? 1 / std::sqrt(lambda[j]) : 0.0;
        for (int64_t k = 0; k < n; ++k) q[k * n + j] *= root;
      }
      multiply(n, 'T', 'N', 1.0, q, D + at, product.data());
      if (was_exact) {
        multiply(n, 'N', 'N', 1.0, product.data(), w, p);
        std::copy_n(q, square, w);
      } else {
        std::copy_n(product.data(), square, p);
        for (int64_t k = 0; k < square; ++k) base[k] = single ? static_cast<float>(w[k]) : w[k];
        multiply(n, 'N', 'N', 1.0, base.data(), q, w);
      }
      flags[f] = !(was_exact && full && is_safe(n, w, size[f], tolerance));
    }
  });
}

}  // namespace
}  // namespace lora_rite
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("lora_rite_precondition_", TORCH_BOX(&effkern::lora_rite::precondition_));
  m.impl("lora_rite_rebase_", TORCH_BOX(&effkern::lora_rite::rebase_));
}
