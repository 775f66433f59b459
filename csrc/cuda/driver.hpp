// The functions of the CUDA driver that pipex calls, resolved when a library is first needed, never at link time: so
// the module loads on machines without a driver, and a test can hand in a library of its own.
#pragma once

#include <cuda.h>

#include <memory>
#include <string>

namespace pipex::cuda {

/// One loaded and initialised driver library.
class Driver {
 public:
  /// Throws NamedError (NativeUnavailable) where the library is missing or too old, or finds no GPU.
  explicit Driver(const std::string& library);

  /// Throws NamedError (CudaError) unless `result` is success; `call` names the function and what it was called for.
  void check(CUresult result, const std::string& call) const {
    if (result != CUDA_SUCCESS) fail(result, call);
  }

 private:
  struct Unload {
    void operator()(void* handle) const;
  };
  std::unique_ptr<void, Unload> handle_;  // first: the functions below are looked up in it

  template <typename Function>
  Function* resolve(const char* name) const;
  std::string text(CUresult result) const;
  [[noreturn]] void fail(CUresult result, const std::string& call) const;

 public:
  decltype(&::cuInit) const init;
  decltype(&::cuGetErrorName) const get_error_name;
  decltype(&::cuGetErrorString) const get_error_string;
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
