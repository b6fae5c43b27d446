// What each file of this folder adds to effkern._data. Host only; every function has a NumPy twin in
// effkern/data/fallback.py with the same results and the same messages.
#pragma once

#include <pybind11/pybind11.h>

namespace effkern {

void bind_linkage(pybind11::module_& module);
void bind_pack(pybind11::module_& module);
void bind_segments(pybind11::module_& module);
void bind_soft_labels(pybind11::module_& module);
void bind_windows(pybind11::module_& module);

}  // namespace effkern
