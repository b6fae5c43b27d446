// batched_eigh: one block per matrix, Jacobi's method in shared memory.
#pragma once

#include "cuda/jacobi_block.cuh"

namespace effkern {

template <typename T>
struct EighArgs {
  const T* matrices;
  T* values;
  T* vectors;
  int* status;
  // [count, n, stride], for eigenvectors that do not fit in shared memory beside the matrix; else null.
  T* scratch;
  int64_t count;
  int n;
};

// What every device has: 163 KiB from compute capability 8.0 on.
constexpr int64_t kEighSharedBytes = 160 << 10;
constexpr int kEighMaxThreads = 256;

template <typename T>
bool eigh_needs_scratch(int n) {
  return 2 * jacobi_elements(n) * static_cast<int64_t>(sizeof(T)) > kEighSharedBytes;
}

inline int eigh_threads(int n) { return n <= 16 ? 32 : n <= 32 ? 128 : kEighMaxThreads; }

template <typename T>
__global__ void __launch_bounds__(kEighMaxThreads) batched_eigh_kernel(EighArgs<T> args) {
  EFFKERN_SHARED(JacobiMemory<T>, memory, 1);
  EFFKERN_SHARED(T, partial, kEighMaxThreads);
  EFFKERN_DYNAMIC_SHARED(T, dynamic);
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x), n = args.n;
  const int stride = jacobi_stride(n);
  const int64_t b = blockIdx.x;
  const T* matrix = args.matrices + b * n * n;
  T* const a = dynamic;
  T* const v = args.scratch == nullptr ? dynamic + jacobi_elements(n) : args.scratch + b * jacobi_elements(n);

  T largest = 0, poison = 0;
  for (int i = thread; i < n * n; i += num_threads) {
    const int row = i / n, column = i % n;
    if (column > row) continue;
    const T x = matrix[i];
    a[row * stride + column] = a[column * stride + row] = x;
    largest = fmax(largest, fabs(x));
    poison += x * 0;
  }
  partial[thread] = largest + poison;
  __syncthreads();
  largest = 0, poison = 0;
  for (int i = 0; i < num_threads; ++i) {
    largest = fmax(largest, partial[i]);
    poison += partial[i] * 0;
  }
  T* const values = args.values + b * n;
  T* const vectors = args.vectors + b * n * n;
  if (!(largest + poison <= largest)) {
    for (int i = thread; i < n * n; i += num_threads) vectors[i] = NAN;
    for (int i = thread; i < n; i += num_threads) values[i] = NAN;
    if (thread == 0) args.status[b] = 1;
    return;
  }
  int exponent = 0;
  if (largest > 0) frexp(largest, &exponent);
  for (int i = thread; i < n * n; i += num_threads) {
    T& x = a[i / n * stride + i % n];
    x = ldexp(x, -exponent);
  }
  const T eps = 2 * Limits<T>::kEps;
  const bool converged = jacobi_block(a, v, n, largest > 0 ? eps * eps : T(0), *memory);
  for (int k = thread; k < n; k += num_threads) {
    // Place in ascending order, ties by number.
    const T value = a[k * stride + k];
    int place = 0;
    for (int j = 0; j < n; ++j) {
      const T other = a[j * stride + j];
      place += other < value || (other == value && j < k);
    }
    values[place] = ldexp(value, exponent);
    for (int i = 0; i < n; ++i) vectors[i * n + place] = v[k * stride + i];
  }
  if (thread == 0) args.status[b] = converged ? 0 : 2;
}

template <typename T>
void launch_batched_eigh(const EighArgs<T>& args, cudaStream_t stream) {
  if (args.count == 0 || args.n == 0) return;
  const int64_t bytes = jacobi_elements(args.n) * static_cast<int64_t>(sizeof(T)) * (args.scratch ? 1 : 2);
  EFFKERN_ALLOW_SHARED(batched_eigh_kernel<T>, bytes);
  EFFKERN_LAUNCH(batched_eigh_kernel<T>, static_cast<unsigned>(args.count),
                 static_cast<unsigned>(eigh_threads(args.n)), static_cast<size_t>(bytes), stream, args);
}

}  // namespace effkern
