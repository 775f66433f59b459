// How a NamedError becomes the Python exception that it names; both native modules translate alike.
#pragma once

#include <pybind11/pybind11.h>

#include "common/named_error.hpp"

namespace pipex {

inline pybind11::object or_none(const std::string& text) {
  if (text.empty()) return pybind11::none();
  return pybind11::str(text);
}

inline void raise(const NamedError& error) {
  using pybind11::literals::operator""_a;
  const pybind11::object type = pybind11::module_::import("pipex.errors").attr(error.python_class);
  const pybind11::object instance = type(error.problem, "got"_a = or_none(error.got),
                                         "needed"_a = or_none(error.needed), "fix"_a = or_none(error.fix));
  PyErr_SetObject(type.ptr(), instance.ptr());
}

}  // namespace pipex
