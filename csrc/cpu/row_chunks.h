// How rows are cut for threads: never by the number of threads, so that the bits do not depend on it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/rows.h"

namespace effkern {

// Chunks that few rows are still cut into.
constexpr int64_t kChunks = 8;

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// [begin, end) in about `parts` parts of whole strips.
struct Cut {
  int64_t begin, end, step;
  Cut(int64_t begin, int64_t end, int64_t parts)
      : begin(begin), end(end), step(std::max(kStrip, ceil_div(ceil_div(end - begin, parts), kStrip) * kStrip)) {}
  int64_t parts() const { return ceil_div(end - begin, step); }
  int64_t first(int64_t i) const { return begin + i * step; }
  int64_t last(int64_t i) const { return std::min(begin + (i + 1) * step, end); }
};

template <typename T>
int64_t least_chunks(int64_t rows, int64_t dim, int64_t bytes) {
  const int64_t fit = bytes / (dim * static_cast<int64_t>(sizeof(T)));
  const int64_t least = std::max<int64_t>(1, ceil_div(rows, std::max<int64_t>(32, fit)));
  // As many for each of 2, 4 or 8 threads.
  return least > kChunks ? ceil_div(least, kChunks) * kChunks : least;
}

}  // namespace effkern
