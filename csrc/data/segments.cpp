// Mean and spread of values, and the largest source, of every cluster: one pass over the examples.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "data.h"

namespace py = pybind11;

namespace effkern {
namespace {

py::tuple segment_stats(const py::array_t<int64_t, py::array::c_style>& labels,
                        const py::array_t<double, py::array::c_style>& values,
                        const py::array_t<int64_t, py::array::c_style>& sources, int64_t num_segments,
                        int64_t num_sources) {
  const int64_t num = labels.size();
  if (labels.ndim() != 1 || values.ndim() != 1 || sources.ndim() != 1 || values.size() != num ||
      sources.size() != num) {
    throw py::value_error("segment_stats: labels, values and sources must be vectors of one length");
  }
  py::array_t<int64_t> counts(num_segments), largest(num_segments);
  py::array_t<double> means(num_segments), squares(num_segments);
  int64_t* count = counts.mutable_data();
  int64_t* top = largest.mutable_data();
  double* mean = means.mutable_data();
  double* square = squares.mutable_data();
  std::fill_n(count, num_segments, int64_t{0});
  std::fill_n(top, num_segments, int64_t{0});
  std::fill_n(mean, num_segments, 0.0);
  std::fill_n(square, num_segments, 0.0);
  std::vector<int32_t> of_source(static_cast<size_t>(num_segments * num_sources));
  for (int64_t i = 0; i < num; ++i) {
    const int64_t k = labels.data()[i], s = sources.data()[i];
    if (k < 0) continue;
    if (k >= num_segments || s < 0 || s >= num_sources) {
      throw py::value_error("segment_stats: labels and sources must be below " + std::to_string(num_segments) +
                            " and " + std::to_string(num_sources) + ", got " + std::to_string(k) + " and " +
                            std::to_string(s));
    }
    // Welford: squares of deviations from the mean so far, without the difference of large numbers.
    const double off = values.data()[i] - mean[k];
    mean[k] += off / static_cast<double>(++count[k]);
    square[k] += off * (values.data()[i] - mean[k]);
    top[k] = std::max<int64_t>(top[k], ++of_source[k * num_sources + s]);
  }
  return py::make_tuple(counts, means, squares, largest);
}

}  // namespace

void bind_segments(py::module_& module) {
  module.def("segment_stats", &segment_stats, py::arg("labels").noconvert(), py::arg("values").noconvert(),
             py::arg("sources").noconvert(), py::arg("num_segments"), py::arg("num_sources"),
             "counts, means, sums of squared deviations and size of the largest source, of each segment.");
}

}  // namespace effkern
