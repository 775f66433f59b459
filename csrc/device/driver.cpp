#include "device/driver.hpp"

#include <dlfcn.h>

#include "common/named_error.hpp"

namespace pipex::device {
namespace {

constexpr const char* kFix = "install the NVIDIA driver (525 or newer), or give the path of its libcuda";

void* open(const std::string& library) {
  if (void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
  const char* reason = dlerror();
  throw NamedError("NativeUnavailable", "the CUDA driver cannot be loaded", reason ? reason : "no reason", library,
                   kFix);
}

}  // namespace

#define PIPEX_RESOLVE(name, symbol, ...) , name(resolve<__VA_ARGS__>(#symbol))

Driver::Driver(const std::string& library) : handle_(open(library)) PIPEX_DRIVER_FUNCTIONS(PIPEX_RESOLVE) {
  if (const Result result = init(0); result != kSuccess)
    throw NamedError("NativeUnavailable", "the CUDA driver does not start: cuInit: " + text(result), "", "",
                     "check that nvidia-smi lists a GPU, and that CUDA_VISIBLE_DEVICES does not hide it");
}

void Driver::Unload::operator()(void* handle) const { dlclose(handle); }

template <typename Function>
Function* Driver::resolve(const char* name) const {
  if (void* address = dlsym(handle_.get(), name)) return reinterpret_cast<Function*>(address);
  throw NamedError("NativeUnavailable", "the CUDA driver is too old", std::string("no ") + name,
                   "a driver for CUDA 12.0 or newer", kFix);
}

std::string Driver::text(Result result) const {
  const char* name = nullptr;
  const char* description = nullptr;
  if (error_name(result, &name) != kSuccess || name == nullptr)
    return "error " + std::to_string(result) + ", unknown to the driver";
  error_text(result, &description);
  return std::string(name) + " (" + (description ? description : "no description") + ")";
}

void Driver::fail(Result result, const std::string& call) const {
  throw NamedError("CudaError", call + ": " + text(result), "", "", "");
}

}  // namespace pipex::device
