// The bfloat16 products of gemm_bf16.cpp by AMX.
#include "cpu/gemm_amx.h"

#if defined(EFFKERN_HAS_AMX)
#include <sys/syscall.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>

#define EFFKERN_AMX \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prfchw")))

namespace effkern::amx {
namespace {

using bf16::ceil_div;
using bf16::kLanes;
using bf16::Matrix;
using bf16::Panels;
using bf16::Product;

// 2 x 2 tiles of sums, two of a and two of b: eight registers. Each is loaded once for two products.
constexpr int kStrip = 2 * kLanes;
// Depth of one instruction.
constexpr int kStep = 32;
// Elements (pairs) of a tile, and of the two tiles of a strip.
constexpr int kTile = kLanes * kLanes;
constexpr int kStepSize = 2 * kTile;
// Strips that a thread packs at a time, and their depth: 512 KiB of the second-level cache. The operand that is packed
// at first passes through that cache once per group.
constexpr int64_t kGroup = 4;
constexpr int64_t kDepth = 2048;

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

// An operand as lines along the depth; `across`: these are the columns of the matrix.
struct Operand {
  Matrix x;
  int64_t lines;
  bool across;
  // Pairs of the depth lie one below the other, as tdpbf16ps wants its second factor.
  bool second;
};

// The strip from `line` on, from depth `k` on: [step][tile][16 lines][16 pairs], or [16 pairs][16 lines] of a second
// factor; zero beyond the ends.
EFFKERN_AMX void pack(const Operand& operand, int64_t line, int64_t k, int64_t depth, uint32_t* out) {
  for (int64_t end = k + depth; k < end; k += kStep)
    for (int64_t first = line; first < line + kStrip; first += kLanes, out += kTile) {
      const int64_t lines = operand.lines - first, left = end - k;
      __m512i block[kLanes];
      if (operand.across) {
        const __mmask16 inside = bf16::first_lanes(lines);
        const Matrix x = operand.x.at(k, first);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const uint16_t* even = x.data + 2 * i * x.stride;
          block[i] = 2 * i < left ? bf16::zip(even, 2 * i + 1 < left ? even + x.stride : nullptr, inside)
                                  : _mm512_setzero_si512();
        }
      } else {
        const __mmask32 inside = left >= kStep ? 0xffffffffu : (1u << left) - 1;
        const Matrix x = operand.x.at(first, k);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          block[i] = i < lines ? _mm512_maskz_loadu_epi16(inside, x.data + i * x.stride) : _mm512_setzero_si512();
      }
      if (operand.across != operand.second) bf16::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(out + i * kLanes, block[i]);
    }
}

struct Block {
  float* out;
  int64_t stride;
  int64_t rows, columns;
  bool add;
  Block at(int row, int column) const {
    return {out + row * stride + column, stride, rows - row, columns - column, add};
  }
  bool plain() const { return !add && rows >= kLanes && columns >= kLanes; }
};

EFFKERN_AMX void finish(const float* tile, const Block& block) {
  const __mmask16 inside = bf16::first_lanes(block.columns);
  for (int i = 0; i < kLanes && i < block.rows; ++i) {
    float* out = block.out + i * block.stride;
    __m512 sum = _mm512_load_ps(tile + i * kLanes);
    if (block.add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, out), sum);
    _mm512_mask_storeu_ps(out, inside, sum);
  }
}

#define EFFKERN_STORE(tile, row, column)                                    \
  if (const Block part = block.at(row, column); part.plain()) {             \
    _tile_stored(tile, part.out, part.stride * 4);                          \
  } else {                                                                  \
    _tile_stored(tile, sums, 64);                                           \
    finish(sums, part);                                                     \
  }

EFFKERN_AMX __attribute__((noinline)) void multiply(const uint32_t* a, const uint32_t* b, int64_t steps,
                                                    const Block& block) {
  // GCC's tile loads do not say that they read memory.
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t rows = std::min<int64_t>(kStrip, block.rows), share = steps > 0 ? ceil_div(rows, steps) : 0;
  int64_t row = 0;
  for (int64_t step = 0; step < steps; ++step, a += kStepSize, b += kStepSize) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    // What the block needs at its end comes while it is computed.
    for (const int64_t stop = std::min(rows, row + share); row < stop; ++row) {
      __builtin_prefetch(block.out + row * block.stride, 1);
      if (block.columns > kLanes) __builtin_prefetch(block.out + row * block.stride + kLanes, 1);
    }
  }
  alignas(64) float sums[kTile];
  EFFKERN_STORE(0, 0, 0)
  EFFKERN_STORE(1, 0, kLanes)
  EFFKERN_STORE(2, kLanes, 0)
  EFFKERN_STORE(3, kLanes, kLanes)
}

// All of one operand is packed at first; each thread walks over the other, a group of strips at a time.
void run(const Product& p, const Operand& held, const Operand& walked) {
  const int64_t steps = ceil_div(p.depth, kStep), strips = ceil_div(held.lines, kStrip);
  const Panels all(strips * steps * kStepSize);
  for (int64_t i = 0; i < strips; ++i) pack(held, i * kStrip, 0, p.depth, all.get() + i * steps * kStepSize);
  const int64_t grain = std::max<int64_t>(1, bf16::kGrain / std::max<int64_t>(1, held.lines * kStrip * p.depth));
  torch::stable::parallel_for(0, ceil_div(walked.lines, kStrip), grain, [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    const int64_t most = ceil_div(std::min(kDepth, p.depth), kStep) * kStepSize;
    const Panels group(kGroup * most);
    for (int64_t first = begin; first < end; first += kGroup) {
      const int64_t last = std::min(first + kGroup, end);
      int64_t k = 0;
      // Once even without depth: the result is then zero.
      do {
        const int64_t depth = std::min(kDepth, p.depth - k);
        for (int64_t j = first; j < last; ++j)
          pack(walked, j * kStrip, k, depth, group.get() + (j - first) * most);
        for (int64_t i = 0; i < strips; ++i)
          for (int64_t j = first; j < last; ++j) {
            const uint32_t* one = all.get() + (i * steps + k / kStep) * kStepSize;
            const uint32_t* other = group.get() + (j - first) * most;
            const int64_t row = (held.second ? j : i) * kStrip, column = (held.second ? i : j) * kStrip;
            multiply(held.second ? other : one, held.second ? one : other, ceil_div(depth, kStep),
                     {p.out + row * p.out_stride + column, p.out_stride, p.rows - row, p.columns - column,
                      p.add || k > 0});
          }
        k += kDepth;
      } while (k < p.depth);
    }
  });
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
