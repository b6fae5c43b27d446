// The LAPACK and BLAS routines that libtorch brings, by their reference names; matrices lie column by column.
//
// Declared weak: a libtorch without one of them loads all the same, and available() says so. Inside a parallel region
// the library behind them runs on the calling thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#define EFFKERN_WEAK __attribute__((weak))
extern "C" {
void ssyevd_(const char* job, const char* triangle, const int* n, float* a, const int* lda, float* w, float* work,
             const int* work_size, int* int_work, const int* int_work_size, int* info) EFFKERN_WEAK;
void dsyevd_(const char* job, const char* triangle, const int* n, double* a, const int* lda, double* w, double* work,
             const int* work_size, int* int_work, const int* int_work_size, int* info) EFFKERN_WEAK;
void spotrf_(const char* triangle, const int* n, float* a, const int* lda, int* info) EFFKERN_WEAK;
void dpotrf_(const char* triangle, const int* n, double* a, const int* lda, int* info) EFFKERN_WEAK;
void spotri_(const char* triangle, const int* n, float* a, const int* lda, int* info) EFFKERN_WEAK;
void dpotri_(const char* triangle, const int* n, double* a, const int* lda, int* info) EFFKERN_WEAK;
void sgemm_(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k, const float* alpha,
            const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
            const int* ldc) EFFKERN_WEAK;
void dgemm_(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k, const double* alpha,
            const double* a, const int* lda, const double* b, const int* ldb, const double* beta, double* c,
            const int* ldc) EFFKERN_WEAK;
}
#undef EFFKERN_WEAK

namespace effkern::lapack {

inline bool available() {
  return ssyevd_ != nullptr && dsyevd_ != nullptr && spotrf_ != nullptr && dpotrf_ != nullptr && spotri_ != nullptr &&
         dpotri_ != nullptr && sgemm_ != nullptr && dgemm_ != nullptr;
}

#define EFFKERN_LAPACK(T, p)                                                                                        \
  inline void syevd(const char* job, int n, T* a, int lda, T* w, T* work, int work_size, int* ints, int ints_size,   \
                    int* info) {                                                                                    \
    p##syevd_(job, "U", &n, a, &lda, w, work, &work_size, ints, &ints_size, info);                                  \
  }                                                                                                                 \
  inline int potrf(int n, T* a, int lda) {                                                                          \
    int info = 0;                                                                                                   \
    p##potrf_("U", &n, a, &lda, &info);                                                                             \
    return info;                                                                                                    \
  }                                                                                                                 \
  inline int potri(int n, T* a, int lda) {                                                                          \
    int info = 0;                                                                                                   \
    p##potri_("U", &n, a, &lda, &info);                                                                             \
    return info;                                                                                                    \
  }                                                                                                                 \
  inline void gemm(char ta, char tb, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb, T beta, \
                   T* c, int ldc) {                                                                                 \
    p##gemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);                                       \
  }
EFFKERN_LAPACK(float, s)
EFFKERN_LAPACK(double, d)
#undef EFFKERN_LAPACK

// Eigenvalues, ascending, and eigenvectors of symmetric matrices of one size; keeps its memory from one to the next.
template <typename T>
class SymmetricEigen {
 public:
  explicit SymmetricEigen(int n) : n_(n), values_(n) {
    T size = 0;
    int ints = 0, info = 0;
    syevd("V", n, nullptr, std::max(1, n), values_.data(), &size, -1, &ints, -1, &info);
    work_.resize(static_cast<size_t>(size) + 1);
    ints_.resize(ints);
  }

  // `a` [n, n], rows `lda` apart, of which the lower triangle (row by row) counts; row k becomes eigenvector k. Returns
  // LAPACK's info: not 0 where the iteration failed.
  int operator()(T* a, int lda) {
    int info = 0;
    syevd("V", n_, a, lda, values_.data(), work_.data(), static_cast<int>(work_.size()), ints_.data(),
          static_cast<int>(ints_.size()), &info);
    return info;
  }
  const T* values() const { return values_.data(); }

 private:
  int n_;
  std::vector<T> values_, work_;
  std::vector<int> ints_;
};

}  // namespace effkern::lapack
