// effkern::advise_huge_pages: asks the system to back a CPU tensor that nothing was written to yet by huge pages.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

void advise_huge_pages(const torch::stable::Tensor& x) {
#if defined(__linux__)
  if (x.numel() == 0) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t start = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t first = (start + page - 1) / page * page;
  const uintptr_t last = (start + static_cast<uintptr_t>(x.numel() * x.element_size())) / page * page;
  // Only advice: a kernel without huge pages refuses, and nothing is lost.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)x;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages)); }
