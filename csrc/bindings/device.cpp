#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <string_view>

#include "bindings/bindings.hpp"
#include "bindings/capsule.hpp"
#include "common/named_error.hpp"
#include "device/rank.hpp"
#include "device/ring.hpp"

namespace py = pybind11;

namespace pipex {
namespace {

using device::MemoryOffer;
using device::Rank;
using device::StreamHandle;

py::bytes to_bytes(const MemoryOffer& offer) { return {reinterpret_cast<const char*>(&offer), sizeof offer}; }

MemoryOffer to_offer(const py::bytes& raw) {
  const auto view = static_cast<std::string_view>(raw);
  MemoryOffer offer;
  if (view.size() != sizeof offer)
    throw NamedError("InputError", "this is no offer of device memory", std::to_string(view.size()) + " bytes",
                     std::to_string(sizeof offer), "");
  std::memcpy(&offer, view.data(), sizeof offer);
  return offer;
}

StreamHandle to_stream(std::uintptr_t stream) { return reinterpret_cast<StreamHandle>(stream); }

py::tuple receive_on_device(device::RingReceiver& ring, std::uintptr_t stream, std::uint64_t step,
                            std::uint32_t microbatch, bool may_grow) {
  Received received;
  const MessageForm* form = nullptr;
  {
    const py::gil_scoped_release no_gil;
    received = ring.receive(to_stream(stream), step, microbatch, may_grow, form);
  }
  const py::object seen = to_python(form);
  if (received.empty()) return py::make_tuple(seen, py::none());
  return py::make_tuple(seen, to_capsules(std::move(received)));
}

}  // namespace

void bind_device(py::module_& module) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  py::class_<Rank, std::shared_ptr<Rank>>(module, "DeviceRank", plain_type())
      .def(py::init([](std::shared_ptr<Member> member, const std::string& library, int ordinal, int device_type) {
             const std::int32_t id = device_type == dlpack::kCpu ? 0 : ordinal;
             return std::make_shared<Rank>(std::move(member), library, ordinal, dlpack::Device{device_type, id});
           }),
           py::arg("member"), py::arg("library"), py::arg("ordinal"), py::arg("device_type"), no_gil)
      .def("missing", &Rank::missing, no_gil)
      .def_property_readonly("sent", &Rank::sent)
      .def("flush", &Rank::flush, no_gil)
      .def("free_retired", &Rank::free_retired, no_gil)
      .def("close", &Rank::close, no_gil);

  py::class_<device::RingSender>(module, "DeviceRingSender", plain_type())
      .def(py::init([](std::shared_ptr<Rank> rank, int peer, std::uint32_t under_way, std::uint32_t alive,
                       const py::bytes& header) {
             return std::make_unique<device::RingSender>(std::move(rank), peer, RingSize{under_way, alive},
                                                         to_header(header));
           }),
           py::arg("rank"), py::arg("peer"), py::arg("under_way"), py::arg("alive"), py::arg("header"))
      .def_property_readonly("offer", [](const device::RingSender& ring) { return to_bytes(ring.offer()); })
      .def_property_readonly("grown", &device::RingSender::grown)
      .def_property_readonly("nbytes", &device::RingSender::bytes)
      .def("close_descriptors", &device::RingSender::close_descriptors)
      .def(
          "connect",
          [](device::RingSender& ring, const py::bytes& address, const py::bytes& offer) {
            ring.connect(to_address(address), to_offer(offer));
          },
          py::arg("address"), py::arg("offer"))
      .def(
          "fits",
          [](device::RingSender& ring, const MessageForm& form, std::uintptr_t stream) {
            return ring.fits(form.payload_bytes(), to_stream(stream));
          },
          py::arg("form"), py::arg("stream"), no_gil)
      .def(
          "send",
          [](device::RingSender& ring, const MessageForm& form, const std::vector<std::uintptr_t>& tensors,
             std::uintptr_t stream, std::uint64_t step, std::uint32_t microbatch) {
            check_number(form, tensors);
            const py::gil_scoped_release no_gil;
            ring.send(form, tensors, to_stream(stream), step, microbatch);
          },
          py::arg("form"), py::arg("tensors"), py::arg("stream"), py::arg("step"), py::arg("microbatch"))
      .def(
          "send_from_host",
          [](device::RingSender& ring, const MessageForm& form, const std::vector<std::uintptr_t>& tensors,
             std::uint64_t step, std::uint32_t microbatch) {
            check_number(form, tensors);
            const py::gil_scoped_release no_gil;
            ring.send_from_host(form, tensors, step, microbatch);
          },
          py::arg("form"), py::arg("tensors"), py::arg("step"), py::arg("microbatch"))
      .def("close", &device::RingSender::close, no_gil);

  py::class_<device::RingReceiver>(module, "DeviceRingReceiver", plain_type())
      .def(py::init([](std::shared_ptr<Rank> rank, int peer, std::uint32_t under_way, std::uint32_t alive,
                       const py::bytes& header) {
             return std::make_unique<device::RingReceiver>(std::move(rank), peer, RingSize{under_way, alive},
                                                           to_header(header));
           }),
           py::arg("rank"), py::arg("peer"), py::arg("under_way"), py::arg("alive"), py::arg("header"))
      .def_property_readonly("address", [](const device::RingReceiver& ring) { return to_bytes(ring.address()); })
      .def_property_readonly("offer", [](const device::RingReceiver& ring) { return to_bytes(ring.offer()); })
      .def_property_readonly("lent", &device::RingReceiver::lent)
      .def(
          "connect", [](device::RingReceiver& ring, const py::bytes& offer) { ring.connect(to_offer(offer)); },
          py::arg("offer"))
      .def("close_descriptor", &device::RingReceiver::close_descriptor)
      .def("receive", &receive_on_device, py::arg("stream"), py::arg("step"), py::arg("microbatch"),
           py::arg("may_grow") = true)
      .def(
          "receive_into",
          [](device::RingReceiver& ring, const std::vector<std::uintptr_t>& to, std::uintptr_t stream,
             std::uint64_t step, std::uint32_t microbatch) {
            const py::gil_scoped_release no_gil;
            ring.receive_into(to, to_stream(stream), step, microbatch);
          },
          py::arg("to"), py::arg("stream"), py::arg("step"), py::arg("microbatch"))
      .def("close", &device::RingReceiver::close, no_gil);
}

}  // namespace pipex
