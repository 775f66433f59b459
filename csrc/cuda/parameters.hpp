// How the parameters of a kernel compiled by Triton lie in memory: in the order of its signature, each at its natural
// alignment; a tensor descriptor becomes a tensor map, then its shape in 32 bits and its strides in 64; last come two
// pointers to scratch memory. tests/native/test_triton_layout.py compares this with the code that Triton 3.6 and 3.9
// generate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "cuda/tensor_maps.hpp"

namespace pipex::cuda {

enum class Scalar { pointer, i32, i64, f32 };

/// Throws NamedError (InputError) for a name that is none of "pointer", "i32", "i64", "f32".
Scalar scalar(const std::string& name);

/// One parameter of a kernel, as its signature names it.
using Parameter = std::variant<Scalar, TileForm>;

/// One value of a launch. A tensor descriptor takes 1 + 2 × rank of them: address, shape, strides in elements.
union Value {
  std::int64_t integer;
  double real;
};

/// One entry of the kernel's parameter list.
struct Field {
  std::size_t offset, size;
};

class ParameterLayout {
 public:
  /// Throws NamedError (InputError) for more than a kernel can take.
  explicit ParameterLayout(std::vector<Parameter> parameters);

  const std::vector<Field>& fields() const { return fields_; }
  /// Bytes from the first parameter to the end of the last.
  std::size_t size() const { return size_; }
  /// For each value of a launch, in order, whether it is `real` (else `integer`).
  const std::vector<bool>& reals() const { return reals_; }

  /// Writes one launch's parameters to `buffer`, of size() bytes and aligned to kParameterAlignment. `values` has as
  /// many members as reals(). Throws NamedError (InputError) for a value that does not fit, and what TensorMaps throws.
  void write(std::span<const Value> values, TensorMaps& maps, std::byte* buffer) const;

 private:
  void add(std::size_t size, std::size_t alignment);

  std::vector<Parameter> parameters_;
  std::vector<Field> fields_;
  std::vector<bool> reals_;
  std::size_t size_ = 0;
};

constexpr std::size_t kParameterAlignment = 64;
constexpr std::size_t kMaxParameterBytes = 32764;  // CUDA C++ programming guide, "kernel parameters", from sm_70 on
constexpr std::size_t kScratchPointers = 2;        // global scratch, profile scratch

}  // namespace pipex::cuda
