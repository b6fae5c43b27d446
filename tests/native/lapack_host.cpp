// csrc/cpu/lapack.h in a program without BLAS or LAPACK: its weak symbols are null, and products are its own.
//
//   lapack_host     prints each product of small column-major matrices of counting numbers
#include "cpu/lapack.h"

#include <cstdio>
#include <utility>
#include <vector>

namespace {

int local_threads = 7;

// The guard gives back what was there, whichever way it nests.
bool guards_threads() {
  {
    const effkern::lapack::OneThread outer;
    if (local_threads != 1) return false;
    {
      const effkern::lapack::OneThread inner;
    }
    if (local_threads != 1) return false;
  }
  return local_threads == 7;
}

// syevd's contract names 1 + 6 n + 2 n^2 numbers; as a float the same number may come out smaller.
bool asks_for_enough() {
  using Eigen = effkern::lapack::SymmetricEigen<float>;
  bool rounded_down = false;
  for (const size_t n : {1, 5, 4096, 8194, 8195, 8202, 20000}) {
    const size_t least = 1 + 6 * n + 2 * n * n, asked = static_cast<size_t>(static_cast<float>(least));
    rounded_down = rounded_down || asked + 1 < least;
    if (Eigen::work_size(n, asked) < least || Eigen::work_size(n, least + 9) != least + 9) return false;
  }
  return rounded_down;
}

}  // namespace

// In the place of MKL's.
extern "C" int MKL_Set_Num_Threads_Local(int count) { return std::exchange(local_threads, count); }

int main() {
  if (!guards_threads() || !asks_for_enough()) return 3;
  if (effkern::lapack::has_eigh(0.0f) || effkern::lapack::has_eigh(0.0) || sgemm_ != nullptr) return 2;
  const int m = 2, n = 3, k = 4, stride = 5;
  for (const char ta : {'N', 'T'})
    for (const char tb : {'N', 'T'}) {
      std::vector<double> a(stride * 5), b(stride * 5), c(stride * n, 1.0);
      for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<double>(i), b[i] = static_cast<double>(i) - 7;
      effkern::lapack::gemm(ta, tb, m, n, k, 2.0, a.data(), stride, b.data(), stride, 3.0, c.data(), stride);
      for (const double x : c) std::printf("%.0f ", x);
      // A product of nothing but c: NaN in it must not stay.
      std::vector<float> fresh(stride * n, __builtin_nanf("")), x(a.begin(), a.end()), y(b.begin(), b.end());
      effkern::lapack::gemm(ta, tb, m, n, k, 1.0f, x.data(), stride, y.data(), stride, 0.0f, fresh.data(), stride);
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < m; ++i) std::printf("%.0f ", static_cast<double>(fresh[i + j * stride]));
      std::printf("\n");
    }
}
