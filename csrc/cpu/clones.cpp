// effkern::cpu_clone: which clone of the kernels in this module runs here, as an index into native.CPU_CLONES.
#include "clones.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstring>

namespace effkern {

int64_t cpu_clone() {
#if defined(EFFKERN_CPU_CLONE)
  return std::strcmp(EFFKERN_CPU_CLONE, "x86-64-v4") == 0 ? 0 : std::strcmp(EFFKERN_CPU_CLONE, "x86-64-v3") == 0 ? 1 : 2;
#elif defined(EFFKERN_HAS_CLONES)
  // The test of the loader's resolver.
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") ? 0 : __builtin_cpu_supports("x86-64-v3") ? 1 : 2;
#else
  return 2;
#endif
}

}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_clone", TORCH_BOX(&effkern::cpu_clone));
}
