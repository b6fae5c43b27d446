// BLAS and LAPACK of the torch that is loaded. Weak: a torch that exports none of a routine leaves its address null.
#pragma once

#include <cstdint>

extern "C" {
#define EFFKERN_WEAK __attribute__((weak))
void ssyevd_(const char*, const char*, const int*, float*, const int*, float*, float*, const int*, int*, const int*,
             int*) EFFKERN_WEAK;
void dsyevd_(const char*, const char*, const int*, double*, const int*, double*, double*, const int*, int*, const int*,
             int*) EFFKERN_WEAK;
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*,
            const float*, const int*, const float*, float*, const int*) EFFKERN_WEAK;
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*) EFFKERN_WEAK;
#undef EFFKERN_WEAK
}

namespace effkern {
namespace vendor {

inline bool has_eigh(float) { return ssyevd_ != nullptr; }
inline bool has_eigh(double) { return dsyevd_ != nullptr; }

// Eigenvalues ascending and vectors as columns (column-major) over the lower triangle of a; sizes of work come for -1.
inline int eigh(int n, float* a, float* values, float* work, int lwork, int* iwork, int liwork) {
  int info = 0;
  ssyevd_("V", "L", &n, a, &n, values, work, &lwork, iwork, &liwork, &info);
  return info;
}
inline int eigh(int n, double* a, double* values, double* work, int lwork, int* iwork, int liwork) {
  int info = 0;
  dsyevd_("V", "L", &n, a, &n, values, work, &lwork, iwork, &liwork, &info);
  return info;
}

// Where the library has no such routine; column-major, as BLAS.
template <typename T>
void plain_gemm(char ta, char tb, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb, T beta, T* c,
                int ldc) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      T sum = 0;
      for (int l = 0; l < k; ++l) {
        const int64_t at_a = ta == 'N' ? i + static_cast<int64_t>(l) * lda : l + static_cast<int64_t>(i) * lda;
        const int64_t at_b = tb == 'N' ? l + static_cast<int64_t>(j) * ldb : j + static_cast<int64_t>(l) * ldb;
        sum += a[at_a] * b[at_b];
      }
      T& to = c[i + static_cast<int64_t>(j) * ldc];
      to = alpha * sum + (beta == 0 ? T(0) : beta * to);
    }
}

// c = alpha op(a) op(b) + beta c, column-major. Inside a parallel region the libraries use one thread.
inline void gemm(char ta, char tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
                 float beta, float* c, int ldc) {
  if (sgemm_ == nullptr) return plain_gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  sgemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}
inline void gemm(char ta, char tb, int m, int n, int k, double alpha, const double* a, int lda, const double* b,
                 int ldb, double beta, double* c, int ldc) {
  if (dgemm_ == nullptr) return plain_gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  dgemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

}  // namespace vendor
}  // namespace effkern
