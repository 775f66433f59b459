// How a received message crosses to torch: a DLPack capsule for each tensor.
#pragma once

#include <pybind11/pybind11.h>

#include "host/lender.hpp"

namespace pipex {

/// A capsule that nobody takes over (an error in between) gives its tensor back.
inline void release_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, dlpack::kCapsuleName)) return;
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
  managed->deleter(managed);
}

inline pybind11::tuple to_capsules(Received received) {
  const std::size_t count = received.count();
  pybind11::tuple capsules(count);
  for (std::size_t i = 0; i < count; ++i) {
    dlpack::ManagedTensor* const managed = received.release();
    PyObject* const capsule = PyCapsule_New(managed, dlpack::kCapsuleName, release_capsule);
    if (capsule == nullptr) {
      managed->deleter(managed);
      throw pybind11::error_already_set();
    }
    PyTuple_SET_ITEM(capsules.ptr(), static_cast<Py_ssize_t>(i), capsule);
  }
  return capsules;
}

/// The table and the bytes of a form that the caller has not seen yet; None where it has.
inline pybind11::object to_python(const MessageForm* form) {
  if (form == nullptr) return pybind11::none();
  return pybind11::make_tuple(pybind11::bytes(form->table()), form->payload_bytes());
}

}  // namespace pipex
