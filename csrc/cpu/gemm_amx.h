// float32 out (+)= a b from bfloat16 operands by tdpbf16ps, for CPUs whose AMX multiplies bfloat16.
//
// tdpbf16ps multiplies a tile of 16 lines of `a` by one of 16 lines of `b`, 32 deep. Like vdpbf16ps it rounds to
// nearest even and takes and gives subnormal numbers as zero, whatever the thread's floating-point mode is.
#pragma once

#include "cpu/gemm_bf16.h"

#if defined(EFFKERN_HAS_BF16) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || defined(__clang__))
#define EFFKERN_HAS_AMX

namespace effkern::amx {

// Whether this CPU has the instructions and the system lets this process use their registers. Asks once.
bool available();

// a [rows, depth], b [columns, depth].
void mm_nt(const bf16::Product& p);
// a [depth, rows], b [depth, columns].
void mm_tn(const bf16::Product& p);

}  // namespace effkern::amx
#endif
