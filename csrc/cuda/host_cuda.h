// CUDA on the host, for the sanitizers: one std::thread per CUDA thread, a few blocks at once.
//
// A kernel file that includes launch.h and uses nothing but what is below compiles with
//     g++ -std=c++20 -DEFFKERN_HOST_CUDA -fsanitize=thread (or address,undefined)
// and then runs real data. What each sanitizer proves:
//     thread     every two accesses of one block to shared memory, and of two blocks to global memory, are ordered by
//                a barrier or atomic. Blocks run kBlocksAtOnce at a time; races between waves are not seen.
//     address    no access outside any array: global arrays are exact heap blocks, and so is every shared array.
//     undefined  alignment of vector loads, signed overflow, shifts.
// Differences from a GPU: a shuffle orders memory here (CUDA does not promise that); a warp runs in any
// interleaving, so code that relies on lockstep fails here first. Warp operations demand every lane of the warp
// that is still running; a mask that names other lanes aborts.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;
using std::max;
using std::min;

// The two 16-bit formats, stored as bits; arithmetic is done in float, as in the kernels.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(uint32_t{v.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }
inline __half __float2half(float v) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(v))}; }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace effkern::host {

// Blocks in flight together; two are enough to see a race between blocks.
inline constexpr unsigned kBlocksAtOnce = 2;

// Mutation test: every thread skips its n-th __syncthreads (0-based). A kernel whose barriers are all needed
// races, or computes something else, for each n below their number.
inline int skip_barrier = -1;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host_cuda: thread %u of block %u: %s\n", threadIdx.x, blockIdx.x, what);
  std::abort();
}

// Orders what stands before it against what stands behind it, and nothing else: any further ordering would hide races
// from the thread sanitizer. That of libstdc++ (std::barrier) parks all waiters of a process in a few shared pools,
// whose atomics order threads of different barriers. And with one mutex, a thread that wakes late from one round
// would be ordered behind threads that have arrived at the next; so rounds take turns with two.
class Barrier {
 public:
  explicit Barrier(unsigned members) { rounds_[0].missing = members; }

  // `turn` counts the calling thread's rounds. A thread that has ended leaves: later rounds do not wait for it.
  void arrive(unsigned& turn, bool leave = false) {
    Round& round = rounds_[turn % 2];
    Round& next = rounds_[++turn % 2];
    std::unique_lock lock(round.mutex);
    const unsigned completed = round.completed;
    round.staying += !leave;
    if (--round.missing == 0) {
      next.missing = round.staying;
      round.staying = 0;
      ++round.completed;
      round.done.notify_all();
    } else if (!leave) {
      round.done.wait(lock, [&] { return round.completed != completed; });
    }
  }

 private:
  struct Round {
    std::mutex mutex;
    std::condition_variable done;
    unsigned missing = 0, staying = 0, completed = 0;
  };
  Round rounds_[2];
};

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes), alive(lanes == 32 ? ~0u : (1u << lanes) - 1) {}
  Barrier barrier;
  // Ordered by the barrier.
  unsigned living() const { return alive.load(std::memory_order_relaxed); }
  std::atomic<unsigned> alive;
  uint64_t slot[32] = {};
};

struct Block {
  Block(unsigned threads, size_t dynamic_bytes) : barrier(threads), dynamic(new unsigned char[dynamic_bytes]) {
    for (unsigned first = 0; first < threads; first += 32)
      warps.push_back(std::make_unique<Warp>(threads - first < 32 ? threads - first : 32));
    std::memset(dynamic.get(), 0xff, dynamic_bytes);
  }
  ~Block() {
    for (Array& slot : arrays) delete[] slot.memory.load();
  }

  // A static shared array, known by the address of its declaration; 0xff bytes are NaN in every float format.
  // Without a mutex, again for the sake of races. Kernels declare their arrays before they touch any.
  void* array(const void* key, size_t bytes) {
    for (Array& slot : arrays) {
      const void* owner = nullptr;
      if (slot.key.compare_exchange_strong(owner, key, std::memory_order_relaxed)) {
        auto* memory = new unsigned char[bytes];
        std::memset(memory, 0xff, bytes);
        slot.memory.store(memory, std::memory_order_release);
      }
      if (owner != nullptr && owner != key) continue;
      while (slot.memory.load(std::memory_order_acquire) == nullptr) std::this_thread::yield();
      return slot.memory.load(std::memory_order_relaxed);
    }
    fail("more than 16 shared arrays");
  }

  struct Array {
    std::atomic<const void*> key = nullptr;
    std::atomic<unsigned char*> memory = nullptr;
  };
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<unsigned char[]> dynamic;
  Array arrays[16];
};

inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local unsigned lane;
inline thread_local int barriers_passed;
inline thread_local unsigned block_turn, warp_turn;

// All lanes post a value, then each reads what it needs; the second barrier keeps the slots until all have read.
template <typename T, typename Read>
auto exchange(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  // Reading `alive` before the barrier is safe: a lane leaves only from outside any exchange.
  if ((mask & warp->living()) != warp->living() || !(mask >> lane & 1)) fail("mask must name all live lanes");
  std::memcpy(&warp->slot[lane], &value, sizeof(T));
  warp->barrier.arrive(warp_turn);
  const auto result = read([](unsigned from) {
    if (from >= 32 || !(warp->living() >> from & 1)) fail("warp operation reads a lane that is not there");
    T other;
    std::memcpy(&other, &warp->slot[from], sizeof(T));
    return other;
  });
  warp->barrier.arrive(warp_turn);
  return result;
}

inline unsigned ballot(unsigned mask, bool vote) {
  return exchange(mask, vote, [](auto from) {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i)
      if (warp->living() >> i & 1) votes |= unsigned{from(i)} << i;
    return votes;
  });
}

template <typename Kernel>
void run_thread(Block& own_block, uint3 thread, uint3 block_index, dim3 grid, dim3 size, const Kernel& kernel) {
  threadIdx = thread, blockIdx = block_index, gridDim = grid, blockDim = size;
  const unsigned linear = (thread.z * size.y + thread.y) * size.x + thread.x;
  block = &own_block, warp = own_block.warps[linear / 32].get(), lane = linear % 32;
  kernel();
  warp->alive.fetch_and(~(1u << lane), std::memory_order_relaxed);
  warp->barrier.arrive(warp_turn, true);
  block->barrier.arrive(block_turn, true);
}

template <typename Kernel>
void launch(dim3 grid, dim3 size, size_t dynamic_bytes, const Kernel& kernel) {
  const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z;
  const unsigned num_threads = size.x * size.y * size.z;
  if (num_blocks == 0 || num_threads == 0 || num_threads > 1024) fail("bad launch configuration");
  for (uint64_t first = 0; first < num_blocks; first += kBlocksAtOnce) {
    std::vector<std::unique_ptr<Block>> wave;
    std::vector<std::thread> threads;
    for (uint64_t b = first; b < num_blocks && b < first + kBlocksAtOnce; ++b) {
      Block& own_block = *wave.emplace_back(std::make_unique<Block>(num_threads, dynamic_bytes));
      const uint3 block_index{unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
      for (unsigned t = 0; t < num_threads; ++t) {
        const uint3 thread{t % size.x, t / size.x % size.y, t / size.x / size.y};
        threads.emplace_back(
            [&, thread, block_index] { run_thread(own_block, thread, block_index, grid, size, kernel); });
      }
    }
    for (auto& thread : threads) thread.join();
  }
}

template <typename T, typename Update>
T atomic_update(T* address, Update update) {
  std::atomic_ref<T> ref(*address);
  T old = ref.load(std::memory_order_relaxed);
  while (!ref.compare_exchange_weak(old, update(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace effkern::host

inline void __syncthreads() {
  using namespace effkern::host;
  if (barriers_passed++ != skip_barrier) block->barrier.arrive(block_turn);
}
inline void __syncwarp(unsigned mask = 0xffffffff) { effkern::host::ballot(mask, true); }
inline void __threadfence() {
  // A read-modify-write on one location: the thread sanitizer does not know std::atomic_thread_fence.
  static std::atomic<int> order;
  order.fetch_add(1);
}

template <typename T>
T __shfl_sync(unsigned mask, T v, unsigned from) {
  return effkern::host::exchange(mask, v, [&](auto read) { return read(from % 32); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, unsigned lanes) {
  return effkern::host::exchange(mask, v, [&](auto read) { return read(effkern::host::lane ^ lanes); });
}
// Past the end of the warp a lane gets its own value back.
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned by) {
  const unsigned lane = effkern::host::lane;
  return effkern::host::exchange(mask, v, [&](auto read) { return read(lane + by < 32 ? lane + by : lane); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned by) {
  const unsigned lane = effkern::host::lane;
  return effkern::host::exchange(mask, v, [&](auto read) { return read(lane >= by ? lane - by : lane); });
}
inline unsigned __ballot_sync(unsigned mask, bool vote) { return effkern::host::ballot(mask, vote); }
inline bool __any_sync(unsigned mask, bool vote) { return effkern::host::ballot(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return effkern::host::ballot(mask, !vote) == 0; }

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> v) {
  return effkern::host::atomic_update(address, [v](T old) { return T(old + v); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> v) {
  return effkern::host::atomic_update(address, [v](T old) { return old < v ? v : old; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> v) {
  return effkern::host::atomic_update(address, [v](T) { return v; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return effkern::host::atomic_update(address, [=](T old) { return old == expected ? v : old; });
}
