// Operands of gemm_amx.cpp, packed in the order in which their tiles are loaded.
//
// tdpbf16ps takes 16 lines of its first factor as they lie, 32 deep; of its second the pairs of the depth one below the
// other. The depth runs along the rows of a matrix, or across them, so there are four ways of arranging a step.
#pragma once

#include "cpu/gemm_amx.h"

#if defined(EFFKERN_HAS_AMX)
#define EFFKERN_AMX \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prfchw")))
#define EFFKERN_AMX_INLINE EFFKERN_AMX inline __attribute__((always_inline))

namespace effkern::amx {

using bf16::kLanes;
using bf16::Matrix;

// Two tiles stand side by side.
constexpr int kStrip = 2 * kLanes;
// Depth of one instruction.
constexpr int kStep = 32;
// Pairs in a tile, and in the two tiles of a strip.
constexpr int kTile = kLanes * kLanes;
constexpr int kStepSize = 2 * kTile;
// Elements that are read of a row at a time: 8 lines in a row are what the hardware's prefetcher follows. Line by line
// the packing of a weight took 2.5 times as long. Also the distance of rows where they wait to be arranged.
constexpr int kPitch = 256;

// An operand as lines along the depth; `across`: these are the columns of the matrix.
struct Operand {
  Matrix x;
  int64_t lines;
  bool across;
  // The second factor of the instruction.
  bool second;
};

// 32 rows, and columns in whole steps; zero beyond the ends.
EFFKERN_AMX_INLINE void stage(Matrix x, int64_t num_rows, int64_t columns, uint16_t* rows) {
  for (int64_t i = 0; i < kStrip; ++i)
    for (int64_t j = 0; j < columns; j += kStep) {
      const int64_t left = i < num_rows ? columns - j : 0;
      const __mmask32 inside = left >= kStep ? 0xffffffffu : (1u << left) - 1;
      // Of a row that does not exist not even the address does.
      const uint16_t* row = left > 0 ? x.data + i * x.stride + j : x.data;
      _mm512_store_si512(rows + i * kPitch + j, _mm512_maskz_loadu_epi16(inside, row));
    }
}

EFFKERN_AMX_INLINE __m128i quarter(const uint16_t* x) { return _mm_load_si128(reinterpret_cast<const __m128i*>(x)); }

// 16 bytes of four rows, `step` rows apart. Placed by loads, because a core shuffles one vector per cycle only.
EFFKERN_AMX_INLINE __m512i lanes(const uint16_t* rows, int step) {
  __m512i all = _mm512_castsi128_si512(quarter(rows));
  all = _mm512_inserti32x4(all, quarter(rows + step * kPitch), 1);
  all = _mm512_inserti32x4(all, quarter(rows + 2 * step * kPitch), 2);
  return _mm512_inserti32x4(all, quarter(rows + 3 * step * kPitch), 3);
}

EFFKERN_AMX_INLINE void transpose_in_lanes(__m512i (&x)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(a, c);
  x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d);
  x[3] = _mm512_unpackhi_epi64(b, d);
}

EFFKERN_AMX_INLINE void store4(uint32_t* out, const __m512i (&x)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) _mm512_store_si512(out + i * kLanes, x[i]);
}

EFFKERN_AMX_INLINE void along_first(const uint16_t* rows, uint32_t* out) {
  for (int i = 0; i < kStrip; ++i) _mm512_store_si512(out + i * kLanes, _mm512_load_si512(rows + i * kPitch));
}

EFFKERN_AMX_INLINE void along_second(const uint16_t* rows, uint32_t* out) {
  for (int tile = 0; tile < 2; ++tile)
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      __m512i block[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) block[i] = lanes(rows + (tile * kLanes + i) * kPitch + 8 * part, 4);
      transpose_in_lanes(block);
      store4(out + (tile * kLanes + 4 * part) * kLanes, block);
    }
}

EFFKERN_AMX_INLINE void across_first(const uint16_t* rows, uint32_t* out) {
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    __m512i low[4], high[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i even = lanes(rows + 2 * i * kPitch + 8 * part, 8);
      const __m512i odd = lanes(rows + (2 * i + 1) * kPitch + 8 * part, 8);
      low[i] = _mm512_unpacklo_epi16(even, odd);
      high[i] = _mm512_unpackhi_epi16(even, odd);
    }
    transpose_in_lanes(low);
    transpose_in_lanes(high);
    store4(out + 8 * part * kLanes, low);
    store4(out + (8 * part + 4) * kLanes, high);
  }
}

EFFKERN_AMX_INLINE void across_second(const uint16_t* rows, uint32_t* out) {
  for (int tile = 0; tile < 2; ++tile)
    for (int pair = 0; pair < kLanes; ++pair, out += kLanes) {
      const uint16_t* even = rows + 2 * pair * kPitch + tile * kLanes;
      _mm512_store_si512(out, bf16::zip(even, even + kPitch, 0xffff));
    }
}

// The strip from `line` on, from depth `k` on: [step][tile][line][pair], or [step][tile][pair][line] of a second
// factor; zero beyond the ends.
EFFKERN_AMX inline void pack(const Operand& x, int64_t line, int64_t k, int64_t depth, uint32_t* out) {
  alignas(64) uint16_t rows[kStrip * kPitch];
  const int64_t lines = std::min<int64_t>(kStrip, x.lines - line), chunk = x.across ? kStep : kPitch;
  for (const int64_t end = k + depth; k < end; k += chunk) {
    const int64_t left = std::min(end - k, chunk);
    if (x.across)
      stage(x.x.at(k, line), left, lines, rows);
    else
      stage(x.x.at(line, k), lines, left, rows);
    for (int64_t j = 0; j < left; j += kStep, out += kStepSize)
      if (x.across)
        x.second ? across_second(rows, out) : across_first(rows, out);
      else
        x.second ? along_second(rows + j, out) : along_first(rows + j, out);
  }
}

}  // namespace effkern::amx
#endif
