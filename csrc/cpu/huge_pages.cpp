// effkern::advise_huge_pages: asks the system to back a CPU tensor that nothing was written to yet by huge pages.
#include "cpu/huge_pages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace {

void advise_huge_pages(const torch::stable::Tensor& x) {
  effkern::advise_huge_pages(const_cast<void*>(x.const_data_ptr()), static_cast<size_t>(x.numel()) * x.element_size());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages)); }
