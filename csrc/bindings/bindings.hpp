// What the binding files share: one function per bound header, and how addresses and errors cross.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "host/message.hpp"
#include "host/segment.hpp"

namespace pipex {

void bind_errors(pybind11::module_& module);
void bind_control(pybind11::module_& module);
void bind_member(pybind11::module_& module);
void bind_ring(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_list_scheduler(pybind11::module_& module);

/// Python's own metaclass instead of pybind11's (which adds static properties), so that a stub can describe the class.
inline pybind11::metaclass plain_type() { return pybind11::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)); }

pybind11::bytes to_bytes(const Address& address);

/// Throws InputError for bytes of another length.
Address to_address(const pybind11::bytes& raw);

MessageHeader to_header(const pybind11::bytes& raw);

/// Throws if there are not as many addresses as the form has tensors.
void check_number(const MessageForm& form, const std::vector<std::uintptr_t>& tensors);

}  // namespace pipex
