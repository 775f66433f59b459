// Errors of the CUDA runtime, which our own kernels are launched through.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace pipex::cuda {

/// Throws NamedError unless `error` is success: NativeUnavailable where there is no usable driver or GPU, else
/// CudaError. `call` names the function and what it was called for.
void check(cudaError_t error, const std::string& call);

}  // namespace pipex::cuda
