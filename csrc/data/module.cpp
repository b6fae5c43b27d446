#include "data.h"

PYBIND11_MODULE(_data, module) {
  module.doc() = "Host-only data path of effkern: token packing, window gathering, soft labels, clustering.";
  effkern::bind_linkage(module);
  effkern::bind_pack(module);
  effkern::bind_segments(module);
  effkern::bind_soft_labels(module);
  effkern::bind_windows(module);
}
