// The context of one GPU: its primary one, which torch uses too.
#pragma once

#include "cuda/driver.hpp"

namespace pipex::cuda {

/// Keeps the primary context of a device alive.
class PrimaryContext {
 public:
  /// Throws NamedError (CudaError) where there is no such device. `driver` must outlive it.
  PrimaryContext(const Driver& driver, int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  const Driver& driver() const { return driver_; }
  CUcontext get() const { return context_; }

 private:
  const Driver& driver_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

/// Makes a context the calling thread's current one and gives the former back. Costs one query where it is current
/// already, as on every thread that torch has used.
class CurrentContext {
 public:
  explicit CurrentContext(const PrimaryContext& context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

}  // namespace pipex::cuda
