// The library of the CUDA driver, loaded when it is first needed: the modules themselves load on machines without one,
// and a test can hand in a library of its own.
#pragma once

#include <memory>
#include <string>

namespace pipex {

/// One loaded and initialised driver library. Results are the driver's numbers (CUresult).
class DriverLibrary {
 public:
  /// Throws NamedError (NativeUnavailable) where the library is missing or no driver, or finds no GPU.
  explicit DriverLibrary(const std::string& path);

  /// A function by its exported name. Throws NamedError (NativeUnavailable) where the driver is too old to have it.
  template <typename Function>
  Function* get(const char* name) const {
    return reinterpret_cast<Function*>(require(name));
  }

  /// Null where the driver does not have it.
  template <typename Function>
  Function* find(const char* name) const {
    return reinterpret_cast<Function*>(look_up(name));
  }

  /// Throws NamedError (CudaError) unless `result` is success; `call` names the function and what it was called for.
  void check(int result, const std::string& call) const {
    if (result != 0) fail(result, call);
  }

  /// Name and description of an error, in the driver's words.
  std::string text(int result) const;

 private:
  struct Unload {
    void operator()(void* handle) const;
  };

  void* look_up(const char* name) const;
  void* require(const char* name) const;
  [[noreturn]] void fail(int result, const std::string& call) const;

  using GetText = int(int, const char**);
  const std::unique_ptr<void, Unload> handle_;
  GetText *error_name_ = nullptr, *error_text_ = nullptr;
};

}  // namespace pipex
