// effkern::batched_eigh for CPU tensors: Jacobi on a few matrices per thread, or LAPACK on one.
#include "cpu/jacobi.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/jacobi_lanes.h"
#include "cpu/lapack_parallel.h"

namespace effkern {
namespace jacobi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// From this order on LAPACK is faster, where there is one (benchmarks/ops/batched_eigh.py).
template <typename T>
constexpr int64_t kLapackOrder = sizeof(T) == sizeof(float) ? 44 : 28;

// GCC clones functions, not templates.
#define EFFKERN_JACOBI(T) \
  EFFKERN_CLONES bool diagonalise_lanes(const Lanes<T>& x, const T* least) { return diagonalise<T>(x, least); }
EFFKERN_JACOBI(float)
EFFKERN_JACOBI(double)
#undef EFFKERN_JACOBI

// Largest magnitude of the lower triangle; not finite if any element is not.
template <typename T>
T magnitude(const T* matrix, int64_t n) {
  T largest = 0, poison = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      largest = std::max(largest, std::fabs(matrix[i * n + j]));
      poison += matrix[i * n + j] * T(0);
    }
  return largest + poison;
}

template <typename T>
void fill_nan(int64_t n, T* values, T* vectors) {
  std::fill_n(values, n, std::numeric_limits<T>::quiet_NaN());
  std::fill_n(vectors, n * n, std::numeric_limits<T>::quiet_NaN());
}

// A power of two that brings the largest element to about 1: squares then stay in range.
template <typename T>
int exponent_of(T largest) {
  int exponent = 0;
  if (largest > 0) std::frexp(largest, &exponent);
  return exponent;
}

template <typename T>
void write_lane(const Lanes<T>& x, int lane, int exponent, std::vector<int64_t>& order, T* values, T* vectors) {
  constexpr int kCount = kLanesOf<T>;
  const int64_t n = x.n;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return x.at(i, i)[lane] < x.at(j, j)[lane]; });
  for (int64_t k = 0; k < n; ++k) {
    values[k] = std::ldexp(x.at(order[k], order[k])[lane], exponent);
    const T* vector = x.v + order[k] * n * kCount + lane;
    for (int64_t i = 0; i < n; ++i) vectors[i * n + k] = vector[i * kCount];
  }
}

template <typename T>
void eigh_lanes(const T* matrices, int64_t count, int64_t n, T* values, T* vectors, int32_t* status, T* memory) {
  constexpr int kCount = kLanesOf<T>;
  const Lanes<T> x{memory, memory + n * n * kCount, n};
  alignas(64) T least[kCount];
  int exponents[kCount] = {};
  std::fill_n(memory, 2 * n * n * kCount, T(0));
  std::fill_n(least, kCount, T(0));
  for (int64_t k = 0; k < n; ++k) std::fill_n(x.v + (k * n + k) * kCount, kCount, T(1));
  for (int64_t l = 0; l < count; ++l) {
    const T* matrix = matrices + l * n * n;
    const T largest = magnitude(matrix, n);
    // A lane of zeros needs no rotation.
    status[l] = std::isfinite(largest) ? kConverged : kNotFinite;
    if (status[l] == kNotFinite) continue;
    exponents[l] = exponent_of(largest);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) x.at(j, i)[l] = std::ldexp(matrix[i * n + j], -exponents[l]);
    const T eps = std::numeric_limits<T>::epsilon();
    least[l] = largest > 0 ? eps * eps : T(0);
  }
  if (!diagonalise_lanes(x, least)) {
    // Which lanes are still at it: rotations of a lane that is done are the identity.
    alignas(64) T t[kCount], h[kCount], s[kCount];
    for (int64_t p = 0; p < n; ++p)
      for (int64_t q = p + 1; q < n; ++q) {
        rotation<T>(x.at(p, p), x.at(q, q), x.at(p, q), least, t, h, s);
        for (int64_t l = 0; l < count; ++l)
          if (status[l] == kConverged && t[l] != 0) status[l] = kNoConvergence;
      }
  }
  std::vector<int64_t> order(n);
  for (int64_t l = 0; l < count; ++l) {
    T* const to = vectors + l * n * n;
    if (status[l] == kNotFinite) fill_nan(n, values + l * n, to);
    else write_lane(x, static_cast<int>(l), exponents[l], order, values + l * n, to);
  }
}

template <typename T>
int32_t solve_by_lapack(lapack::SymmetricEigen<T>& solver, int64_t n, const T* matrix, T* values, T* vectors) {
  const bool finite = std::isfinite(magnitude(matrix, n));
  // The lower triangle column by column.
  for (int64_t i = 0; finite && i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) vectors[j * n + i] = matrix[i * n + j];
  if (!finite || solver(vectors, static_cast<int>(n)) != 0) {
    fill_nan(n, values, vectors);
    return finite ? kNoConvergence : kNotFinite;
  }
  std::copy_n(solver.values(), n, values);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) std::swap(vectors[i * n + j], vectors[j * n + i]);
  return kConverged;
}

template <typename T>
void run(const T* matrices, int64_t count, int64_t n, Method method, T* values, T* vectors, int32_t* status) {
  if (count == 0 || n == 0) return;
  const bool use_lapack = method == kLapack || n > kMaxOrder ||
                      (method == kAuto && n >= kLapackOrder<T> && lapack::has_eigh(T()));
  if (use_lapack) {
    STD_TORCH_CHECK(lapack::has_eigh(T()), "batched_eigh: this torch exports no LAPACK, which orders above 128 need");
    lapack::parallel_for(count, [&](int64_t first, int64_t last) {
      lapack::SymmetricEigen<T> solver(static_cast<int>(n), 'L');
      for (int64_t b = first; b < last; ++b)
        status[b] = solve_by_lapack(solver, n, matrices + b * n * n, values + b * n, vectors + b * n * n);
    });
    return;
  }
  constexpr int64_t kCount = kLanesOf<T>;
  torch::stable::parallel_for(0, (count + kCount - 1) / kCount, 1, [&](int64_t first, int64_t last) {
    // Aligned by hand: operator new gives 16 bytes.
    const int64_t size = 2 * n * n * kCount;
    std::unique_ptr<T[]> memory(new T[size + kCount]);
    T* const start = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / sizeof(T);
    for (int64_t g = first; g < last; ++g) {
      const int64_t b = g * kCount;
      eigh_lanes(matrices + b * n * n, std::min(kCount, count - b), n, values + b * n, vectors + b * n * n, status + b,
                 start);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> batched_eigh(Tensor matrices, int64_t method) {
  const auto dtype = matrices.scalar_type();
  STD_TORCH_CHECK(matrices.dim() == 3 && matrices.size(1) == matrices.size(2) && matrices.is_contiguous() &&
                      (dtype == ScalarType::Float || dtype == ScalarType::Double) && method >= kAuto &&
                      method <= kLapack,
                  "batched_eigh: matrices must be contiguous [B, n, n], float32 or float64");
  STD_TORCH_CHECK(method != kJacobi || matrices.size(1) <= kMaxOrder,
                  "batched_eigh: the Jacobi method takes orders up to 128");
  const int64_t count = matrices.size(0), n = matrices.size(1);
  const Tensor values = torch::stable::new_empty(matrices, {count, n});
  const Tensor vectors = torch::stable::new_empty(matrices, {count, n, n});
  const Tensor status = torch::stable::new_empty(matrices, {count}, ScalarType::Int);
  auto* flags = static_cast<int32_t*>(status.data_ptr());
  if (dtype == ScalarType::Float) {
    eigh(static_cast<const float*>(matrices.const_data_ptr()), count, n, static_cast<Method>(method),
         static_cast<float*>(values.data_ptr()), static_cast<float*>(vectors.data_ptr()), flags);
  } else {
    eigh(static_cast<const double*>(matrices.const_data_ptr()), count, n, static_cast<Method>(method),
         static_cast<double*>(values.data_ptr()), static_cast<double*>(vectors.data_ptr()), flags);
  }
  return {values, vectors, status};
}

}  // namespace

void eigh(const float* matrices, int64_t count, int64_t n, Method method, float* values, float* vectors,
          int32_t* status) {
  run(matrices, count, n, method, values, vectors, status);
}

void eigh(const double* matrices, int64_t count, int64_t n, Method method, double* values, double* vectors,
          int32_t* status) {
  run(matrices, count, n, method, values, vectors, status);
}

}  // namespace jacobi
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("batched_eigh", TORCH_BOX(&effkern::jacobi::batched_eigh)); }
