#include "host/ring.hpp"

#include <pybind11/stl.h>

#include <cstring>

#include "bindings/bindings.hpp"
#include "bindings/capsule.hpp"

namespace py = pybind11;

namespace pipex {
namespace {

TensorTemplate make_template(const py::bytes& header, const std::vector<std::int64_t>& shape, std::uint8_t code,
                             std::uint8_t bits) {
  const auto view = static_cast<std::string_view>(header);
  TensorHeader raw;
  if (view.size() != raw.size()) throw std::invalid_argument("a tensor header has 128 bytes");
  std::memcpy(raw.data(), view.data(), raw.size());
  return TensorTemplate(raw, shape, {code, bits, 1});
}

py::object receive(RingReceiver& ring, const TensorTemplate& tensor, std::uint64_t step, std::uint32_t microbatch) {
  LoanPtr loan;
  {
    const py::gil_scoped_release no_gil;
    loan = ring.receive(tensor, step, microbatch);
  }
  return to_capsule(std::move(loan));
}

}  // namespace

void bind_ring(py::module_& module) {
  py::class_<TensorTemplate>(module, "TensorTemplate", plain_type())
      .def(py::init(&make_template), py::arg("header"), py::arg("shape"), py::arg("code"), py::arg("bits"));

  py::class_<RingSender>(module, "RingSender", plain_type())
      .def(py::init([](std::shared_ptr<Member> member, int peer, const py::bytes& address, std::size_t bytes,
                       std::uint32_t under_way, std::uint32_t alive) {
             return std::make_unique<RingSender>(std::move(member), peer, to_address(address),
                                                 RingSize{bytes, under_way, alive});
           }),
           py::arg("member"), py::arg("peer"), py::arg("address"), py::arg("bytes"), py::arg("under_way"),
           py::arg("alive"))
      .def(
          "send",
          [](RingSender& ring, const TensorTemplate& tensor, std::uintptr_t data, std::uint64_t step,
             std::uint32_t microbatch) {
            ring.send(tensor, reinterpret_cast<const std::byte*>(data), step, microbatch);
          },
          py::arg("tensor"), py::arg("data"), py::arg("step"), py::arg("microbatch"),
          py::call_guard<py::gil_scoped_release>());

  py::class_<RingReceiver>(module, "RingReceiver", plain_type())
      .def(py::init([](std::shared_ptr<Member> member, int peer, std::size_t bytes, std::uint32_t under_way,
                       std::uint32_t alive) {
             return std::make_unique<RingReceiver>(std::move(member), peer, RingSize{bytes, under_way, alive});
           }),
           py::arg("member"), py::arg("peer"), py::arg("bytes"), py::arg("under_way"), py::arg("alive"))
      .def_property_readonly("address", [](const RingReceiver& ring) { return to_bytes(ring.address()); })
      .def_property_readonly("lent", &RingReceiver::lent)
      .def("close_descriptor", &RingReceiver::close_descriptor)
      .def("receive", &receive, py::arg("tensor"), py::arg("step"), py::arg("microbatch"));
}

}  // namespace pipex
