// Entries of soft labels: an id in the low bits and a code in the high bits of 3 or 4 little-endian bytes.
// What a code means is in tables that Python makes, so that both implementations give the same bits.
#include <pybind11/numpy.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

#include "data.h"

namespace py = pybind11;

namespace effkern {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr float kInf = std::numeric_limits<float>::infinity();

void check_layout(const std::string& op, int64_t id_bits, int64_t width) {
  if ((width != 3 && width != 4) || id_bits < 1 || id_bits >= 8 * width) {
    throw py::value_error(op + ": width must be 3 or 4 and id_bits in [1, 8 * width), got " + std::to_string(width) +
                          " and " + std::to_string(id_bits));
  }
}

[[noreturn]] void does_not_fit(const char* what, int64_t limit, int64_t got) {
  throw py::value_error(std::string("pack_soft_labels: ") + what + " must lie in [0, " + std::to_string(limit) +
                        "), got " + std::to_string(got));
}

py::tuple pack_soft_labels(const Array<int32_t>& ids, const Array<int32_t>& codes, int64_t id_bits, int64_t width) {
  check_layout("pack_soft_labels", id_bits, width);
  if (ids.ndim() != 2 || codes.ndim() != 2 || ids.shape(0) != codes.shape(0) || ids.shape(1) != codes.shape(1)) {
    throw py::value_error("pack_soft_labels: ids and codes must have the same two dimensions");
  }
  const int64_t rows = ids.shape(0), slots = ids.shape(1);
  if (slots > 65535) {
    throw py::value_error("pack_soft_labels: a row must have at most 65535 slots, got " + std::to_string(slots));
  }
  const int64_t id_limit = int64_t{1} << id_bits, code_limit = int64_t{1} << (8 * width - id_bits);
  const int32_t* id = ids.data();
  const int32_t* code = codes.data();
  int64_t total = 0;
  for (int64_t i = 0; i < rows * slots; ++i) {
    if (id[i] < 0) continue;
    if (id[i] >= id_limit) does_not_fit("id", id_limit, id[i]);
    if (code[i] < 0 || code[i] >= code_limit) does_not_fit("code", code_limit, code[i]);
    ++total;
  }
  Array<uint8_t> entries(total * width);
  Array<uint16_t> counts(rows);
  uint8_t* out = entries.mutable_data();
  uint16_t* count = counts.mutable_data();
  {
    const py::gil_scoped_release release;
    for (int64_t r = 0; r < rows; ++r) {
      count[r] = 0;
      for (int64_t i = r * slots; i < (r + 1) * slots; ++i) {
        if (id[i] < 0) continue;
        const uint32_t word = static_cast<uint32_t>(id[i]) | static_cast<uint32_t>(code[i]) << id_bits;
        for (int64_t byte = 0; byte < width; ++byte) *out++ = static_cast<uint8_t>(word >> (8 * byte));
        ++count[r];
      }
    }
  }
  return py::make_tuple(entries, counts);
}

struct Unpack {
  const uint8_t* entries;
  const uint16_t* counts;
  int64_t rows, id_bits, width, slots, vocab, head;
  const float* head_table;
  int64_t head_size;
  const float* tail_table;
  int64_t tail_size;
  const float* log_tail;

  // -1, or the number of the entry that is no entry of this cache.
  int64_t run(int32_t* ids, float* logprobs) const {
    const uint32_t mask = (uint32_t{1} << id_bits) - 1;
    const uint8_t* at = entries;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t count = counts[r];
      for (int64_t j = 0; j < count; ++j, at += width) {
        uint32_t word = 0;
        for (int64_t byte = 0; byte < width; ++byte) word |= static_cast<uint32_t>(at[byte]) << (8 * byte);
        const int64_t id = word & mask, code = word >> id_bits;
        if (id >= vocab || code >= (j < head ? head_size : tail_size)) return (at - entries) / width;
        ids[r * slots + j] = static_cast<int32_t>(id);
        logprobs[r * slots + j] = j < head ? head_table[code] : log_tail[r] + tail_table[code];
      }
      for (int64_t j = count; j < slots; ++j) {
        ids[r * slots + j] = -1;
        logprobs[r * slots + j] = -kInf;
      }
    }
    return -1;
  }
};

py::tuple unpack_soft_labels(const Array<uint8_t>& entries, const Array<uint16_t>& counts, int64_t id_bits,
                             int64_t width, int64_t slots, int64_t vocab, int64_t head,
                             const Array<float>& head_table, const Array<float>& tail_table,
                             const Array<float>& log_tail) {
  check_layout("unpack_soft_labels", id_bits, width);
  const int64_t rows = counts.size();
  if (log_tail.size() != rows) {
    throw py::value_error("unpack_soft_labels: log_tail must have one value per row (" + std::to_string(rows) +
                          "), got " + std::to_string(log_tail.size()));
  }
  int64_t total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t count = counts.data()[r];
    if (count > slots) {
      throw py::value_error("unpack_soft_labels: counts must be at most slots=" + std::to_string(slots) + ", got " +
                            std::to_string(count));
    }
    total += count;
  }
  if (entries.size() != total * width) {
    throw py::value_error("unpack_soft_labels: entries must have " + std::to_string(total * width) + " bytes, got " +
                          std::to_string(entries.size()));
  }
  Array<int32_t> ids({rows, slots});
  Array<float> logprobs({rows, slots});
  const Unpack unpack{entries.data(), counts.data(), rows, id_bits, width, slots, vocab, head, head_table.data(),
                      head_table.size(), tail_table.data(), tail_table.size(), log_tail.data()};
  int32_t* out_ids = ids.mutable_data();
  float* out_logprobs = logprobs.mutable_data();
  int64_t wrong;
  {
    const py::gil_scoped_release release;
    wrong = unpack.run(out_ids, out_logprobs);
  }
  if (wrong >= 0) {
    throw py::value_error("unpack_soft_labels: entries must hold ids and codes of the cache, entry " +
                          std::to_string(wrong) + " does not");
  }
  return py::make_tuple(ids, logprobs);
}

}  // namespace

void bind_soft_labels(py::module_& module) {
  module.def("pack_soft_labels", &pack_soft_labels, py::arg("ids").noconvert(), py::arg("codes").noconvert(),
             py::arg("id_bits"), py::arg("width"), "uint8 entries of all rows behind each other, and uint16 counts.");
  module.def("unpack_soft_labels", &unpack_soft_labels, py::arg("entries").noconvert(), py::arg("counts").noconvert(),
             py::arg("id_bits"), py::arg("width"), py::arg("slots"), py::arg("vocab"), py::arg("head"),
             py::arg("head_table").noconvert(), py::arg("tail_table").noconvert(), py::arg("log_tail").noconvert(),
             "int32 ids and float32 log-probabilities [rows, slots], -1 and -inf in empty slots.");
}

}  // namespace effkern
