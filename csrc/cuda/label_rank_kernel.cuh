// label_rank: log-sum-exp of a row and the rank of its label, one block per row, one pass over the logits.
//
// z_y is gathered first, so that counting needs no second pass. Each thread keeps (max, sum, count) of what it has
// seen; threads are merged by shuffles inside a warp and through shared memory between warps.
#pragma once

#include "cuda/launch.h"
#include "cuda/numeric.cuh"

namespace effkern {

template <typename T>
struct LabelRankArgs {
  const T* logits;
  int64_t row_stride;
  const int64_t* labels;
  float* loss;
  float* lse;
  float* label_logit;
  int64_t* rank;
  int64_t num_rows;
  int vocab;
  int64_t ignore_index;
};

// sum = sum of exp(z - origin(max)) over the logits seen. NaN logits never become max, and stay in sum.
struct RowState {
  float max;
  float sum;
  int greater;

  // Infinite maxima must not be subtracted: inf - inf is NaN.
  __device__ __forceinline__ static float origin(float max) { return fabsf(max) == INFINITY ? 0.0f : max; }
};

template <typename T, int kCount>
__device__ __forceinline__ void absorb(RowState& state, const T (&logits)[kCount], float label_logit) {
  float z[kCount];
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    z[i] = widen(logits[i]);
    max = fmaxf(max, z[i]);
  }
  if (max > state.max) {
    state.sum *= fast_exp(state.max - max);
    state.max = max;
  }
  const float origin = RowState::origin(state.max);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    state.sum += fast_exp(z[i] - origin);
    state.greater += z[i] > label_logit;
  }
}

__device__ __forceinline__ RowState merge(const RowState& a, const RowState& b) {
  const float max = fmaxf(a.max, b.max);
  const float scale_a = a.max == max ? 1.0f : fast_exp(a.max - max);
  const float scale_b = b.max == max ? 1.0f : fast_exp(b.max - max);
  return {max, a.sum * scale_a + b.sum * scale_b, a.greater + b.greater};
}

__device__ __forceinline__ RowState merge_lanes(RowState state) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const RowState other{__shfl_xor_sync(0xffffffffu, state.max, lanes), __shfl_xor_sync(0xffffffffu, state.sum, lanes),
                         __shfl_xor_sync(0xffffffffu, state.greater, lanes)};
    state = merge(state, other);
  }
  return state;
}

// The thread's share of a row. Rows may start at any element: up to 16-byte alignment, and after the last whole
// vector, elements are read one by one.
template <typename T>
__device__ __forceinline__ RowState scan_row(const T* row, int vocab, float label_logit) {
  using Vec = Vec16<T>;
  constexpr int kUnroll = 2;
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);

  RowState state{-INFINITY, 0.0f, 0};
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Vec) / sizeof(T));
  const int head = min(misaligned == 0 ? 0 : Vec::kSize - misaligned, vocab);
  const int num_vecs = (vocab - head) / Vec::kSize;
  const Vec* vecs = reinterpret_cast<const Vec*>(row + head);

  // Both loads are issued before the first is used: bytes in flight are what the memory bandwidth needs.
  int v = thread;
  for (; v < num_vecs - num_threads * (kUnroll - 1); v += num_threads * kUnroll) {
    Vec loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = vecs[v + u * num_threads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) absorb(state, loaded[u].at, label_logit);
  }
  for (; v < num_vecs; v += num_threads) {
    const Vec loaded = vecs[v];
    absorb(state, loaded.at, label_logit);
  }

  // Head and tail together hold fewer than two vectors.
  const int tail = head + num_vecs * Vec::kSize;
  for (int i = thread; i < head + vocab - tail; i += num_threads) {
    const T logit[1] = {row[i < head ? i : tail + i - head]};
    absorb(state, logit, label_logit);
  }
  return state;
}

constexpr int kLabelRankMaxThreads = 512;

template <typename T>
__global__ void __launch_bounds__(kLabelRankMaxThreads) label_rank_kernel(LabelRankArgs<T> args) {
  EFFKERN_SHARED(RowState, warp_state, kLabelRankMaxThreads / 32);
  const int64_t r = blockIdx.x;
  const int64_t label = args.labels[r];
  if (label == args.ignore_index) {
    if (threadIdx.x == 0) {
      args.loss[r] = args.lse[r] = args.label_logit[r] = 0.0f;
      args.rank[r] = -1;
    }
    return;
  }

  const T* row = args.logits + r * args.row_stride;
  const bool outside = label < 0 || label >= args.vocab;
  // NaN makes the loss NaN and compares as no rank at all.
  const float label_logit = outside ? NAN : widen(row[label]);
  RowState state = merge_lanes(scan_row(row, args.vocab, label_logit));

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  if (lane == 0) warp_state[warp] = state;
  __syncthreads();
  if (warp != 0) return;

  const int num_warps = static_cast<int>(blockDim.x) / 32;
  state = merge_lanes(lane < num_warps ? warp_state[lane] : RowState{-INFINITY, 0.0f, 0});
  if (lane == 0) {
    const float origin = RowState::origin(state.max), log_sum = logf(state.sum);
    args.lse[r] = origin + log_sum;
    args.label_logit[r] = label_logit;
    // Not lse - z_y: around large logits the rounding of lse would stay in the loss.
    args.loss[r] = (origin - label_logit) + log_sum;
    args.rank[r] = outside ? -1 : state.greater;
  }
}

// Enough threads for two vectors each, so that short rows do not pay for idle warps.
template <typename T>
int label_rank_threads(int vocab) {
  int threads = 32;
  while (threads < kLabelRankMaxThreads && threads * 2 * Vec16<T>::kSize < vocab) threads *= 2;
  return threads;
}

template <typename T>
void launch_label_rank(const LabelRankArgs<T>& args, int threads, cudaStream_t stream) {
  if (args.num_rows == 0) return;
  EFFKERN_LAUNCH(label_rank_kernel<T>, static_cast<unsigned>(args.num_rows), static_cast<unsigned>(threads), 0, stream,
                 args);
}

}  // namespace effkern
