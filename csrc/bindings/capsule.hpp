// How a received tensor crosses to torch: a DLPack capsule.
#pragma once

#include <pybind11/pybind11.h>

#include "host/lender.hpp"

namespace pipex {

/// A capsule that nobody takes over (an error in between) gives its buffer back.
inline void release_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, dlpack::kCapsuleName)) return;
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kCapsuleName));
  managed->deleter(managed);
}

inline pybind11::object to_capsule(LoanPtr loan) {
  auto capsule = pybind11::reinterpret_steal<pybind11::object>(
      PyCapsule_New(&loan->managed, dlpack::kCapsuleName, release_capsule));
  if (!capsule) throw pybind11::error_already_set();
  loan.release();
  return capsule;
}

}  // namespace pipex
