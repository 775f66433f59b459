// What this module was built with, and how many GPUs it can use.
#pragma once

#include <stdexcept>
#include <string>

namespace pipex::cuda {

/// A call of the CUDA runtime failed; what() holds the call, the error's name and its description.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Version of the toolkit, such as "13.0".
std::string toolkit();

/// Number of GPUs. Throws CudaError where there is no driver or no GPU.
int device_count();

}  // namespace pipex::cuda
