// torch's name of a type that kernels read.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

namespace effkern {

using torch::headeronly::ScalarType;

template <typename T>
constexpr ScalarType type_of() {
  return sizeof(T) == sizeof(float) ? ScalarType::Float : ScalarType::BFloat16;
}

}  // namespace effkern
