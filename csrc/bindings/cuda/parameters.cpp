#include "cuda/parameters.hpp"

#include <pybind11/stl.h>

#include <string>

#include "bindings/cuda/bindings.hpp"

namespace py = pybind11;

namespace pipex::cuda {

std::vector<Parameter> to_parameters(const py::sequence& parameters) {
  std::vector<Parameter> result;
  for (const py::handle parameter : parameters) {
    if (py::isinstance<TileForm>(parameter))
      result.emplace_back(parameter.cast<TileForm>());
    else
      result.emplace_back(scalar(parameter.cast<std::string>()));
  }
  return result;
}

void bind_parameters(py::module_& module) {
  py::class_<TileForm>(module, "Tile", plain_type())
      .def(py::init(&tile_form), py::arg("element_type"), py::arg("element_bytes"), py::arg("swizzle"), py::arg("box"));

  module.def(
      "parameter_layout",
      [](const py::sequence& parameters) {
        const ParameterLayout layout(to_parameters(parameters));
        py::list fields;
        for (const Field& field : layout.fields()) fields.append(py::make_tuple(field.offset, field.size));
        return fields;
      },
      py::arg("parameters"));
}

}  // namespace pipex::cuda
