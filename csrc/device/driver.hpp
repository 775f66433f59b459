// The CUDA driver, loaded when a device is first used: the module itself loads on machines without one, and a test can
// hand in a library of its own.
#pragma once

#include <memory>
#include <string>
#include <type_traits>

#include "device/driver_api.hpp"

namespace pipex::device {

/// One loaded and initialised driver library.
class Driver {
 public:
  /// Throws NamedError (NativeUnavailable) where the library is missing or too old, or finds no GPU.
  explicit Driver(const std::string& library);

  /// Throws NamedError (CudaError) unless `result` is success; `call` names the function and what it was called for.
  void check(Result result, const std::string& call) const {
    if (result != kSuccess) fail(result, call);
  }

  /// Name and description of an error, in the driver's words.
  std::string text(Result result) const;

 private:
  struct Unload {
    void operator()(void* handle) const;
  };
  std::unique_ptr<void, Unload> handle_;  // first: the functions below are looked up in it

  template <typename Function>
  Function* resolve(const char* name) const;
  [[noreturn]] void fail(Result result, const std::string& call) const;

 public:
#define PIPEX_DECLARE(name, symbol, ...) std::add_pointer_t<__VA_ARGS__> const name;
  PIPEX_DRIVER_FUNCTIONS(PIPEX_DECLARE)
#undef PIPEX_DECLARE
};

}  // namespace pipex::device
