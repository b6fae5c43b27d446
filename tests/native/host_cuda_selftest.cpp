// The host build itself (csrc/cuda/host_cuda.h): what each CUDA construct computes, and which races are seen.
//
//   host_cuda_selftest values            every construct against what CUDA defines; exit status 0
//   host_cuda_selftest race-global       two blocks write one address: the thread sanitizer must report it
//   host_cuda_selftest race-warp         lanes trade shared memory without a barrier: likewise
//   host_cuda_selftest race-read         a thread reads shared memory that the last barrier does not cover: likewise
//   host_cuda_selftest absent-lane       a shuffle from a lane that has ended must abort
#define EFFKERN_HOST_CUDA
#include "cuda/numeric.cuh"

#include <string>

namespace {

constexpr unsigned kFull = 0xffffffffu;
std::atomic<int> num_wrong = 0;

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s (thread %u, block %u)\n", what, threadIdx.x, blockIdx.x);
  ++num_wrong;
}

// 64 x 1 threads, 3 x 2 blocks, 64 ints of dynamic shared memory.
__global__ void values_kernel(int* sum, float* total, int* largest) {
  EFFKERN_SHARED(int, reversed, 64);
  EFFKERN_SHARED(double, other, 2);
  EFFKERN_DYNAMIC_SHARED(int, tile);
  const unsigned t = threadIdx.x, lane = t % 32;
  expect(gridDim.x == 3 && gridDim.y == 2 && blockDim.x == 64 && blockIdx.x < 3 && blockIdx.y < 2, "indices");
  expect(t != 0 || std::isnan(other[1]), "fresh shared memory is NaN in every block");
  __syncthreads();

  reversed[63 - t] = static_cast<int>(t);
  tile[t] = static_cast<int>(t * t);
  if (t < 2) other[t] = t;
  __syncthreads();
  const int back = static_cast<int>(63 - t);
  expect(reversed[t] == back && tile[back] == back * back, "shared memory");
  expect(other[1] == 1.0, "two arrays do not overlap");

  expect(__shfl_sync(kFull, t, 5) == t - lane + 5, "shfl");
  expect(__shfl_xor_sync(kFull, 1.5 * t, 16) == 1.5 * (t ^ 16), "shfl_xor of double");
  expect(__shfl_down_sync(kFull, t, 3) == (lane + 3 < 32 ? t + 3 : t), "shfl_down");
  expect(__shfl_up_sync(kFull, t, 3) == (lane >= 3 ? t - 3 : t), "shfl_up");
  expect(__ballot_sync(kFull, lane % 4 == 0) == 0x11111111u, "ballot");
  expect(__any_sync(kFull, lane == 9) && !__any_sync(kFull, false), "any");
  expect(__all_sync(kFull, true) && !__all_sync(kFull, lane != 9), "all");
  __syncwarp();

  atomicAdd(sum, 1);
  atomicAdd(total, 0.5f);
  atomicMax(largest, static_cast<int>(blockIdx.x * 100 + t));
  if (t >= 32) return;
  // The second warp has ended: the barrier waits for the first alone.
  __syncthreads();
  expect(__popc(0xf0f0u) == 8 && __ffs(8) == 4 && __ffs(0) == 0, "bit operations");
}

__global__ void exchange_kernel(int* word) {
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    expect(atomicExch(word, 7) == 5 && atomicCAS(word, 7, 9) == 7 && atomicCAS(word, 7, 1) == 9, "exch and cas");
    __threadfence();
  }
}

__global__ void race_global_kernel(int* word) {
  if (threadIdx.x == 0) *word = static_cast<int>(blockIdx.x);
}

__global__ void race_warp_kernel(int* out) {
  EFFKERN_SHARED(int, traded, 32);
  traded[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = traded[threadIdx.x ^ 1];
}

__global__ void race_read_kernel(int* out) {
  EFFKERN_SHARED(int, traded, 64);
  traded[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = traded[threadIdx.x ^ 32];
  // Missing: a barrier between the reads of this round and the writes of the next.
  traded[threadIdx.x] = 2;
}

__global__ void absent_lane_kernel(int* out) {
  if (threadIdx.x == 31) return;
  __syncthreads();
  out[threadIdx.x] = __shfl_sync(kFull, 1, 31);
}

void check_numbers() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const __half half{static_cast<uint16_t>(bits)};
    const __nv_bfloat16 brain{static_cast<uint16_t>(bits)};
    if (__half2float(half) == __half2float(half))
      expect(__float2half(__half2float(half)).bits == bits, "half round trip");
    if (__bfloat162float(brain) == __bfloat162float(brain))
      expect(__float2bfloat16(__bfloat162float(brain)).bits == bits, "bfloat16 round trip");
  }
  // Ties go to even; NaN stays NaN.
  expect(__float2bfloat16(__uint_as_float(0x3f808000)).bits == 0x3f80, "bfloat16 tie down");
  expect(__float2bfloat16(__uint_as_float(0x3f818000)).bits == 0x3f82, "bfloat16 tie up");
  expect(std::isnan(__bfloat162float(__float2bfloat16(NAN))), "bfloat16 NaN");
}

}  // namespace

int main(int, char** argv) {
  const std::string what = argv[1];
  int words[64] = {};
  if (what == "race-global") EFFKERN_LAUNCH(race_global_kernel, 2, 32, 0, nullptr, words);
  if (what == "race-warp") EFFKERN_LAUNCH(race_warp_kernel, 1, 32, 0, nullptr, words);
  if (what == "race-read") EFFKERN_LAUNCH(race_read_kernel, 1, 64, 0, nullptr, words);
  if (what == "absent-lane") EFFKERN_LAUNCH(absent_lane_kernel, 1, 32, 0, nullptr, words);
  if (what != "values") return 0;

  check_numbers();
  int sum = 0, largest = -1, word = 5;
  float total = 0;
  EFFKERN_LAUNCH(values_kernel, dim3(3, 2), 64, 64 * sizeof(int), nullptr, &sum, &total, &largest);
  expect(sum == 6 * 64 && total == 6 * 32.0f && largest == 263, "atomics");
  EFFKERN_LAUNCH(exchange_kernel, 2, 32, 0, nullptr, &word);
  expect(word == 9, "compare and swap");
  return num_wrong == 0 ? 0 : 1;
}
