// Rows of a token stream that lies in several memory-mapped shards. Pages are read from disk inside the copy,
// so it runs without the GIL.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "data.h"

namespace py = pybind11;

namespace effkern {
namespace {

template <typename T>
struct Stream {
  std::vector<const T*> data;
  // Shard k holds the tokens [first[k], first[k + 1]).
  std::vector<int64_t> first{0};

  void copy(int64_t start, int64_t length, int64_t* out) const {
    size_t shard = std::upper_bound(first.begin(), first.end(), start) - first.begin() - 1;
    while (length > 0) {
      const int64_t count = std::min(length, first[shard + 1] - start);
      const T* source = data[shard] + (start - first[shard]);
      for (int64_t i = 0; i < count; ++i) out[i] = source[i];
      out += count;
      start += count;
      length -= count;
      ++shard;
    }
  }
};

template <typename T>
py::array gather(const py::list& shards, const py::array_t<int64_t, py::array::c_style>& starts, int64_t length) {
  Stream<T> stream;
  // Own references and an own copy of the starts: other threads may change both lists once the GIL is free.
  const py::tuple keep(shards);
  for (py::handle shard : keep) {
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(shard)) {
      throw py::type_error("gather_windows: shards must be contiguous arrays of one dtype, uint16 or uint32");
    }
    const auto array = py::reinterpret_borrow<py::array>(shard);
    if (array.ndim() != 1) {
      throw py::value_error("gather_windows: shards must have 1 dimension, got " + std::to_string(array.ndim()));
    }
    stream.data.push_back(static_cast<const T*>(array.data()));
    stream.first.push_back(stream.first.back() + array.size());
  }
  const int64_t last = stream.first.back() - length;
  const std::vector<int64_t> start(starts.data(), starts.data() + starts.size());
  const int64_t rows = static_cast<int64_t>(start.size());
  for (int64_t row = 0; row < rows; ++row) {
    if (start[row] < 0 || start[row] > last) {
      throw py::value_error("gather_windows: starts must lie in [0, " + std::to_string(last) + "], got " +
                            std::to_string(start[row]));
    }
  }
  py::array_t<int64_t> windows({rows, length});
  int64_t* out = windows.mutable_data();
  {
    const py::gil_scoped_release release;
    for (int64_t row = 0; row < rows; ++row) stream.copy(start[row], length, out + row * length);
  }
  return windows;
}

py::array gather_windows(const py::list& shards, const py::array_t<int64_t, py::array::c_style>& starts,
                         int64_t length) {
  if (starts.ndim() != 1) {
    throw py::value_error("gather_windows: starts must have 1 dimension, got " + std::to_string(starts.ndim()));
  }
  if (length < 1) throw py::value_error("gather_windows: length must be at least 1, got " + std::to_string(length));
  const bool narrow = !shards.empty() && py::isinstance<py::array_t<uint16_t>>(shards[0]);
  return narrow ? gather<uint16_t>(shards, starts, length) : gather<uint32_t>(shards, starts, length);
}

}  // namespace

void bind_windows(py::module_& module) {
  module.def("gather_windows", &gather_windows, py::arg("shards"), py::arg("starts").noconvert(), py::arg("length"),
             "int64 rows stream[start : start + length] of the stream that the shards make up in their order.");
}

}  // namespace effkern
