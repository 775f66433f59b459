// The part of DLPack's ABI (github.com/dmlc/dlpack, version 0.x structs) that hands a tensor to torch without torch.
#pragma once

#include <cstdint>

namespace pipex::dlpack {

constexpr std::int32_t kCpu = 1;
constexpr const char* kCapsuleName = "dltensor";  // the consumer renames it once it owns the tensor

struct Device {
  std::int32_t type, id;  // 1 CPU, 2 CUDA
};

struct DataType {
  std::uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 5 complex, 6 bool
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};
static_assert(sizeof(ManagedTensor) == 64, "the layout is fixed by DLPack");

}  // namespace pipex::dlpack
