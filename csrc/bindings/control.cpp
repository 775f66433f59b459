#include "host/control.hpp"

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pipex {

void bind_control(py::module_& module) {
  py::class_<Control, std::shared_ptr<Control>>(module, "Control", plain_type())
      .def(py::init(&Control::create), py::arg("ranks"))
      .def_static("attach", &Control::attach, py::arg("fd"))
      .def_static(
          "open", [](const py::bytes& address) { return Control::open(to_address(address)); }, py::arg("address"))
      .def_property_readonly("ranks", &Control::ranks)
      .def_property_readonly("fd", &Control::fd)
      .def_property_readonly("address", [](const Control& control) { return to_bytes(control.address()); })
      .def_property_readonly("aborted", &Control::aborted)
      .def("raise_if_aborted", &Control::raise_if_aborted)
      .def(
          "lost",
          [](Control& control, int rank, const std::string& text) {
            control.record(control.ranks(), Ending::lost, rank, text);
          },
          py::arg("rank"), py::arg("text"))
      .def("close_descriptor", &Control::close_descriptor);
}

}  // namespace pipex
