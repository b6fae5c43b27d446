// One way to launch kernels and to declare shared memory, for nvcc and for the host build of the tests.
//
//   EFFKERN_SHARED(float, partial, 32);           in a kernel: a shared array of 32 floats
//   EFFKERN_DYNAMIC_SHARED(float, tile);          in a kernel: the launch's dynamic shared memory
//   EFFKERN_ALLOW_SHARED(kernel, bytes);          before a launch with more than 48 KiB of dynamic shared memory
//   EFFKERN_LAUNCH(kernel, grid, block, dynamic_bytes, stream, arguments...);     throws std::runtime_error
//
// A template kernel with a comma goes into parentheses: EFFKERN_LAUNCH((kernel<float, 4>), ...).
#pragma once

#if defined(EFFKERN_HOST_CUDA)

#include "cuda/host_cuda.h"

#define EFFKERN_SHARED(type, name, count) \
  static char name##_key;                 \
  type* const name = static_cast<type*>(effkern::host::block->array(&name##_key, sizeof(type) * (count)))
#define EFFKERN_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(effkern::host::block->dynamic.get())
#define EFFKERN_ALLOW_SHARED(kernel, bytes) ((void)(bytes))
#define EFFKERN_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
  ((void)(stream), effkern::host::launch(grid, block, dynamic_bytes, [&] { kernel(__VA_ARGS__); }))

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace effkern {
// Catches a refused launch; a fault inside the kernel shows at the next synchronisation, as for torch's own kernels.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("effkern: launch of ") + kernel + " failed: " + cudaGetErrorString(error));
}
}  // namespace effkern

#define EFFKERN_SHARED(type, name, count) __shared__ type name[count]
// One raw symbol for all types: extern arrays of one name must agree on theirs.
#define EFFKERN_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char effkern_dynamic[]; \
  type* const name = reinterpret_cast<type*>(effkern_dynamic)
#define EFFKERN_ALLOW_SHARED(kernel, bytes)                                                                          \
  do {                                                                                                               \
    if (cudaFuncSetAttribute((kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) !=      \
        cudaSuccess)                                                                                                 \
      throw std::runtime_error("effkern: this device has too little shared memory for " #kernel);                    \
  } while (false)
#define EFFKERN_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...)      \
  do {                                                                       \
    kernel<<<(grid), (block), (dynamic_bytes), (stream)>>>(__VA_ARGS__);     \
    effkern::check_launch(#kernel);                                          \
  } while (false)

#endif
