#include "data.h"

PYBIND11_MODULE(_data, module) {
  module.doc() = "Host-only data path of effkern: token packing and window gathering.";
  effkern::bind_pack(module);
  effkern::bind_windows(module);
}
