#include "cuda/context.hpp"

namespace pipex::cuda {

PrimaryContext::PrimaryContext(const Driver& driver, int ordinal) : driver_(driver) {
  const std::string device = " of GPU " + std::to_string(ordinal);
  driver_.check(driver_.device_get(&device_, ordinal), "cuDeviceGet" + device);
  driver_.check(driver_.primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain" + device);
}

// At the end of a process the driver may be gone already; then there is nothing to release.
PrimaryContext::~PrimaryContext() { driver_.primary_context_release(device_); }

CurrentContext::CurrentContext(const PrimaryContext& context) : driver_(context.driver()) {
  CUcontext current = nullptr;
  driver_.check(driver_.context_get_current(&current), "cuCtxGetCurrent");
  if (current == context.get()) return;
  driver_.check(driver_.context_push(context.get()), "cuCtxPushCurrent");
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  CUcontext popped = nullptr;
  if (pushed_) driver_.context_pop(&popped);
}

}  // namespace pipex::cuda
