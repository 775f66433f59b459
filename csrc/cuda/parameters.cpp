#include "cuda/parameters.hpp"

#include <cstring>
#include <limits>
#include <utility>

#include "common/named_error.hpp"

namespace pipex::cuda {
namespace {

template <typename T>
void put(const T& value, std::byte* destination) {
  std::memcpy(destination, &value, sizeof value);
}

std::int32_t to_i32(std::int64_t value, std::size_t position) {
  if (value < std::numeric_limits<std::int32_t>::min() || value > std::numeric_limits<std::int32_t>::max())
    throw NamedError("InputError", "value " + std::to_string(position) + " of a launch does not fit into 32 bits",
                     std::to_string(value), "-2147483648 to 2147483647", "");
  return static_cast<std::int32_t>(value);
}

}  // namespace

Scalar scalar(const std::string& name) {
  if (name == "pointer") return Scalar::pointer;
  if (name == "i32") return Scalar::i32;
  if (name == "i64") return Scalar::i64;
  if (name == "f32") return Scalar::f32;
  throw NamedError("InputError", "a kernel's parameter cannot be of this kind", name,
                   "pointer, i32, i64, f32 or a Tile", "");
}

ParameterLayout::ParameterLayout(std::vector<Parameter> parameters) : parameters_(std::move(parameters)) {
  for (const Parameter& parameter : parameters_) {
    if (const auto* tile = std::get_if<TileForm>(&parameter)) {
      add(sizeof(CUtensorMap), kParameterAlignment);
      for (std::size_t i = 0; i < tile->rank; ++i) add(sizeof(std::int32_t), alignof(std::int32_t));
      for (std::size_t i = 0; i < tile->rank; ++i) add(sizeof(std::int64_t), alignof(std::int64_t));
      reals_.insert(reals_.end(), 1 + 2 * tile->rank, false);
    } else {
      const Scalar kind = std::get<Scalar>(parameter);
      const std::size_t size = kind == Scalar::i32 || kind == Scalar::f32 ? 4 : 8;
      add(size, size);
      reals_.push_back(kind == Scalar::f32);
    }
  }
  for (std::size_t i = 0; i < kScratchPointers; ++i) add(sizeof(CUdeviceptr), alignof(CUdeviceptr));
  if (size_ > kMaxParameterBytes)
    throw NamedError("InputError", "a kernel with so many parameters cannot be launched",
                     std::to_string(size_) + " bytes", std::to_string(kMaxParameterBytes) + " or fewer",
                     "pass fewer tensor descriptors at once");
}

void ParameterLayout::add(std::size_t size, std::size_t alignment) {
  const std::size_t offset = (size_ + alignment - 1) / alignment * alignment;
  fields_.push_back({offset, size});
  size_ = offset + size;
}

void ParameterLayout::write(std::span<const Value> values, TensorMaps& maps, std::byte* buffer) const {
  auto value = values.begin();
  auto field = fields_.begin();
  const auto next = [&] { return buffer + (field++)->offset; };
  const auto position = [&] { return static_cast<std::size_t>(value - values.begin()); };

  for (const Parameter& parameter : parameters_) {
    if (const auto* tile = std::get_if<TileForm>(&parameter)) {
      TensorView view{static_cast<std::uint64_t>((value++)->integer), *tile, {}, {}};
      std::byte* const map = next();
      for (std::size_t i = 0; i < tile->rank; ++i, ++value) {
        view.shape[i] = value->integer;
        put(to_i32(value->integer, position()), next());
      }
      for (std::size_t i = 0; i < tile->rank; ++i, ++value) {
        view.strides[i] = value->integer;
        put(value->integer, next());
      }
      maps.write(view, map);
      continue;
    }
    switch (std::get<Scalar>(parameter)) {
      case Scalar::i32:
        put(to_i32(value->integer, position()), next());
        break;
      case Scalar::f32:
        put(static_cast<float>(value->real), next());
        break;
      case Scalar::pointer:
      case Scalar::i64:
        put(value->integer, next());
        break;
    }
    ++value;
  }
  for (std::size_t i = 0; i < kScratchPointers; ++i) put(CUdeviceptr{0}, next());
}

}  // namespace pipex::cuda
