// One function, several instruction sets, chosen at load time by the CPU.
#pragma once

#if defined(EFFKERN_CPU_CLONE)
// Test builds pin a single clone, so that each is run against the reference.
#define EFFKERN_CLONES __attribute__((target("arch=" EFFKERN_CPU_CLONE)))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EFFKERN_HAS_CLONES
#define EFFKERN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EFFKERN_CLONES
#endif

#define EFFKERN_INLINE inline __attribute__((always_inline))
// A lambda that takes on the instruction set of the function around it.
#define EFFKERN_LAMBDA __attribute__((always_inline))

#include <cstdint>

namespace effkern {
// Which clone of the kernels runs here, as an index into native.CPU_CLONES.
int64_t cpu_clone();
}  // namespace effkern
