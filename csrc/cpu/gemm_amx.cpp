// The bfloat16 products of gemm_bf16.cpp by AMX.
#include "cpu/gemm_amx.h"

#include "cpu/gemm_amx_pack.h"

#if defined(EFFKERN_HAS_AMX)
#include <sys/syscall.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>

namespace effkern::amx {
namespace {

using bf16::ceil_div;
using bf16::Panels;
using bf16::Prefetch;
using bf16::Product;

// Strips that a thread packs at a time, and their depth: up to 512 KiB of the second-level cache. What is packed at
// first passes through that cache once per group, unless it fits there.
constexpr int64_t kGroup = 4;
constexpr int64_t kDepth = 2048;
constexpr int64_t kFits = 1 << 20;
// A larger result goes past the caches, which would read each line of it before it is overwritten.
constexpr int64_t kStreamed = 8 << 20;

// Sixteen rows of 64 bytes in every register.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == 64);
const Configuration kConfiguration;

// The configuration belongs to the thread.
class Tiles {
 public:
  EFFKERN_AMX Tiles() { _tile_loadconfig(&kConfiguration); }
  EFFKERN_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

struct Block {
  float* out = nullptr;
  int64_t stride = 0, rows = 0, columns = 0;
  // Add to `out` instead of overwriting it.
  bool add = false;
  // Past the caches; whole lines only.
  bool streamed = false;
};

// A block of sums on its way from the tiles to memory, some rows at a time while the next block is computed: a quarter
// of the time of a product that is 256 deep.
class Output {
 public:
  EFFKERN_AMX_INLINE void take(const Block& block) {
    write(kStrip);
    _tile_stored(0, sums_, kStrip * 4);
    _tile_stored(1, sums_ + kLanes, kStrip * 4);
    _tile_stored(2, sums_ + kLanes * kStrip, kStrip * 4);
    _tile_stored(3, sums_ + kLanes * kStrip + kLanes, kStrip * 4);
    block_ = block;
    row_ = 0;
  }

  EFFKERN_AMX_INLINE void write(int64_t rows) {
    for (const int64_t stop = std::min(block_.rows, row_ + rows); row_ < stop; ++row_) {
      float* out = block_.out + row_ * block_.stride;
      __m512 left = _mm512_load_ps(sums_ + row_ * kStrip), right = _mm512_load_ps(sums_ + row_ * kStrip + kLanes);
      if (block_.streamed) {
        _mm512_stream_ps(out, left);
        _mm512_stream_ps(out + kLanes, right);
        continue;
      }
      const __mmask16 first = bf16::first_lanes(block_.columns), second = bf16::first_lanes(block_.columns - kLanes);
      if (block_.add) {
        left = _mm512_add_ps(_mm512_maskz_loadu_ps(first, out), left);
        right = _mm512_add_ps(_mm512_maskz_loadu_ps(second, out + kLanes), right);
      }
      _mm512_mask_storeu_ps(out, first, left);
      if (second) _mm512_mask_storeu_ps(out + kLanes, second, right);
    }
  }

  EFFKERN_AMX void finish() {
    write(kStrip);
    _mm_sfence();
  }

 private:
  alignas(64) float sums_[kStrip * kStrip];
  Block block_;
  int64_t row_ = 0;
};

// 2 x 2 tiles of sums, two of a and two of b: eight registers, and two products for each tile that is loaded. Meanwhile
// the block before goes out, and what is needed next comes.
EFFKERN_AMX void multiply(const uint32_t* a, const uint32_t* b, int64_t steps, const Block& block, Output& before,
                          Prefetch& next) {
  // GCC's tile loads do not say that they read memory.
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t share = ceil_div(kStrip, std::max<int64_t>(1, steps));
  int64_t row = 0;
  for (int64_t step = 0; step < steps; ++step, a += kStepSize, b += kStepSize) {
    // b is what changes from block to block: with this hint it does not drive a out of the first-level cache.
    _tile_stream_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    before.write(share);
    next.share();
    if (block.add)
      for (const int64_t stop = std::min(block.rows, row + share); row < stop; ++row) {
        __builtin_prefetch(block.out + row * block.stride, 1);
        if (block.columns > kLanes) __builtin_prefetch(block.out + row * block.stride + kLanes, 1);
      }
  }
  before.take(block);
}

// All of `held` is packed at first; each thread walks over the other operand, a group of strips at a time.
class Run {
 public:
  Run(const Product& p, const Operand& held, const Operand& walked)
      : p_(p),
        held_(held),
        walked_(walked),
        steps_(ceil_div(p.depth, kStep)),
        strips_(ceil_div(held.lines, kStrip)),
        panels_(strips_ * steps_ * kStepSize),
        streamed_(!p.add && p.depth <= kDepth && p.rows * p.columns * 4 >= kStreamed &&
                  reinterpret_cast<uintptr_t>(p.out) % 64 == 0 && p.out_stride % kLanes == 0) {
    for (int64_t i = 0; i < strips_; ++i) pack(held, i * kStrip, 0, p.depth, panels_.get() + i * steps_ * kStepSize);
  }

  // Strips of the other operand.
  void operator()(int64_t begin, int64_t end) const {
    const Tiles tiles;
    Output output;
    const Panels group(kGroup * ceil_div(std::min(kDepth, p_.depth), kStep) * kStepSize);
    for (int64_t first = begin; first < end; first += kGroup) {
      int64_t k = 0;
      // Once even without depth: the result is then zero.
      do {
        multiply_group(first, std::min(first + kGroup, end), end, k, group.get(), output);
        k += kDepth;
      } while (k < p_.depth);
    }
    output.finish();
  }

 private:
  void multiply_group(int64_t first, int64_t last, int64_t end, int64_t k, uint32_t* group, Output& output) const {
    const int64_t depth = std::min(kDepth, p_.depth - k), steps = ceil_div(depth, kStep);
    for (int64_t j = first; j < last; ++j)
      pack(walked_, j * kStrip, k, depth, group + (j - first) * steps * kStepSize);
    const int64_t shares = strips_ * (last - first) * steps;
    Prefetch next = k + depth < p_.depth ? prefetch(first, last, k + depth, shares)
                                         : prefetch(last, std::min(last + kGroup, end), 0, shares);
    const auto one = [&](int64_t i, int64_t j) {
      const uint32_t* held = panels_.get() + (i * steps_ + k / kStep) * kStepSize;
      const uint32_t* walked = group + (j - first) * steps * kStepSize;
      if (held_.second)
        multiply(walked, held, steps, block(j * kStrip, i * kStrip, k), output, next);
      else
        multiply(held, walked, steps, block(i * kStrip, j * kStrip, k), output, next);
    };
    // The strip that stays is the first factor, if the cache has room for all of the second.
    if (held_.second && strips_ * depth * kStrip * 2 <= kFits)
      for (int64_t j = first; j < last; ++j)
        for (int64_t i = 0; i < strips_; ++i) one(i, j);
    else
      for (int64_t i = 0; i < strips_; ++i)
        for (int64_t j = first; j < last; ++j) one(i, j);
  }

  Block block(int64_t row, int64_t column, int64_t k) const {
    return {p_.out + row * p_.out_stride + column, p_.out_stride, std::min<int64_t>(kStrip, p_.rows - row),
            p_.columns - column, p_.add || k > 0, streamed_ && p_.columns - column >= kStrip};
  }

  // Of strips that are packed next.
  Prefetch prefetch(int64_t first, int64_t last, int64_t k, int64_t shares) const {
    const int64_t line = first * kStrip, lines = std::max<int64_t>(0, std::min(last * kStrip, walked_.lines) - line);
    const int64_t depth = std::min(kDepth, p_.depth - k);
    return walked_.across ? Prefetch(walked_.x.at(k, line), depth, lines, shares)
                          : Prefetch(walked_.x.at(line, k), lines, depth, shares);
  }

  const Product& p_;
  Operand held_, walked_;
  int64_t steps_, strips_;
  Panels panels_;
  bool streamed_;
};

void run(const Product& p, const Operand& held, const Operand& walked) {
  const int64_t grain = std::max<int64_t>(1, bf16::kGrain / std::max<int64_t>(1, held.lines * kStrip * p.depth));
  const Run task(p, held, walked);
  torch::stable::parallel_for(0, ceil_div(walked.lines, kStrip), grain,
                              [&](int64_t begin, int64_t end) { task(begin, end); });
}

bool permitted() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

bool available() {
  static const bool yes = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && permitted();
  }();
  return yes;
}

void mm_nt(const Product& p) { run(p, {p.a, p.rows, false, false}, {p.b, p.columns, false, true}); }

void mm_tn(const Product& p) { run(p, {p.b, p.columns, true, true}, {p.a, p.rows, true, false}); }

}  // namespace effkern::amx
#endif
