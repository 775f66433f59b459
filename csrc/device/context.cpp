#include "device/context.hpp"

#include <algorithm>

namespace pipex::device {

Gpu::Gpu(const std::string& library, int ordinal)
    : driver_(library), ordinal_(ordinal), generation_(fork_generation()) {
  driver_.check(driver_.device_get(&device_, ordinal), "cuDeviceGet of " + name());
  driver_.check(driver_.context_retain(&context_, device_), "cuDevicePrimaryCtxRetain of " + name());
}

// At the end of a process the driver may be gone already; then it refuses, and there is nothing to release. So it is
// with all destructors here.
Gpu::~Gpu() {
  if (is_ours()) driver_.context_release(device_);
}

int Gpu::attribute(DeviceAttribute which) const {
  int value = 0;
  driver_.check(driver_.device_attribute(&value, which, device_), "cuDeviceGetAttribute of " + name());
  return value;
}

Current::Current(const Gpu& gpu) : driver_(gpu.driver()) {
  ContextHandle current = nullptr;
  driver_.check(driver_.context_current(&current), "cuCtxGetCurrent");
  if (current == gpu.context()) return;
  driver_.check(driver_.context_push(gpu.context()), "cuCtxPushCurrent");
  pushed_ = true;
}

Current::~Current() {
  ContextHandle popped = nullptr;
  if (pushed_) driver_.context_pop(&popped);
}

// Non-blocking, or the legacy stream, on which torch computes by default, would wait for it and it for that.
Stream::Stream(std::shared_ptr<const Gpu> gpu, Urgency urgency) : gpu_(std::move(gpu)) {
  const Driver& driver = gpu_->driver();
  const Current current(*gpu_);
  int least = 0, greatest = 0;  // a greater urgency is a smaller number
  driver.check(driver.priority_range(&least, &greatest), "cuCtxGetStreamPriorityRange");
  const int priority = urgency == Urgency::send ? greatest : urgency == Urgency::rescue ? greatest + 1 : 0;
  driver.check(driver.stream_create(&handle_, kNonBlockingStream, std::min(priority, least)),
               "cuStreamCreateWithPriority on " + gpu_->name());
}

Stream::~Stream() {
  if (!gpu_->is_ours()) return;
  try {
    const Current current(*gpu_);
    gpu_->driver().stream_destroy(handle_);
  } catch (const std::exception&) {  // no context to make current: the driver is gone
  }
}

void Stream::synchronize() const {
  gpu_->driver().check(gpu_->driver().stream_synchronize(handle_), "cuStreamSynchronize on " + gpu_->name());
}

Event::Event(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {
  const Current current(*gpu_);
  gpu_->driver().check(gpu_->driver().event_create(&handle_, kEventWithoutTiming), "cuEventCreate on " + gpu_->name());
}

Event::~Event() {
  if (handle_ == nullptr || !gpu_->is_ours()) return;
  try {
    const Current current(*gpu_);
    gpu_->driver().event_destroy(handle_);
  } catch (const std::exception&) {  // the driver is gone
  }
}

}  // namespace pipex::device
