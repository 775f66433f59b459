// The functions of the CUDA driver that launch what Triton has compiled.
#pragma once

#include <cuda.h>

#include <string>

#include "common/driver_library.hpp"

namespace pipex::cuda {

class Driver : public DriverLibrary {
 public:
  /// Throws NamedError (NativeUnavailable) where the library is missing or too old, or finds no GPU.
  explicit Driver(const std::string& path);

  decltype(&::cuDeviceGet) const device_get;
  decltype(&::cuDevicePrimaryCtxRetain) const primary_context_retain;
  decltype(&::cuDevicePrimaryCtxRelease) const primary_context_release;
  decltype(&::cuCtxGetCurrent) const context_get_current;
  decltype(&::cuCtxPushCurrent) const context_push;
  decltype(&::cuCtxPopCurrent) const context_pop;
  decltype(&::cuModuleLoadData) const module_load;
  decltype(&::cuModuleUnload) const module_unload;
  decltype(&::cuModuleGetFunction) const module_get_function;
  decltype(&::cuFuncSetAttribute) const function_set_attribute;
  decltype(&::cuLaunchKernelEx) const launch_kernel;
  decltype(&::cuTensorMapEncodeTiled) const encode_tensor_map;
  /// cuFuncGetParamInfo: offset and size of a parameter. Null in drivers before CUDA 12.4.
  using GetParameter = CUresult(CUfunction, std::size_t, std::size_t*, std::size_t*);
  GetParameter* const function_get_parameter;
};

}  // namespace pipex::cuda
