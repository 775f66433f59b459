// What this module was built with, and how many GPUs it can use.
#pragma once

#include <string>

namespace pipex::cuda {

/// Version of the toolkit, such as "13.0".
std::string toolkit();

/// Number of GPUs. Throws NamedError (NativeUnavailable) where there is no driver or no GPU.
int device_count();

}  // namespace pipex::cuda
