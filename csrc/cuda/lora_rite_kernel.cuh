// r x r work of LoRA-RITE: one block per factor, float64, matrices of the Jacobi method in shared memory.
//
// Formulas are those of effkern/ops/lora_rite/plain.py. Factors 2 p and 2 p + 1 are a pair; the moments of factor f are
// in the basis of f ^ 1. A block writes state of its own factor alone, or of the other's basis, which only it reads.
#pragma once

#include "cuda/jacobi_block.cuh"

namespace effkern {

constexpr int64_t kRiteSharedBytes = 160 << 10;
constexpr int kRiteMaxThreads = 256;
// As terms.EQUILIBRATED.
constexpr double kEquilibrated = 1e-5;

inline int rite_threads(int n) { return n <= 8 ? 32 : n <= 16 ? 64 : n <= 32 ? 128 : kRiteMaxThreads; }
inline bool rite_needs_scratch(int n) { return 2 * jacobi_elements(n) * 8 > kRiteSharedBytes; }
inline int64_t rite_shared_bytes(int n) { return jacobi_elements(n) * 8 * (rite_needs_scratch(n) ? 1 : 2); }

struct RiteBlock {
  double *a, *v;
  int n, stride, thread, num_threads;

  __device__ RiteBlock(double* dynamic, double* scratch, int n)
      : a(dynamic),
        v(scratch == nullptr ? dynamic + jacobi_elements(n) : scratch + blockIdx.x * jacobi_elements(n)),
        n(n),
        stride(jacobi_stride(n)),
        thread(static_cast<int>(threadIdx.x)),
        num_threads(static_cast<int>(blockDim.x)) {}

  // Calls f(row, column) for the block's elements of an n x n matrix. Not unrolled: a root or a quotient is a call,
  // around which values that are alive would go to the stack.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll 1
    for (int i = thread; i < n * n; i += num_threads) f(i / n, i % n);
  }

  // The same sum, in the same order, in every thread; `partial` has one place per thread, for one call.
  __device__ double total(double own, double* partial) const {
    partial[thread] = own;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < num_threads; ++i) sum += partial[i];
    return sum;
  }

  __device__ double largest_diagonal() const {
    double largest = 0;
    for (int k = 0; k < n; ++k) largest = fmax(largest, a[k * stride + k]);
    return largest;
  }
};

__device__ __forceinline__ bool finite(double x) { return x - x == 0; }
// By squares: a call of pow() would cost a stack.
__device__ __forceinline__ double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}
__device__ __forceinline__ double rite_decay(double beta, int64_t t) {
  return beta * (1 - power(beta, t - 1)) / (1 - power(beta, t));
}

// Sums of tiles, in order: [F, width] from [tiles, width], those of factor f in [first[f], first[f + 1]); and the trace
// of a leading r x r matrix, 0 where it is above skip_rms^2 rows r.
struct ReduceArgs {
  const double* partial;
  const int64_t* first;
  const double* rows;
  double *sums, *traces;
  int64_t width;
  int n;
  double skip_rms;
};

__global__ void __launch_bounds__(kRiteMaxThreads) lora_rite_reduce_kernel(ReduceArgs args) {
  const int64_t f = blockIdx.x;
  double* const out = args.sums + f * args.width;
  for (int64_t i = threadIdx.x; i < args.width; i += blockDim.x) {
    double sum = 0;
    for (int64_t t = args.first[f]; t < args.first[f + 1]; ++t) sum += args.partial[t * args.width + i];
    out[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double trace = 0;
  for (int k = 0; k < args.n; ++k) trace += out[k * args.n + k];
  const bool large = args.skip_rms > 0 && trace > args.skip_rms * args.skip_rms * args.rows[f] * args.n;
  args.traces[f] = large && finite(trace) ? 0.0 : trace;
}

struct RiteTerms {
  double beta1, beta2, eps, weight_decay, clip, skip_rms;
  bool relative_eps, escaped_mass, sum_second;
};

struct PreconditionArgs {
  const double *grams, *traces, *rows, *lr, *grad_scale;
  double *whiten, *second;
  const double* transport;
  double* escaped;
  int64_t* steps;
  double *gate, *carry, *take, *apply, *shrink, *scratch;
  int64_t num_traces;
  int n;
  RiteTerms terms;
};

struct RiteMemory {
  JacobiMemory<double> jacobi;
  double partial[kRiteMaxThreads];
  double share, b1, keep, add, mass;
  double before[kJacobiMaxOrder], values[kJacobiMaxOrder], sorted[2][kJacobiMaxOrder];
};

// a = P diag(values) P^T.
__device__ __forceinline__ void carry_second(const RiteBlock& block, const double* p, const double* values) {
  block.each([&](int i, int j) {
    if (j > i) return;
    double sum = 0;
    for (int k = 0; k < block.n; ++k) sum += p[i * block.n + k] * values[k] * p[j * block.n + k];
    block.a[i * block.stride + j] = block.a[j * block.stride + i] = sum;
  });
  __syncthreads();
}

__device__ __forceinline__ void sort_ascending(const RiteBlock& block, const double* x, double* sorted) {
  for (int k = block.thread; k < block.n; k += block.num_threads) {
    int place = 0;
    for (int j = 0; j < block.n; ++j) place += x[j] < x[k] || (x[j] == x[k] && j < k);
    sorted[place] = x[k];
  }
}

// What the transport has lost, with the eigenvalues of P V P^T on a's diagonal: the largest drop of a sorted one, at most
// that of the trace.
__device__ __forceinline__ double escaped_now(const RiteBlock& block, RiteMemory& memory) {
  for (int k = block.thread; k < block.n; k += block.num_threads) memory.values[k] = block.a[k * block.stride + k];
  __syncthreads();
  sort_ascending(block, memory.before, memory.sorted[0]);
  sort_ascending(block, memory.values, memory.sorted[1]);
  __syncthreads();
  double drop = 0, trace_drop = 0;
  for (int k = 0; k < block.n; ++k) {
    drop = fmax(drop, memory.sorted[0][k] - memory.sorted[1][k]);
    trace_drop += memory.sorted[0][k] - memory.sorted[1][k];
  }
  __syncthreads();
  return fmin(drop, fmax(0.0, trace_drop));
}

__global__ void __launch_bounds__(kRiteMaxThreads, 1) lora_rite_precondition_kernel(PreconditionArgs args) {
  EFFKERN_SHARED(RiteMemory, shared, 1);
  EFFKERN_DYNAMIC_SHARED(double, dynamic);
  RiteMemory& memory = *shared;
  const RiteTerms& terms = args.terms;
  const RiteBlock block(dynamic, args.scratch, args.n);
  const int64_t square = int64_t{args.n} * args.n;
  const int n = args.n, thread = block.thread;
  const int f = static_cast<int>(blockIdx.x);
  double norm = 0;
  for (int64_t i = thread; i < args.num_traces; i += block.num_threads) norm += args.traces[i];
  norm = block.total(norm, memory.partial);
  if (f == 0 && thread == 0) *args.gate = norm;
  if (!finite(norm)) return;
  norm = sqrt(norm);

  if (thread == 0) {
    double own = 0;
    for (int k = 0; k < n; ++k) own += args.grams[f * square + k * n + k];
    const bool large = terms.skip_rms > 0 && own > terms.skip_rms * terms.skip_rms * args.rows[f] * n;
    // In shared memory, so that no register holds them through the Jacobi method.
    const int64_t t = args.steps[f] + 1;
    const double clip = terms.clip > 0 && norm > terms.clip ? terms.clip / norm : 1.0;
    const double share = own == 0 || large ? 0.0 : clip, b2 = rite_decay(terms.beta2, t);
    memory.share = share;
    memory.b1 = rite_decay(terms.beta1, t);
    memory.keep = terms.sum_second ? 1.0 : b2;
    memory.add = share * share * (terms.sum_second ? 1.0 : (1 - b2) / args.rows[f]);
    memory.mass = args.escaped[f];
  }
  for (int k = thread; k < n; k += block.num_threads) memory.before[k] = args.second[f * n + k];
  __syncthreads();
  // One copy of the Jacobi method's code for both uses; the first is of the carried moment alone.
  for (int pass = terms.escaped_mass ? 0 : 1; pass < 2; ++pass) {
    carry_second(block, args.transport + (f ^ 1) * square, memory.before);
    if (pass == 1) {
      const double* const gram = args.grams + f * square;
      block.each([&](int i, int j) {
        double& x = block.a[i * block.stride + j];
        x = memory.keep * x + memory.add * 0.5 * (gram[i * n + j] + gram[j * n + i]);
      });
      __syncthreads();
    }
    const double least = 1e-32 * block.largest_diagonal();
    __syncthreads();
    jacobi_block(block.a, block.v, n, least, memory.jacobi);
    if (pass == 0) {
      const double drop = escaped_now(block, memory);
      if (thread == 0) memory.mass = (memory.mass + drop) * memory.keep;
    }
  }
  for (int k = thread; k < n; k += block.num_threads) memory.values[k] = fmax(0.0, block.a[k * block.stride + k]);
  __syncthreads();
  double largest = 0;
  for (int k = 0; k < n; ++k) largest = fmax(largest, memory.values[k]);
  largest = sqrt(largest + memory.mass);
  const double unscale = args.grad_scale == nullptr ? 1.0 : *args.grad_scale;
  // Once per column, before the loops over elements: a root and a quotient are calls.
  double* const factors = memory.partial;
#pragma unroll 1
  for (int j = thread; j < n; j += block.num_threads) {
    const double root = sqrt(memory.values[j] + memory.mass);
    const double bottom = root + (terms.relative_eps ? terms.eps * largest : terms.eps);
    factors[j] = bottom > 0 ? memory.share * unscale * (1 - memory.b1) / bottom : 0.0;
  }
  // a <- whiten E: its eigenvalues are in `values`. Row j of v is column j of E.
  const int64_t at = f * square;
  double* const w = args.whiten + (f ^ 1) * square;
  const double* const p = args.transport + (f ^ 1) * square;
  block.each([&](int i, int j) {
    double turned = 0, carried = 0;
    for (int k = 0; k < n; ++k) {
      turned += w[i * n + k] * block.v[j * block.stride + k];
      carried += p[k * n + i] * block.v[j * block.stride + k];
    }
    block.a[i * block.stride + j] = turned;
    args.carry[at + i * n + j] = memory.b1 * carried;
  });
  __syncthreads();
  const double rate = args.lr[f];
  block.each([&](int i, int j) {
    const double turned = block.a[i * block.stride + j];
    args.take[at + i * n + j] = turned * factors[j];
    args.apply[at + j * n + i] = rate * turned;
    w[i * n + j] = turned;
  });
  for (int k = thread; k < n; k += block.num_threads) args.second[f * n + k] = memory.values[k];
  if (thread == 0) {
    args.shrink[f] = 1 - rate * terms.weight_decay;
    args.escaped[f] = memory.mass;
    args.steps[f] += 1;
  }
}

inline void launch_rite_precondition(const PreconditionArgs& args, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  EFFKERN_ALLOW_SHARED(lora_rite_precondition_kernel, rite_shared_bytes(args.n));
  EFFKERN_LAUNCH(lora_rite_precondition_kernel, static_cast<unsigned>(count),
                 static_cast<unsigned>(rite_threads(args.n)), static_cast<size_t>(rite_shared_bytes(args.n)), stream,
                 args);
}

inline void launch_rite_reduce(const ReduceArgs& args, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  EFFKERN_LAUNCH(lora_rite_reduce_kernel, static_cast<unsigned>(count), kRiteMaxThreads, 0, stream, args);
}

}  // namespace effkern
