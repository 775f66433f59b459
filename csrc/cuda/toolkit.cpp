#include <cuda_runtime_api.h>

#include "cuda/toolkit.hpp"

namespace pipex::cuda {

std::string toolkit() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    throw CudaError(std::string("cudaGetDeviceCount: ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                    ")");
  }
  return count;
}

}  // namespace pipex::cuda
