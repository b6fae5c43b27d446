#include "data.h"

PYBIND11_MODULE(_data, module) {
  module.doc() = "Host-only data path of effkern: token packing, window gathering, soft labels.";
  effkern::bind_pack(module);
  effkern::bind_soft_labels(module);
  effkern::bind_windows(module);
}
