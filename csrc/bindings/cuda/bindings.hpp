// What the binding files of pipex._cuda share: one function per bound header.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "cuda/parameters.hpp"

namespace pipex::cuda {

void bind_parameters(pybind11::module_& module);
void bind_launcher(pybind11::module_& module);
void bind_gradients(pybind11::module_& module);

/// Scalars come as their names, tensor descriptors as a Tile.
std::vector<Parameter> to_parameters(const pybind11::sequence& parameters);

/// Python's own metaclass instead of pybind11's, so that a stub can describe the class.
inline pybind11::metaclass plain_type() { return pybind11::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)); }

}  // namespace pipex::cuda
