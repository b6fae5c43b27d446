// Cyclic Jacobi on kCount matrices at once, one in each lane of a vector register.
//
// A rotation of rows and columns p and q makes a_pq zero:
//     tau = (a_qq - a_pp) / (2 a_pq),  t = sign(tau) / (|tau| + sqrt(1 + tau^2)),  c = 1 / sqrt(1 + t^2),  s = t c
//     x' = c x - s y = x - s (y + h x),  y' = s x + c y = y + s (x - h y),  h = s / (1 + c)
// The form with h has a rounding error in proportion to s: late rotations are small, and cost no orthogonality.
// Pairs are taken row by row, sweep after sweep, until no lane has an element with
//     |a_pq| > eps sqrt(|a_pp a_qq|)  and  |a_pq| > eps^2 |A|_max
// The first test keeps small eigenvalues of graded positive matrices, the second ends it where a diagonal is zero. A lane
// that is done rotates no more: its bits depend on its own matrix alone. Only the upper triangle is kept.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/clones.h"

namespace effkern {
namespace jacobi {

constexpr int kMaxSweeps = 40;

template <typename T>
constexpr int kLanesOf = 64 / sizeof(T);

// a [n, n, lanes], upper triangle; v [n, n, lanes], row k becomes eigenvector k. rotated: sum over the last sweep.
template <typename T>
struct Lanes {
  static constexpr int kCount = kLanesOf<T>;
  T* a;
  T* v;
  int64_t n;

  EFFKERN_INLINE T* at(int64_t i, int64_t j) const { return a + (i * n + j) * kCount; }
};

template <typename T>
EFFKERN_INLINE void rotate(T* __restrict__ x, T* __restrict__ y, const T* __restrict__ h, const T* __restrict__ s) {
  constexpr int kCount = kLanesOf<T>;
#pragma GCC ivdep
  for (int l = 0; l < kCount; ++l) {
    const T p = x[l], q = y[l];
    x[l] = p - s[l] * (q + h[l] * p);
    y[l] = q + s[l] * (p - h[l] * q);
  }
}

// Returns whether any lane rotates.
template <typename T>
EFFKERN_INLINE bool rotation(const T* __restrict__ diagonal_p, const T* __restrict__ diagonal_q,
                             const T* __restrict__ off, const T* __restrict__ least, T* __restrict__ t,
                             T* __restrict__ h, T* __restrict__ s) {
  constexpr int kCount = kLanesOf<T>;
  constexpr T kEps = std::numeric_limits<T>::epsilon() / 2;
  T rotates[kCount];
#pragma GCC ivdep
  for (int l = 0; l < kCount; ++l) {
    const T p = diagonal_p[l], q = diagonal_q[l], x = off[l], size = std::fabs(x);
    // Roots first: the product of two small diagonals may underflow.
    const T small = kEps * std::sqrt(std::fabs(p)) * std::sqrt(std::fabs(q));
    const bool keep = size <= small || size <= least[l];
    const T tau = (q - p) / (2 * (keep ? T(1) : x)), magnitude = std::fabs(tau);
    const T tangent = std::copysign(1 / (magnitude + std::sqrt(1 + tau * tau)), tau);
    t[l] = keep ? T(0) : tangent;
    const T c = 1 / std::sqrt(1 + t[l] * t[l]);
    s[l] = t[l] * c;
    h[l] = s[l] / (1 + c);
    rotates[l] = keep ? T(0) : T(1);
  }
  T any = 0;
  for (int l = 0; l < kCount; ++l) any += rotates[l];
  return any != 0;
}

// Until all lanes are done or for kMaxSweeps; returns whether they are done.
template <typename T>
EFFKERN_INLINE bool diagonalise(const Lanes<T>& x, const T* least) {
  constexpr int kCount = kLanesOf<T>;
  alignas(64) T t[kCount], h[kCount], s[kCount];
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool rotated = false;
    for (int64_t p = 0; p + 1 < x.n; ++p) {
      for (int64_t q = p + 1; q < x.n; ++q) {
        T* const off = x.at(p, q);
        T* const diagonal_p = x.at(p, p);
        T* const diagonal_q = x.at(q, q);
        if (!rotation<T>(diagonal_p, diagonal_q, off, least, t, h, s)) continue;
        rotated = true;
#pragma GCC ivdep
        for (int l = 0; l < kCount; ++l) {
          diagonal_p[l] -= t[l] * off[l];
          diagonal_q[l] += t[l] * off[l];
          off[l] = t[l] == 0 ? off[l] : T(0);
        }
        for (int64_t i = 0; i < p; ++i) rotate<T>(x.at(i, p), x.at(i, q), h, s);
        for (int64_t i = p + 1; i < q; ++i) rotate<T>(x.at(p, i), x.at(i, q), h, s);
        for (int64_t i = q + 1; i < x.n; ++i) rotate<T>(x.at(p, i), x.at(q, i), h, s);
        T* vp = x.v + p * x.n * kCount;
        T* vq = x.v + q * x.n * kCount;
        for (int64_t i = 0; i < x.n; ++i, vp += kCount, vq += kCount) rotate<T>(vp, vq, h, s);
      }
    }
    if (!rotated) return true;
  }
  return false;
}

}  // namespace jacobi
}  // namespace effkern
