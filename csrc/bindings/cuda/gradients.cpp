#include "cuda/gradients.hpp"

#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "bindings/cuda/bindings.hpp"

namespace py = pybind11;

namespace pipex::cuda {
namespace {

using PartList = std::vector<std::pair<std::uintptr_t, std::int64_t>>;

std::vector<Part> to_parts(const PartList& parts) {
  std::vector<Part> result;
  for (const auto& [address, rows] : parts) result.push_back({reinterpret_cast<const void*>(address), rows});
  return result;
}

template <typename Pointer>
Pointer to(std::uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

}  // namespace

void bind_gradients(py::module_& module) {
  module.def("bias_gradient_workspace", &bias_gradient_workspace, py::arg("rows"), py::arg("columns"));
  module.def("embedding_gradient_workspace", &embedding_gradient_workspace, py::arg("rows"), py::arg("columns"));

  module.def(
      "add_bias_gradient",
      [](const PartList& parts, const std::string& number_type, std::int64_t columns, std::uintptr_t gradient,
         const std::string& gradient_type, std::uintptr_t workspace, std::size_t workspace_bytes,
         std::uintptr_t stream) {
        add_bias_gradient(to_parts(parts), to_number_type(number_type), columns,
                          {to<void*>(gradient), to_number_type(gradient_type)}, {to<void*>(workspace), workspace_bytes},
                          to<cudaStream_t>(stream));
      },
      py::arg("parts"), py::arg("number_type"), py::arg("columns"), py::arg("gradient"), py::arg("gradient_type"),
      py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"));

  module.def(
      "add_norm_gradient",
      [](const PartList& parts, std::int64_t columns, std::uintptr_t gradient, const std::string& gradient_type,
         std::uintptr_t stream) {
        add_norm_gradient(to_parts(parts), columns, {to<void*>(gradient), to_number_type(gradient_type)},
                          to<cudaStream_t>(stream));
      },
      py::arg("parts"), py::arg("columns"), py::arg("gradient"), py::arg("gradient_type"), py::arg("stream"));

  module.def(
      "add_embedding_gradient",
      [](const PartList& parts, const std::string& number_type, std::int64_t columns, std::uintptr_t ids,
         std::uintptr_t order, std::uintptr_t gradient, const std::string& gradient_type, std::int64_t vocabulary,
         std::int64_t padding, std::uintptr_t workspace, std::size_t workspace_bytes, std::uintptr_t stream) {
        add_embedding_gradient(to_parts(parts), to_number_type(number_type), columns,
                               {to<const std::int64_t*>(ids), to<const std::int64_t*>(order)},
                               {to<void*>(gradient), to_number_type(gradient_type)}, vocabulary, padding,
                               {to<void*>(workspace), workspace_bytes}, to<cudaStream_t>(stream));
      },
      py::arg("parts"), py::arg("number_type"), py::arg("columns"), py::arg("ids"), py::arg("order"),
      py::arg("gradient"), py::arg("gradient_type"), py::arg("vocabulary"), py::arg("padding"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("stream"));

  module.def(
      "add_to_main_gradient",
      [](std::uintptr_t gradient, const std::string& number_type, std::uintptr_t main, std::int64_t count,
         std::uintptr_t stream) {
        add_to_main_gradient(to<const void*>(gradient), to_number_type(number_type), to<float*>(main), count,
                             to<cudaStream_t>(stream));
      },
      py::arg("gradient"), py::arg("number_type"), py::arg("main"), py::arg("count"), py::arg("stream"));

  module.def(
      "cast_main_gradient",
      [](std::uintptr_t main, std::uintptr_t gradient, const std::string& number_type, std::int64_t count,
         std::uintptr_t stream) {
        cast_main_gradient(to<const float*>(main), to<void*>(gradient), to_number_type(number_type), count,
                           to<cudaStream_t>(stream));
      },
      py::arg("main"), py::arg("gradient"), py::arg("number_type"), py::arg("count"), py::arg("stream"));
}

}  // namespace pipex::cuda
