#include "common/driver_library.hpp"

#include <dlfcn.h>

#include "common/named_error.hpp"

namespace pipex {
namespace {

constexpr const char* kFix = "install the NVIDIA driver (525 or newer), or give the path of its libcuda";

void* open(const std::string& path) {
  if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
  const char* reason = dlerror();
  throw NamedError("NativeUnavailable", "the CUDA driver cannot be loaded", reason ? reason : "no reason", path, kFix);
}

}  // namespace

DriverLibrary::DriverLibrary(const std::string& path) : handle_(open(path)) {
  auto* const init = get<int(unsigned)>("cuInit");
  error_name_ = get<GetText>("cuGetErrorName");
  error_text_ = get<GetText>("cuGetErrorString");
  if (const int result = init(0); result != 0)
    throw NamedError("NativeUnavailable", "the CUDA driver does not start: cuInit: " + text(result), "", "",
                     "check that nvidia-smi lists a GPU, and that CUDA_VISIBLE_DEVICES does not hide it");
}

void DriverLibrary::Unload::operator()(void* handle) const { dlclose(handle); }

void* DriverLibrary::look_up(const char* name) const { return dlsym(handle_.get(), name); }

void* DriverLibrary::require(const char* name) const {
  if (void* address = look_up(name)) return address;
  throw NamedError("NativeUnavailable", "the CUDA driver is too old", std::string("no ") + name,
                   "a driver for CUDA 12.0 or newer", kFix);
}

std::string DriverLibrary::text(int result) const {
  const char* name = nullptr;
  const char* description = nullptr;
  if (error_name_(result, &name) != 0 || name == nullptr)
    return "error " + std::to_string(result) + ", unknown to the driver";
  error_text_(result, &description);
  return std::string(name) + " (" + (description ? description : "no description") + ")";
}

void DriverLibrary::fail(int result, const std::string& call) const {
  throw NamedError("CudaError", call + ": " + text(result), "", "", "");
}

}  // namespace pipex
