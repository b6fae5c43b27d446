// csrc/cpu/vendor.h in a program without BLAS or LAPACK: its weak symbols are null, and products are its own.
//
//   vendor_host     prints each product of small column-major matrices of counting numbers
#include "cpu/vendor.h"

#include <cstdio>
#include <vector>

int main() {
  if (effkern::vendor::has_eigh(0.0f) || effkern::vendor::has_eigh(0.0) || sgemm_ != nullptr) return 2;
  const int m = 2, n = 3, k = 4, stride = 5;
  for (const char ta : {'N', 'T'})
    for (const char tb : {'N', 'T'}) {
      std::vector<double> a(stride * 5), b(stride * 5), c(stride * n, 1.0);
      for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<double>(i), b[i] = static_cast<double>(i) - 7;
      effkern::vendor::gemm(ta, tb, m, n, k, 2.0, a.data(), stride, b.data(), stride, 3.0, c.data(), stride);
      for (const double x : c) std::printf("%.0f ", x);
      // A product of nothing but c: NaN in it must not stay.
      std::vector<float> fresh(stride * n, __builtin_nanf("")), x(a.begin(), a.end()), y(b.begin(), b.end());
      effkern::vendor::gemm(ta, tb, m, n, k, 1.0f, x.data(), stride, y.data(), stride, 0.0f, fresh.data(), stride);
      for (int j = 0; j < n; ++j)
        for (int i = 0; i < m; ++i) std::printf("%.0f ", static_cast<double>(fresh[i + j * stride]));
      std::printf("\n");
    }
}
