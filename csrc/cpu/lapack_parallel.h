// parallel_for whose workers call LAPACK and BLAS: the same bits whatever the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "cpu/lapack.h"

namespace effkern::lapack {

// f(begin, end) for ranges of [0, count). A single range runs outside of any parallel region, where the library would
// take threads of its own.
template <class F>
void parallel_for(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const OneThread guard;
    f(begin, end);
  });
}

}  // namespace effkern::lapack
