// Jacobi's method on one symmetric matrix by one block, the rotations of n / 2 disjoint pairs at once.
//
// Pairs are those of a round-robin tournament: n - 1 rounds are a sweep. A thread of a round owns the 2 x 2 elements
// where the rows of one pair meet the columns of another, and turns them from both sides: one barrier between finding the
// rotations and applying them. Formulas and stopping rule are those of csrc/cpu/jacobi_lanes.h.
#pragma once

#include <math.h>

#include "cuda/launch.h"

namespace effkern {

constexpr int kJacobiMaxOrder = 128;
constexpr int kJacobiMaxSweeps = 40;

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kEps = 5.9604645e-8f;
};
template <>
struct Limits<double> {
  static constexpr double kEps = 1.1102230246251565e-16;
};

// Rows are an odd number of elements apart: columns then meet different banks.
__host__ __device__ inline int jacobi_stride(int n) { return n | 1; }
__host__ __device__ inline int64_t jacobi_elements(int n) { return int64_t{n} * jacobi_stride(n); }

// Shared memory of a block beside the matrices.
template <typename T>
struct JacobiMemory {
  T t[kJacobiMaxOrder / 2], h[kJacobiMaxOrder / 2], s[kJacobiMaxOrder / 2];
  int p[kJacobiMaxOrder / 2], q[kJacobiMaxOrder / 2];
  int rotated[2];
};

template <typename T>
__device__ __forceinline__ void turn(T& x, T& y, T h, T s) {
  const T p = x, q = y;
  x = p - s * (q + h * p);
  y = q + s * (p - h * q);
}

// a [n, n], full and symmetric, becomes diagonal; row k of v, from the identity, its eigenvector. `least`: magnitude at
// or below which an element counts as zero. Called by all threads; ends with a barrier. False: not converged.
template <typename T>
__device__ __forceinline__ bool jacobi_block(T* a, T* v, int n, T least, JacobiMemory<T>& memory) {
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  const int stride = jacobi_stride(n), players = n + (n & 1), half = players / 2;
  for (int i = thread; i < n * n; i += num_threads) v[i / n * stride + i % n] = i / n == i % n ? T(1) : T(0);
  if (thread < 2) memory.rotated[thread] = 0;
  __syncthreads();
  bool converged = n < 2;
  for (int sweep = 0; sweep < kJacobiMaxSweeps && !converged; ++sweep) {
    for (int round = 0; round + 1 < players; ++round) {
#pragma unroll 1
      for (int k = thread; k < half; k += num_threads) {
        // Place 0 stays, the others move on by one each round.
        const int x = k == 0 ? 0 : 1 + (k - 1 + round) % (players - 1);
        const int y = 1 + (players - 2 - k + round) % (players - 1);
        const int p = min(x, y), q = max(x, y);
        T t = 0, h = 0, s = 0;
        if (q < n) {
          const T off = a[p * stride + q], app = a[p * stride + p], aqq = a[q * stride + q];
          const T small = Limits<T>::kEps * sqrt(fabs(app)) * sqrt(fabs(aqq));
          if (fabs(off) > small && fabs(off) > least) {
            const T tau = (aqq - app) / (2 * off);
            t = copysign(1 / (fabs(tau) + sqrt(1 + tau * tau)), tau);
            const T c = 1 / sqrt(1 + t * t);
            s = t * c;
            h = s / (1 + c);
            atomicExch(&memory.rotated[sweep & 1], 1);
          }
        }
        memory.p[k] = p, memory.q[k] = q, memory.t[k] = t, memory.h[k] = h, memory.s[k] = s;
      }
      __syncthreads();
      // The flag of the next sweep: nobody reads or writes it in this one.
      if (thread == 0 && round == 0) atomicExch(&memory.rotated[(sweep + 1) & 1], 0);
      for (int i = thread; i < half * half; i += num_threads) {
        const int k = i / half, l = i % half;
        if (k > l) continue;
        const int pk = memory.p[k], qk = memory.q[k], pl = memory.p[l], ql = memory.q[l];
        if (k == l) {
          const T t = memory.t[k];
          if (t != 0) {
            const T off = a[pk * stride + qk];
            a[pk * stride + pk] -= t * off;
            a[qk * stride + qk] += t * off;
            a[pk * stride + qk] = a[qk * stride + pk] = 0;
          }
          continue;
        }
        const T hk = memory.h[k], sk = memory.s[k], hl = memory.h[l], sl = memory.s[l];
        if (sk == 0 && sl == 0) continue;
        // The pair with the player too many has no second row.
        const bool has_k = qk < n, has_l = ql < n;
        T x00 = a[pk * stride + pl], x01 = has_l ? a[pk * stride + ql] : T(0);
        T x10 = has_k ? a[qk * stride + pl] : T(0), x11 = has_k && has_l ? a[qk * stride + ql] : T(0);
        turn(x00, x10, hk, sk);
        turn(x01, x11, hk, sk);
        turn(x00, x01, hl, sl);
        turn(x10, x11, hl, sl);
        a[pk * stride + pl] = a[pl * stride + pk] = x00;
        if (has_l) a[pk * stride + ql] = a[ql * stride + pk] = x01;
        if (has_k) a[qk * stride + pl] = a[pl * stride + qk] = x10;
        if (has_k && has_l) a[qk * stride + ql] = a[ql * stride + qk] = x11;
      }
      for (int i = thread; i < half * n; i += num_threads) {
        const int k = i / n, j = i % n;
        if (memory.s[k] != 0) turn(v[memory.p[k] * stride + j], v[memory.q[k] * stride + j], memory.h[k], memory.s[k]);
      }
      __syncthreads();
    }
    converged = atomicAdd(&memory.rotated[sweep & 1], 0) == 0;
    // Nobody may start the next sweep, and set a flag, before all have read this one.
    __syncthreads();
  }
  return converged;
}

}  // namespace effkern
