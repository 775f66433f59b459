#include "cuda/launcher.hpp"

#include <pybind11/stl.h>

#include "bindings/cuda/bindings.hpp"

namespace py = pybind11;

namespace pipex::cuda {
namespace {

/// On the stack for any number of values that a kernel can take in practice: a launch allocates nothing.
class Values {
 public:
  Values(const py::tuple& values, const std::vector<bool>& reals) {
    if (values.size() != reals.size())
      throw py::type_error("a launch of this kernel takes " + std::to_string(reals.size()) + " values, not " +
                           std::to_string(values.size()));
    if (reals.size() > few_.size()) many_.resize(reals.size());
    all_ = {many_.empty() ? few_.data() : many_.data(), reals.size()};
    for (std::size_t i = 0; i < reals.size(); ++i) {
      PyObject* const item = PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i));
      if (reals[i])
        all_[i].real = PyFloat_AsDouble(item);
      else
        all_[i].integer = PyLong_AsLongLong(item);
    }
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  std::span<const Value> get() const { return all_; }

 private:
  std::array<Value, 128> few_;
  std::vector<Value> many_;
  std::span<Value> all_;
};

void launch(const Kernel& kernel, std::int64_t x, std::int64_t y, std::int64_t z, std::uintptr_t stream,
            const py::tuple& values) {
  const Values parsed(values, kernel.layout().reals());
  const py::gil_scoped_release no_gil;  // the driver waits where its queue is full
  kernel.launch({x, y, z}, reinterpret_cast<CUstream>(stream), parsed.get());
}

}  // namespace

void bind_launcher(py::module_& module) {
  py::class_<Device, std::shared_ptr<Device>>(module, "Device", plain_type())
      .def(py::init([](int ordinal, const std::string& library, std::size_t tensor_maps) {
             return std::make_shared<Device>(library, ordinal, tensor_maps);
           }),
           py::arg("ordinal"), py::arg("library") = "libcuda.so.1", py::arg("tensor_maps") = 4096)
      .def_property_readonly("cached_tensor_maps", [](const Device& device) { return device.maps.size(); })
      .def_property_readonly("encoded_tensor_maps", [](const Device& device) { return device.maps.encoded(); });

  py::class_<Kernel>(module, "Kernel", plain_type())
      .def(py::init([](std::shared_ptr<Device> device, const py::bytes& cubin, std::string name, std::uint32_t warps,
                       std::uint32_t shared_bytes, const py::sequence& parameters) {
             return std::make_unique<Kernel>(
                 std::move(device), static_cast<std::string_view>(cubin),
                 KernelFacts{std::move(name), warps, shared_bytes, to_parameters(parameters)});
           }),
           py::arg("device"), py::arg("cubin"), py::arg("name"), py::arg("warps"), py::arg("shared_bytes"),
           py::arg("parameters"))
      .def("launch", &launch, py::arg("grid_x"), py::arg("grid_y"), py::arg("grid_z"), py::arg("stream"),
           py::arg("values"));
}

}  // namespace pipex::cuda
