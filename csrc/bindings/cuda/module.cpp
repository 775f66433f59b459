#include <pybind11/pybind11.h>

#include "cuda/toolkit.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA part of pipex. Loads without a driver; what needs one raises pipex.errors.NativeUnavailable.";

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const pipex::cuda::CudaError& failure) {
      const py::object kind = py::module_::import("pipex.errors").attr("NativeUnavailable");
      py::set_error(kind, failure.what());
    }
  });

  m.attr("toolkit") = pipex::cuda::toolkit();
  m.attr("architectures") = PIPEX_CUDA_ARCHITECTURES;
  m.def("device_count", &pipex::cuda::device_count);
}
