#include "device/driver.hpp"

namespace pipex::device {

#define PIPEX_GET(name, symbol, ...) , name(get<__VA_ARGS__>(#symbol))

Driver::Driver(const std::string& path) : DriverLibrary(path) PIPEX_DRIVER_FUNCTIONS(PIPEX_GET) {}

}  // namespace pipex::device
