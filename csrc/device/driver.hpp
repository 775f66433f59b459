// The functions of the CUDA driver that the rings call.
#pragma once

#include <string>
#include <type_traits>

#include "common/driver_library.hpp"
#include "device/driver_api.hpp"

namespace pipex::device {

class Driver : public DriverLibrary {
 public:
  /// Throws NamedError (NativeUnavailable) where the library is missing or too old, or finds no GPU.
  explicit Driver(const std::string& path);

#define PIPEX_DECLARE(name, symbol, ...) const std::add_pointer_t<__VA_ARGS__> name;
  PIPEX_DRIVER_FUNCTIONS(PIPEX_DECLARE)
#undef PIPEX_DECLARE
};

}  // namespace pipex::device
