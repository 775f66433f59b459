// One GPU of this process, and what stands on it: its primary context, which torch uses too, streams and events.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "device/driver.hpp"
#include "host/process.hpp"

namespace pipex::device {

/// Keeps the primary context of a GPU alive. Nothing here may be used in a forked child, whose parent owns all of it.
class Gpu {
 public:
  /// Throws NamedError: NativeUnavailable as Driver, CudaError where there is no such GPU.
  Gpu(const std::string& library, int ordinal);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  const Driver& driver() const { return driver_; }
  ContextHandle context() const { return context_; }
  int ordinal() const { return ordinal_; }
  std::string name() const { return "GPU " + std::to_string(ordinal_); }
  int attribute(DeviceAttribute which) const;

  /// False in a forked child.
  bool is_ours() const { return generation_ == fork_generation(); }

 private:
  const Driver driver_;
  const int ordinal_;
  const int generation_;
  DeviceNumber device_ = 0;
  ContextHandle context_ = nullptr;
};

/// Makes the GPU's context the calling thread's current one and gives the former back. Costs one query where it is
/// current already, as on every thread that torch has used.
class Current {
 public:
  explicit Current(const Gpu& gpu);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

/// How urgent a stream is among those of this process. Streams of different urgency are meant to be in hardware queues
/// of their own, so that a blocked one does not hold the next more urgent one up; the self-test (probe.hpp) looks.
enum class Urgency { compute, rescue, send };

class Stream {
 public:
  Stream(std::shared_ptr<const Gpu> gpu, Urgency urgency);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  StreamHandle get() const { return handle_; }
  const Gpu& gpu() const { return *gpu_; }
  void synchronize() const;

 private:
  const std::shared_ptr<const Gpu> gpu_;
  StreamHandle handle_ = nullptr;
};

class Event {
 public:
  explicit Event(std::shared_ptr<const Gpu> gpu);
  Event(Event&& other) noexcept : gpu_(std::move(other.gpu_)), handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(gpu_, other.gpu_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Event();

  EventHandle get() const { return handle_; }

 private:
  std::shared_ptr<const Gpu> gpu_;
  EventHandle handle_ = nullptr;
};

}  // namespace pipex::device
