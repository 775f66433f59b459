#include "host/ring.hpp"

#include <pybind11/stl.h>

#include <cstring>

#include "bindings/bindings.hpp"
#include "bindings/capsule.hpp"

namespace py = pybind11;

namespace pipex {

MessageHeader to_header(const py::bytes& raw) {
  const auto view = static_cast<std::string_view>(raw);
  MessageHeader header;
  if (view.size() != sizeof header) throw std::invalid_argument("a message header has 64 bytes");
  std::memcpy(&header, view.data(), sizeof header);
  return header;
}

void check_number(const MessageForm& form, const std::vector<std::uintptr_t>& tensors) {
  if (tensors.size() != form.count()) throw std::invalid_argument("a form of another number of tensors");
}

namespace {

py::tuple receive_message(RingReceiver& ring, std::uint64_t step, std::uint32_t microbatch) {
  Received received;
  const MessageForm* form = nullptr;
  {
    const py::gil_scoped_release no_gil;
    received = ring.receive(step, microbatch, form);
  }
  return py::make_tuple(to_python(form), to_capsules(std::move(received)));
}

}  // namespace

void bind_ring(py::module_& module) {
  py::class_<MessageForm>(module, "MessageForm", plain_type())
      .def(py::init([](const py::bytes& table, std::uint64_t payload_bytes) {
             return MessageForm(std::string(table), payload_bytes);
           }),
           py::arg("table"), py::arg("payload_bytes"));

  py::class_<Outbox>(module, "RingSender", plain_type())
      .def(py::init([](std::shared_ptr<Member> member, int peer, const py::bytes& address, std::uint32_t under_way,
                       std::uint32_t alive, const py::bytes& header) {
             return std::make_unique<Outbox>(std::move(member), peer, to_address(address), RingSize{under_way, alive},
                                             to_header(header));
           }),
           py::arg("member"), py::arg("peer"), py::arg("address"), py::arg("under_way"), py::arg("alive"),
           py::arg("header"))
      .def_property_readonly("grown", &Outbox::grown)
      .def_property_readonly("nbytes", &Outbox::bytes)
      .def("close_descriptors", &Outbox::close_descriptors)
      .def(
          "send",
          [](Outbox& ring, const MessageForm& form, const std::vector<std::uintptr_t>& tensors, std::uint64_t step,
             std::uint32_t microbatch) {
            check_number(form, tensors);
            const py::gil_scoped_release no_gil;
            ring.send(form, tensors, step, microbatch);
          },
          py::arg("form"), py::arg("tensors"), py::arg("step"), py::arg("microbatch"));

  py::class_<RingReceiver>(module, "RingReceiver", plain_type())
      .def(py::init([](std::shared_ptr<Member> member, int peer, std::uint32_t under_way, std::uint32_t alive,
                       const py::bytes& header) {
             return std::make_unique<RingReceiver>(std::move(member), peer, RingSize{under_way, alive},
                                                   to_header(header));
           }),
           py::arg("member"), py::arg("peer"), py::arg("under_way"), py::arg("alive"), py::arg("header"))
      .def_property_readonly("address", [](const RingReceiver& ring) { return to_bytes(ring.address()); })
      .def_property_readonly("lent", &RingReceiver::lent)
      .def("close_descriptor", &RingReceiver::close_descriptor)
      .def("receive", &receive_message, py::arg("step"), py::arg("microbatch"));
}

}  // namespace pipex
