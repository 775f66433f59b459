// Tensor maps: how the GPU's copy engine for tiles (TMA) sees a tensor, and a cache of them.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "cuda/driver.hpp"

namespace pipex::cuda {

constexpr std::size_t kMaxTensorRank = 5;

/// What a kernel was compiled for: element type, and the tile that one copy moves. Outermost dimension first.
struct TileForm {
  CUtensorMapDataType type;
  std::uint32_t element_bytes;
  CUtensorMapSwizzle swizzle;
  std::uint32_t rank;
  std::array<std::uint32_t, kMaxTensorRank> box;

  bool operator==(const TileForm& other) const = default;
};

/// Throws NamedError (InputError) for a type, a swizzle or a rank that tensor maps do not have.
TileForm tile_form(std::uint32_t type, std::uint32_t element_bytes, std::uint32_t swizzle,
                   const std::vector<std::uint32_t>& box);

/// Everything that a tensor map depends on; the cache's key. Outermost dimension first, strides in elements, unused
/// dimensions 0.
struct TensorView {
  std::uint64_t address;
  TileForm form;
  std::array<std::int64_t, kMaxTensorRank> shape, strides;

  bool operator==(const TensorView& other) const = default;
};

/// Encodes tensor maps and remembers the latest. Can be used by several threads.
class TensorMaps {
 public:
  /// `capacity` bounds the memory: a training step meets the same buffers again and again, some per layer and
  /// micro-batch, but tensors of ever new addresses or sizes (a growing last batch, an evaluation) must not pile up
  /// for ever. `driver` must outlive it.
  TensorMaps(const Driver& driver, std::size_t capacity);

  /// Throws NamedError (InputError) for a view that cannot have a map, (CudaError) where the driver refuses it.
  void write(const TensorView& view, std::byte* destination);

  std::size_t size() const;
  /// How many maps were encoded; the others came from the cache.
  std::uint64_t encoded() const;

 private:
  struct Hash {
    std::size_t operator()(const TensorView& view) const;
  };
  struct Entry {
    TensorView view;
    CUtensorMap map;
  };
  using Entries = std::list<Entry>;

  CUtensorMap encode(const TensorView& view) const;

  const Driver& driver_;
  const std::size_t capacity_;
  mutable std::mutex mutex_;
  Entries entries_;  // the latest used first
  std::unordered_map<TensorView, Entries::iterator, Hash> places_;
  std::uint64_t encoded_ = 0;
};

}  // namespace pipex::cuda
