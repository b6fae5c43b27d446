// The LAPACK and BLAS routines that libtorch brings, by their reference names; matrices lie column by column.
//
// Declared weak: a libtorch without one of them loads all the same, and available() and has_eigh() say so. MKL makes its
// bits depend on the threads that it takes: call these inside lapack::parallel_for, of lapack_parallel.h.
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
// MKL's own: threads for calls of this thread, 0 for as many as elsewhere; returns what it was.
int MKL_Set_Num_Threads_Local(int count) EFFKERN_WEAK;
}
#undef EFFKERN_WEAK

namespace effkern::lapack {

// While it lives, MKL runs on the calling thread. Libraries of another name do so inside a parallel region alone.
class OneThread {
 public:
  OneThread() : before_(MKL_Set_Num_Threads_Local != nullptr ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

inline bool available() {
  return ssyevd_ != nullptr && dsyevd_ != nullptr && spotrf_ != nullptr && dpotrf_ != nullptr && spotri_ != nullptr &&
         dpotri_ != nullptr && sgemm_ != nullptr && dgemm_ != nullptr;
}

inline bool has_eigh(float) { return ssyevd_ != nullptr; }
inline bool has_eigh(double) { return dsyevd_ != nullptr; }

// Where the library has no such routine.
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

// gemm: c = alpha op(a) op(b) + beta c.
#define EFFKERN_LAPACK(T, p)                                                                                        \
  inline void syevd(char triangle, int n, T* a, int lda, T* w, T* work, int work_size, int* ints, int ints_size,     \
                    int* info) {                                                                                    \
    p##syevd_("V", &triangle, &n, a, &lda, w, work, &work_size, ints, &ints_size, info);                            \
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
    if (p##gemm_ == nullptr) return plain_gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);                \
    p##gemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);                                       \
  }
EFFKERN_LAPACK(float, s)
EFFKERN_LAPACK(double, d)
#undef EFFKERN_LAPACK

// Eigenvalues, ascending, and eigenvectors of symmetric matrices of one size; keeps its memory from one to the next.
template <typename T>
class SymmetricEigen {
 public:
  // triangle: the one that counts, of matrices that lie column by column.
  explicit SymmetricEigen(int n, char triangle = 'U') : n_(n), triangle_(triangle), values_(n) {
    T asked = 0;
    int ints = 0, info = 0;
    syevd(triangle, n, nullptr, std::max(1, n), values_.data(), &asked, -1, &ints, -1, &info);
    work_.resize(work_size(n, static_cast<size_t>(asked)));
    ints_.resize(std::max(ints, 3 + 5 * n));
  }

  // `a` [n, n], rows `lda` apart, of which one triangle counts (row by row the lower one for 'U'); row k becomes
  // eigenvector k. Returns
  // LAPACK's info: not 0 where the iteration failed.
  int operator()(T* a, int lda) {
    int info = 0;
    syevd(triangle_, n_, a, lda, values_.data(), work_.data(), static_cast<int>(work_.size()), ints_.data(),
          static_cast<int>(ints_.size()), &info);
    return info;
  }
  const T* values() const { return values_.data(); }

  // At least what syevd's contract names: `asked` has come back as a float, which rounds it down for n > 4096.
  static size_t work_size(size_t n, size_t asked) { return std::max(asked, 1 + 6 * n + 2 * n * n); }

 private:
  int n_;
  char triangle_;
  std::vector<T> values_, work_;
  std::vector<int> ints_;
};

}  // namespace effkern::lapack
