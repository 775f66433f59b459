#include "cuda/tensor_maps.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "common/named_error.hpp"

namespace pipex::cuda {
namespace {

template <typename Numbers>
std::string text(const Numbers& numbers, std::size_t rank) {
  std::string result = "[";
  for (std::size_t i = 0; i < rank; ++i) {
    if (i > 0) result += ", ";
    result += std::to_string(numbers[i]);
  }
  return result + "]";
}

std::string describe(const TensorView& view) {
  return "shape " + text(view.shape, view.form.rank) + ", strides " + text(view.strides, view.form.rank) + ", tile " +
         text(view.form.box, view.form.rank) + ", " + std::to_string(view.form.element_bytes) +
         " bytes per element, at " + std::to_string(view.address);
}

/// The hardware's rules that callers break; the driver would only say "invalid value".
void check(const TensorView& view) {
  const auto refuse = [&](const char* needed) {
    throw NamedError("InputError", "a tensor descriptor cannot be made", describe(view), needed, "");
  };
  const std::size_t last = view.form.rank - 1;
  if (view.address == 0 || view.address % 16 != 0) refuse("an address that is a multiple of 16");
  for (std::size_t i = 0; i < view.form.rank; ++i)
    if (view.shape[i] <= 0) refuse("sizes of 1 or more");
  if (view.strides[last] != 1) refuse("a last dimension of stride 1");
  for (std::size_t i = 0; i < last; ++i)
    if (view.strides[i] <= 0 || view.strides[i] * view.form.element_bytes % 16 != 0)
      refuse("strides of a multiple of 16 bytes");
}

}  // namespace

TileForm tile_form(std::uint32_t type, std::uint32_t element_bytes, std::uint32_t swizzle,
                   const std::vector<std::uint32_t>& box) {
  if (box.empty() || box.size() > kMaxTensorRank || type > CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ ||
      swizzle > CU_TENSOR_MAP_SWIZZLE_128B || element_bytes < 1 || element_bytes > 8)
    throw NamedError("InputError", "a tensor descriptor cannot have this form",
                     std::to_string(box.size()) + " dimensions, type " + std::to_string(type) + " of " +
                         std::to_string(element_bytes) + " bytes, swizzle " + std::to_string(swizzle),
                     "1 to 5 dimensions, a type of 0 to 12 of 1 to 8 bytes, a swizzle of 0 to 3", "");
  TileForm form{static_cast<CUtensorMapDataType>(type),
                element_bytes,
                static_cast<CUtensorMapSwizzle>(swizzle),
                static_cast<std::uint32_t>(box.size()),
                {}};
  std::copy(box.begin(), box.end(), form.box.begin());
  return form;
}

std::size_t TensorMaps::Hash::operator()(const TensorView& view) const {
  // Views mostly differ by address; shapes and tiles then separate what reuses a buffer.
  std::uint64_t hash = view.address;
  const auto mix = [&hash](std::uint64_t value) {
    hash = (hash ^ value) * 0x9E3779B97F4A7C15u;  // 2^64 over the golden ratio: spreads neighbouring values
    hash ^= hash >> 32;
  };
  mix(static_cast<std::uint64_t>(view.form.type) << 32 | static_cast<std::uint64_t>(view.form.swizzle) << 16 |
      view.form.rank);
  for (std::size_t i = 0; i < view.form.rank; ++i) {
    mix(static_cast<std::uint64_t>(view.shape[i]) << 16 ^ view.form.box[i]);
    mix(static_cast<std::uint64_t>(view.strides[i]));
  }
  return hash;
}

TensorMaps::TensorMaps(const Driver& driver, std::size_t capacity) : driver_(driver), capacity_(capacity) {
  if (capacity == 0)
    throw NamedError("InputError", "a cache of tensor maps must hold something", "capacity 0", "1 or more", "");
}

void TensorMaps::write(const TensorView& view, std::byte* destination) {
  const std::lock_guard lock(mutex_);
  if (const auto found = places_.find(view); found != places_.end()) {
    entries_.splice(entries_.begin(), entries_, found->second);
  } else {
    entries_.push_front({view, encode(view)});
    places_.emplace(view, entries_.begin());
    ++encoded_;
    if (entries_.size() > capacity_) {
      places_.erase(entries_.back().view);
      entries_.pop_back();
    }
  }
  std::memcpy(destination, &entries_.front().map, sizeof(CUtensorMap));
}

std::size_t TensorMaps::size() const {
  const std::lock_guard lock(mutex_);
  return entries_.size();
}

std::uint64_t TensorMaps::encoded() const {
  const std::lock_guard lock(mutex_);
  return encoded_;
}

CUtensorMap TensorMaps::encode(const TensorView& view) const {
  check(view);
  // The driver counts dimensions from the innermost, whose stride it takes to be one element.
  const std::size_t rank = view.form.rank;
  std::array<cuuint64_t, kMaxTensorRank> sizes{}, stride_bytes{};
  std::array<cuuint32_t, kMaxTensorRank> box{}, every{};
  for (std::size_t i = 0; i < rank; ++i) {
    const std::size_t from = rank - 1 - i;
    sizes[i] = static_cast<cuuint64_t>(view.shape[from]);
    box[i] = view.form.box[from];
    every[i] = 1;
    if (i > 0) stride_bytes[i - 1] = static_cast<cuuint64_t>(view.strides[from]) * view.form.element_bytes;
  }
  CUtensorMap map;
  // Triton's choices for the rest: lines of 128 bytes into L2, and zeros outside the tensor.
  const CUresult result = driver_.encode_tensor_map(
      &map, view.form.type, static_cast<cuuint32_t>(rank), reinterpret_cast<void*>(view.address), sizes.data(),
      stride_bytes.data(), box.data(), every.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, view.form.swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) driver_.check(result, "cuTensorMapEncodeTiled (" + describe(view) + ")");
  return map;
}

}  // namespace pipex::cuda
