// whiten and transport of each factor after its update; see plain.rebase_. One block per factor.
#pragma once

#include "cuda/lora_rite_kernel.cuh"

namespace effkern {

// Factor f's products are the sums of terms [first[f], first[f + 1]), or term f where first is null; terms of each of
// the three are `step` elements apart.
struct RebaseArgs {
  const double *grams, *crosses, *sizes;
  const int64_t* first;
  int64_t gram_step, cross_step, size_step;
  const double* gate;
  double *whiten, *transport;
  int* exact;
  double* scratch;
  int n;
  bool single;
  double tolerance;
};

__device__ __forceinline__ double sum_terms(const double* terms, int64_t begin, int64_t end, int64_t step) {
  double sum = 0;
  for (int64_t t = begin; t < end; ++t) sum += terms[t * step];
  return sum;
}

// a <- (C + C^T) / 2. Ends with a barrier.
__device__ __forceinline__ void fill_gram(const RiteBlock& block, const RebaseArgs& args, int64_t begin, int64_t end) {
  block.each([&](int i, int j) {
    if (j > i) return;
    const double* const c = args.grams;
    const double x = 0.5 * (sum_terms(c + i * block.n + j, begin, end, args.gram_step) +
                            sum_terms(c + j * block.n + i, begin, end, args.gram_step));
    block.a[i * block.stride + j] = block.a[j * block.stride + i] = x;
  });
  __syncthreads();
}

// Upper triangle of a becomes U with U^T U = C; false if a pivot cannot be trusted. The same in every thread.
__device__ __forceinline__ bool cholesky_block(const RiteBlock& block, const double* diagonal) {
  const int n = block.n, stride = block.stride;
  for (int j = 0; j < n; ++j) {
    const double pivot = block.a[j * stride + j];
    // Nobody may scale the row before all have seen the pivot.
    __syncthreads();
    if (!(pivot > kEquilibrated * diagonal[j])) return false;
    const double inverse = 1 / sqrt(pivot);
    for (int k = j + block.thread; k < n; k += block.num_threads) block.a[j * stride + k] *= inverse;
    __syncthreads();
    const int rest = n - j - 1;
    for (int i = block.thread; i < rest * rest; i += block.num_threads) {
      const int row = j + 1 + i / rest, column = j + 1 + i % rest;
      if (column >= row) block.a[row * stride + column] -= block.a[j * stride + row] * block.a[j * stride + column];
    }
    __syncthreads();
  }
  return true;
}

// x <- U^-T x for a vector with elements `step` apart.
__device__ __forceinline__ void solve_column(const RiteBlock& block, double* x, int64_t step) {
  for (int j = 0; j < block.n; ++j) {
    double value = x[j * step];
    for (int k = 0; k < j; ++k) value -= block.a[k * block.stride + j] * x[k * step];
    x[j * step] = value / block.a[j * block.stride + j];
  }
}

__global__ void __launch_bounds__(kRiteMaxThreads) lora_rite_rebase_kernel(RebaseArgs args) {
  EFFKERN_SHARED(RiteMemory, shared, 1);
  EFFKERN_DYNAMIC_SHARED(double, dynamic);
  RiteMemory& memory = *shared;
  if (args.gate != nullptr && !finite(*args.gate)) return;
  const int64_t f = blockIdx.x, square = int64_t{args.n} * args.n;
  const int64_t begin = args.first == nullptr ? f : args.first[f], end = args.first == nullptr ? f + 1 : args.first[f + 1];
  const RiteBlock block(dynamic, args.scratch, args.n);
  const int n = args.n, stride = block.stride, thread = block.thread;
  double *const w = args.whiten + f * square, *const p = args.transport + f * square;
  const bool was_exact = args.exact[f] != 0;

  fill_gram(block, args, begin, end);
  double trace = 0;
  for (int k = 0; k < n; ++k) trace += block.a[k * stride + k];
  for (int k = thread; k < n; k += block.num_threads) memory.before[k] = block.a[k * stride + k];
  __syncthreads();
  if (!finite(trace)) return;
  block.each([&](int i, int j) { p[i * n + j] = sum_terms(args.crosses + i * n + j, begin, end, args.cross_step); });
  const double size = sum_terms(args.sizes, begin, end, args.size_step);
  __syncthreads();

  const bool full = !was_exact && cholesky_block(block, memory.before);
  bool kept_all = full;
  if (full) {
    // whiten^T <- U^-T whiten^T: rows of whiten are columns of its transpose. transport <- U^-T D.
    for (int c = thread; c < 2 * n; c += block.num_threads) {
      if (c < n && args.single)
        for (int j = 0; j < n; ++j) w[c * n + j] = static_cast<float>(w[c * n + j]);
      if (c < n) solve_column(block, w + c * n, 1);
      else solve_column(block, p + c - n, n);
    }
    __syncthreads();
  } else {
    fill_gram(block, args, begin, end);
    const double least = 1e-32 * block.largest_diagonal();
    __syncthreads();
    jacobi_block(block.a, block.v, n, least, memory.jacobi);
    const double cut = (was_exact ? args.tolerance * args.tolerance : kEquilibrated) * block.largest_diagonal();
    kept_all = true;
#pragma unroll 1
    for (int k = 0; k < n; ++k) {
      const double value = block.a[k * stride + k];
      kept_all = kept_all && value > cut;
      if (thread == 0) memory.values[k] = value > cut ? 1 / sqrt(value) : 0.0;
    }
    __syncthreads();
    // Row k of v becomes column k of Q Lambda^-1/2, and a its transpose times D.
    block.each([&](int k, int i) { block.v[k * stride + i] *= memory.values[k]; });
    __syncthreads();
    block.each([&](int k, int j) {
      double sum = 0;
      for (int i = 0; i < n; ++i) sum += block.v[k * stride + i] * p[i * n + j];
      block.a[k * stride + j] = sum;
    });
    __syncthreads();
    block.each([&](int k, int j) {
      double sum = block.a[k * stride + j];
      if (was_exact) {
        sum = 0;
        for (int i = 0; i < n; ++i) sum += block.a[k * stride + i] * w[i * n + j];
      }
      p[k * n + j] = sum;
    });
    __syncthreads();
    block.each([&](int i, int k) {
      double sum = block.v[k * stride + i];
      if (!was_exact) {
        sum = 0;
        for (int l = 0; l < n; ++l)
          sum += (args.single ? static_cast<double>(static_cast<float>(w[i * n + l])) : w[i * n + l]) *
                 block.v[k * stride + l];
      }
      block.a[i * stride + k] = sum;
    });
    __syncthreads();
    block.each([&](int i, int k) { w[i * n + k] = block.a[i * stride + k]; });
    __syncthreads();
  }
  double squares = 0;
  for (int i = thread; i < square; i += block.num_threads) squares += w[i] * w[i];
  squares = block.total(squares, memory.partial);
  const bool safe = size * squares * args.tolerance * args.tolerance < 1 && (full || (was_exact && kept_all));
  if (thread == 0) args.exact[f] = !safe;
}

inline void launch_rite_rebase(const RebaseArgs& args, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  EFFKERN_ALLOW_SHARED(lora_rite_rebase_kernel, rite_shared_bytes(args.n));
  EFFKERN_LAUNCH(lora_rite_rebase_kernel, static_cast<unsigned>(count), static_cast<unsigned>(rite_threads(args.n)),
                 static_cast<size_t>(rite_shared_bytes(args.n)), stream, args);
}

}  // namespace effkern
