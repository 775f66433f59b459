#include "host/member.hpp"

#include <chrono>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pipex {
namespace {

/// Lets Ctrl-C end a wait.
void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::shared_ptr<Member> join(std::shared_ptr<Control> control, int rank, double timeout, bool spin) {
  const auto limit = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(timeout));
  return std::make_shared<Member>(std::move(control), rank, limit, spin, check_signals);
}

py::list exchange(Member& member, const py::bytes& payload) {
  const auto view = static_cast<std::string_view>(payload);
  std::vector<std::string> payloads;
  {
    const py::gil_scoped_release no_gil;
    payloads = member.exchange(view);
  }
  py::list result;
  for (const std::string& bytes : payloads) result.append(py::bytes(bytes));
  return result;
}

}  // namespace

void bind_member(py::module_& module) {
  py::class_<Member, std::shared_ptr<Member>>(module, "Member", plain_type())
      .def(py::init(&join), py::arg("control"), py::arg("rank"), py::arg("timeout"), py::arg("spin"))
      .def_property_readonly("rank", &Member::rank)
      .def(
          "at", [](Member& member, std::uint32_t step, std::int32_t position) { member.at({step, position}); },
          py::arg("step"), py::arg("position"))
      .def("exchange", &exchange, py::arg("payload"))
      .def(
          "fail",
          [](Member& member, const std::string& text) {
            member.control().record(member.rank(), Ending::failed, member.rank(), text);
          },
          py::arg("text"))
      .def("leave", &Member::leave, py::call_guard<py::gil_scoped_release>());
}

}  // namespace pipex
