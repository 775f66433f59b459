#include "cuda/runtime.hpp"

#include "common/named_error.hpp"

namespace pipex::cuda {

void check(cudaError_t error, const std::string& call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next, unrelated call would report it again
  const bool unavailable =
      error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || error == cudaErrorStubLibrary;
  const std::string problem = call + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")";
  if (error == cudaErrorNoKernelImageForDevice)
    throw NamedError("NativeUnavailable", problem, "", "",
                     "pipex was built for other GPUs (`pipex info` says for which); install it again on this machine, "
                     "or with PIPEX_CUDA=ON");
  throw NamedError(unavailable ? "NativeUnavailable" : "CudaError", problem, "", "",
                   unavailable ? "this needs an NVIDIA GPU and its driver; nvidia-smi shows both" : "");
}

}  // namespace pipex::cuda
