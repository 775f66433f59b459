#include "cuda/driver.hpp"

namespace pipex::cuda {

// cuda.h renames functions to their current version (cuCtxPushCurrent is cuCtxPushCurrent_v2), so the symbol's name is
// what the macro makes of it, like its type.
#define PIPEX_NAME_AFTER_MACROS(name) #name
#define PIPEX_GET(name) get<decltype(::name)>(PIPEX_NAME_AFTER_MACROS(name))

Driver::Driver(const std::string& path)
    : DriverLibrary(path),
      device_get(PIPEX_GET(cuDeviceGet)),
      primary_context_retain(PIPEX_GET(cuDevicePrimaryCtxRetain)),
      primary_context_release(PIPEX_GET(cuDevicePrimaryCtxRelease)),
      context_get_current(PIPEX_GET(cuCtxGetCurrent)),
      context_push(PIPEX_GET(cuCtxPushCurrent)),
      context_pop(PIPEX_GET(cuCtxPopCurrent)),
      module_load(PIPEX_GET(cuModuleLoadData)),
      module_unload(PIPEX_GET(cuModuleUnload)),
      module_get_function(PIPEX_GET(cuModuleGetFunction)),
      function_set_attribute(PIPEX_GET(cuFuncSetAttribute)),
      launch_kernel(PIPEX_GET(cuLaunchKernelEx)),
      encode_tensor_map(PIPEX_GET(cuTensorMapEncodeTiled)),
      function_get_parameter(find<GetParameter>("cuFuncGetParamInfo")) {}

}  // namespace pipex::cuda
