#include "cuda/driver.hpp"

#include <dlfcn.h>

#include "common/named_error.hpp"

namespace pipex::cuda {
namespace {

constexpr const char* kFix = "install the NVIDIA driver (525 or newer), or give the path of its libcuda";

void* open(const std::string& library) {
  if (void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
  const char* reason = dlerror();
  throw NamedError("NativeUnavailable", "the CUDA driver cannot be loaded", reason ? reason : "no reason", library,
                   kFix);
}

}  // namespace

// cuda.h renames functions to their current version (cuCtxPushCurrent is cuCtxPushCurrent_v2), so the symbol's name is
// what the macro makes of it, like its type.
#define PIPEX_NAME_AFTER_MACROS(name) #name
#define PIPEX_SYMBOL(name) resolve<decltype(::name)>(PIPEX_NAME_AFTER_MACROS(name))

Driver::Driver(const std::string& library)
    : handle_(open(library)),
      init(PIPEX_SYMBOL(cuInit)),
      get_error_name(PIPEX_SYMBOL(cuGetErrorName)),
      get_error_string(PIPEX_SYMBOL(cuGetErrorString)),
      device_get(PIPEX_SYMBOL(cuDeviceGet)),
      primary_context_retain(PIPEX_SYMBOL(cuDevicePrimaryCtxRetain)),
      primary_context_release(PIPEX_SYMBOL(cuDevicePrimaryCtxRelease)),
      context_get_current(PIPEX_SYMBOL(cuCtxGetCurrent)),
      context_push(PIPEX_SYMBOL(cuCtxPushCurrent)),
      context_pop(PIPEX_SYMBOL(cuCtxPopCurrent)),
      module_load(PIPEX_SYMBOL(cuModuleLoadData)),
      module_unload(PIPEX_SYMBOL(cuModuleUnload)),
      module_get_function(PIPEX_SYMBOL(cuModuleGetFunction)),
      function_set_attribute(PIPEX_SYMBOL(cuFuncSetAttribute)),
      launch_kernel(PIPEX_SYMBOL(cuLaunchKernelEx)),
      encode_tensor_map(PIPEX_SYMBOL(cuTensorMapEncodeTiled)),
      function_get_parameter(reinterpret_cast<GetParameter*>(dlsym(handle_.get(), "cuFuncGetParamInfo"))) {
  if (const CUresult result = init(0); result != CUDA_SUCCESS) {
    throw NamedError("NativeUnavailable", "the CUDA driver does not start: cuInit: " + text(result), "", "",
                     "check that nvidia-smi lists a GPU, and that CUDA_VISIBLE_DEVICES does not hide it");
  }
}

void Driver::Unload::operator()(void* handle) const { dlclose(handle); }

template <typename Function>
Function* Driver::resolve(const char* name) const {
  if (void* address = dlsym(handle_.get(), name)) return reinterpret_cast<Function*>(address);
  throw NamedError("NativeUnavailable", "the CUDA driver is too old", std::string("no ") + name,
                   "a driver for CUDA 12.0 or newer", kFix);
}

std::string Driver::text(CUresult result) const {
  const char* name = nullptr;
  const char* description = nullptr;
  if (get_error_name(result, &name) != CUDA_SUCCESS || name == nullptr)
    return "error " + std::to_string(static_cast<int>(result)) + ", unknown to the driver";
  get_error_string(result, &description);
  return std::string(name) + " (" + (description ? description : "no description") + ")";
}

void Driver::fail(CUresult result, const std::string& call) const {
  throw NamedError("CudaError", call + ": " + text(result), "", "", "");
}

}  // namespace pipex::cuda
