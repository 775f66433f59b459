#include <cstring>
#include <string>
#include <string_view>

#include "bindings/bindings.hpp"
#include "common/named_error.hpp"

namespace py = pybind11;

namespace pipex {

py::bytes to_bytes(const Address& address) { return {reinterpret_cast<const char*>(&address), sizeof address}; }

Address to_address(const py::bytes& raw) {
  const auto view = static_cast<std::string_view>(raw);
  Address address;
  if (view.size() != sizeof address)
    throw NamedError("InputError", "this is not an address of shared memory", std::to_string(view.size()) + " bytes",
                     std::to_string(sizeof address), "");
  std::memcpy(&address, view.data(), sizeof address);
  return address;
}

}  // namespace pipex

PYBIND11_MODULE(_native, module) {
  module.doc() =
      "The part of pipex in C++ that needs no CUDA toolkit: shared memory, rings, the watch over peers, plans. Knows "
      "no "
      "torch.";
  module.attr("without_cuda") = PIPEX_WITHOUT_CUDA;
  pipex::bind_errors(module);
  pipex::bind_control(module);
  pipex::bind_member(module);
  pipex::bind_ring(module);
  pipex::bind_device(module);
  pipex::bind_list_scheduler(module);
}
