#include "bindings/cuda/bindings.hpp"
#include "bindings/named_error.hpp"
#include "cuda/toolkit.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, module) {
  module.doc() =
      "The CUDA part of pipex. Loads without a driver; what needs one raises pipex.errors.NativeUnavailable.";
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const pipex::NamedError& error) {
      pipex::raise(error);
    }
  });
  module.attr("toolkit") = pipex::cuda::toolkit();
  module.attr("architectures") = PIPEX_CUDA_ARCHITECTURES;
  module.def("device_count", &pipex::cuda::device_count);
  pipex::cuda::bind_parameters(module);
  pipex::cuda::bind_launcher(module);
  pipex::cuda::bind_gradients(module);
}
