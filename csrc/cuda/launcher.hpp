// Launches kernels that Triton has compiled, without Triton: its code in machine form (cubin) and the facts of its
// metadata are all that is needed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/context.hpp"
#include "cuda/parameters.hpp"
#include "cuda/tensor_maps.hpp"

namespace pipex::cuda {

/// One GPU as the launcher needs it: driver, context, tensor maps.
struct Device {
  Device(const std::string& library, int ordinal, std::size_t tensor_maps)
      : driver(library), context(driver, ordinal), maps(driver, tensor_maps) {}

  const Driver driver;
  const PrimaryContext context;
  TensorMaps maps;
};

/// What the metadata of a compiled kernel says about launching it.
struct KernelFacts {
  std::string name;
  std::uint32_t warps;         // per block
  std::uint32_t shared_bytes;  // of dynamic shared memory
  std::vector<Parameter> parameters;
};

using Grid = std::array<std::int64_t, 3>;

/// One kernel, loaded on one device.
class Kernel {
 public:
  /// Throws NamedError (CudaError) where the driver refuses the code, (InputError) where the kernel's own parameter
  /// list is not the one that `facts` describe.
  Kernel(std::shared_ptr<Device> device, std::string_view cubin, KernelFacts facts);
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const ParameterLayout& layout() const { return layout_; }

  /// Enqueues one launch on `stream`; an empty grid launches nothing. `values`: see ParameterLayout::write. Throws
  /// NamedError (InputError, CudaError). Can be called by several threads.
  void launch(const Grid& grid, CUstream stream, std::span<const Value> values) const;

 private:
  void load(std::string_view cubin);
  void check_parameters() const;

  const std::shared_ptr<Device> device_;
  const std::string name_;
  const std::uint32_t warps_, shared_bytes_;
  const ParameterLayout layout_;
  CUmodule module_ = nullptr;
  CUfunction function_ = nullptr;
};

}  // namespace pipex::cuda
