// The Python side of a compiled module: an empty extension whose import runs the operator registrations.
#include <Python.h>

#define EFFKERN_PASTE(a, b) a##b
#define EFFKERN_INIT(name) EFFKERN_PASTE(PyInit_, name)
#define EFFKERN_TEXT(name) #name
#define EFFKERN_NAME(name) EFFKERN_TEXT(name)

PyMODINIT_FUNC EFFKERN_INIT(EFFKERN_MODULE)(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, EFFKERN_NAME(EFFKERN_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
