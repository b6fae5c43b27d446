// Eigen-decomposition of many small symmetric matrices, T = float or double.
#pragma once

#include <cstdint>

namespace effkern {
namespace jacobi {

enum Method : int64_t { kAuto, kJacobi, kLapack };
enum Status : int32_t { kConverged, kNotFinite, kNoConvergence };

// Largest order of the Jacobi method, which holds a few matrices per thread in the cache.
constexpr int64_t kMaxOrder = 128;

// values [count, n] ascending, vectors [count, n, n] in columns, status [count], of `count` packed matrices of which the
// lower triangle is read. NaN where a matrix holds NaN or infinity. Parallel; each matrix gets the same bits whatever
// its neighbours and the number of threads.
void eigh(const float* matrices, int64_t count, int64_t n, Method method, float* values, float* vectors,
          int32_t* status);
void eigh(const double* matrices, int64_t count, int64_t n, Method method, double* values, double* vectors,
          int32_t* status);

}  // namespace jacobi
}  // namespace effkern
