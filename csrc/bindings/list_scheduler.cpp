#include "host/list_scheduler.hpp"

#include <pybind11/stl.h>

#include <cstring>
#include <string_view>

#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace pipex {
namespace {

using Numbers = std::vector<std::int64_t>;

py::bytes to_bytes(const PackedOrders& orders) {
  return {reinterpret_cast<const char*>(orders.data()), orders.size() * sizeof orders[0]};
}

PackedOrders to_orders(const py::bytes& packed) {
  const auto view = static_cast<std::string_view>(packed);
  PackedOrders orders(view.size() / sizeof(std::int64_t));
  std::memcpy(orders.data(), view.data(), orders.size() * sizeof orders[0]);
  return orders;
}

std::optional<py::bytes> schedule(const SchedulingProblem& problem, const DueDates& due) {
  std::optional<PackedOrders> orders;
  {
    const py::gil_scoped_release no_gil;
    orders = list_schedule(problem, due);
  }
  if (!orders) return std::nullopt;
  return to_bytes(*orders);
}

std::optional<py::tuple> replay_packed(const SchedulingProblem& problem, const py::bytes& packed) {
  std::optional<Replay> result;
  {
    const PackedOrders orders = to_orders(packed);
    const py::gil_scoped_release no_gil;
    result = replay(problem, orders);
  }
  if (!result) return std::nullopt;
  return py::make_tuple(result->makespan, result->span, py::tuple(py::cast(result->peaks)));
}

py::bytes improve_packed(const SchedulingProblem& problem, const py::bytes& packed, std::uint64_t seed,
                         std::int64_t trials, bool of_span) {
  PackedOrders orders = to_orders(packed);
  {
    const py::gil_scoped_release no_gil;
    orders = improve(problem, orders, seed, trials, of_span);
  }
  return to_bytes(orders);
}

}  // namespace

void bind_list_scheduler(py::module_& module) {
  py::class_<SchedulingProblem>(module, "SchedulingProblem", plain_type())
      .def(py::init<std::vector<int>, std::vector<int>, std::array<Numbers, kKinds>, Numbers, Numbers, Numbers, Numbers,
                    Numbers, Numbers>(),
           py::arg("rank_of"), py::arg("passing"), py::arg("durations"), py::arg("activation_hop"),
           py::arg("gradient_hop"), py::arg("activation"), py::arg("kept"), py::arg("deferred"), py::arg("limit"))
      .def(
          "list_schedule",
          [](const SchedulingProblem& problem, Numbers start, std::array<Numbers, kKinds> offset, Numbers release,
             Numbers cap, std::int64_t look, std::int64_t overrun) {
            return schedule(problem,
                            {std::move(start), std::move(offset), std::move(release), std::move(cap), look, overrun});
          },
          py::arg("start"), py::arg("offset"), py::arg("release"), py::arg("cap"), py::arg("look"), py::arg("overrun"))
      .def("replay", &replay_packed, py::arg("packed"))
      .def("improve", &improve_packed, py::arg("packed"), py::arg("seed"), py::arg("trials"), py::arg("of_span"));
}

}  // namespace pipex
