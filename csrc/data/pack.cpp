// Token lists, as a tokenizer returns them, to one array of the narrowest unsigned type.
#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

#include "data.h"

namespace py = pybind11;

namespace effkern {
namespace {

[[noreturn]] void out_of_range(py::handle token, int64_t vocab_size) {
  throw py::value_error("pack_tokens: token id must lie in [0, " + std::to_string(vocab_size) + "), got " +
                        std::string(py::str(token)));
}

int64_t token_id(PyObject* item, int64_t vocab_size) {
  py::object index;
  if (!PyLong_Check(item)) {
    index = py::reinterpret_steal<py::object>(PyNumber_Index(item));
    if (!index) {
      PyErr_Clear();
      throw py::type_error("pack_tokens: token id must be an integer, got " +
                           std::string(py::str(py::type::of(item).attr("__name__"))));
    }
    item = index.ptr();
  }
  int overflow = 0;
  const int64_t id = PyLong_AsLongLongAndOverflow(item, &overflow);
  if (overflow != 0 || id < 0 || id >= vocab_size) out_of_range(item, vocab_size);
  return id;
}

template <typename T>
py::array fill(const py::tuple& pieces, int64_t total, int64_t vocab_size) {
  py::array_t<T> packed(total);
  T* out = packed.mutable_data();
  int64_t written = 0;
  for (py::handle piece : pieces) {
    // __index__ of a token may run Python code, so the size is read again at every step.
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(piece.ptr()); ++i) {
      if (written == total) throw py::value_error("pack_tokens: pieces must not change while they are packed");
      const py::object keep = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(piece.ptr(), i));
      out[written++] = static_cast<T>(token_id(keep.ptr(), vocab_size));
    }
  }
  if (written != total) throw py::value_error("pack_tokens: pieces must not change while they are packed");
  return packed;
}

py::array pack_tokens(const py::list& list, int64_t vocab_size) {
  if (vocab_size < 1 || vocab_size > (int64_t{1} << 32)) {
    throw py::value_error("pack_tokens: vocab_size must lie in [1, 2**32], got " + std::to_string(vocab_size));
  }
  const py::tuple pieces(list);
  int64_t total = 0;
  for (py::handle piece : pieces) {
    if (!PyList_Check(piece.ptr())) {
      throw py::type_error("pack_tokens: pieces must be lists of integers, got " +
                           std::string(py::str(py::type::of(piece).attr("__name__"))));
    }
    total += PyList_GET_SIZE(piece.ptr());
  }
  return vocab_size <= 65536 ? fill<uint16_t>(pieces, total, vocab_size) : fill<uint32_t>(pieces, total, vocab_size);
}

}  // namespace

void bind_pack(py::module_& module) {
  module.def("pack_tokens", &pack_tokens, py::arg("pieces"), py::arg("vocab_size"),
             "Concatenate lists of token ids; uint16 where vocab_size <= 65536, else uint32.");
}

}  // namespace effkern
