// Compiled only: our own description of the driver's ABI (csrc/device/driver_api.hpp) against NVIDIA's.
#include <cuda.h>

#include <string_view>
#include <type_traits>

#include "device/driver_api.hpp"

namespace {

namespace ours = pipex::device;
using namespace pipex::device;  // the table names its types so

/// Whether a value of one type is passed like one of the other: numbers, enumerators and structures by size, pointers
/// by what they point to.
template <typename Ours, typename Theirs>
constexpr bool alike() {
  if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
    using To = std::remove_pointer_t<Ours>;
    using From = std::remove_pointer_t<Theirs>;
    if constexpr (std::is_const_v<To> != std::is_const_v<From>)
      return false;
    else if constexpr (std::is_void_v<To> || std::is_void_v<From>)
      return std::is_void_v<To> == std::is_void_v<From>;
    else if constexpr (std::is_pointer_v<To> || std::is_scalar_v<To>)
      return alike<To, From>();
    else if constexpr (requires { sizeof(To); })
      return alike<To, From>();
    else
      return !requires { sizeof(From); };  // handles: both incomplete
  } else if constexpr (std::is_scalar_v<Ours> && std::is_scalar_v<Theirs>) {
    return !std::is_pointer_v<Ours> && !std::is_pointer_v<Theirs> && sizeof(Ours) == sizeof(Theirs) &&
           std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs>;
  } else {
    return std::is_class_v<Ours> && std::is_class_v<Theirs> && sizeof(Ours) == sizeof(Theirs) &&
           alignof(Ours) == alignof(Theirs);
  }
}

template <typename Ours, typename Theirs>
struct Function : std::false_type {};
template <typename R1, typename... A1, typename R2, typename... A2>
  requires(sizeof...(A1) == sizeof...(A2))
struct Function<R1(A1...), R2(A2...)> : std::bool_constant<alike<R1, R2>() && (alike<A1, A2>() && ...)> {};

#define CHECK_TYPE(name, symbol, ...) static_assert(Function<__VA_ARGS__, decltype(::symbol)>::value, #symbol);
PIPEX_DRIVER_FUNCTIONS(CHECK_TYPE)

// The symbols that cuda.h means today when a program writes the plain names.
#define AFTER_MACROS(name) #name
#define CURRENT(name) AFTER_MACROS(name)
constexpr std::string_view current[] = {
    CURRENT(cuDeviceGet),
    CURRENT(cuDeviceGetAttribute),
    CURRENT(cuDevicePrimaryCtxRetain),
    CURRENT(cuDevicePrimaryCtxRelease),
    CURRENT(cuCtxGetCurrent),
    CURRENT(cuCtxPushCurrent),
    CURRENT(cuCtxPopCurrent),
    CURRENT(cuCtxGetStreamPriorityRange),
    CURRENT(cuMemGetInfo),
    CURRENT(cuMemAlloc),
    CURRENT(cuMemFree),
    CURRENT(cuMemHostAlloc),
    CURRENT(cuMemFreeHost),
    CURRENT(cuPointerGetAttribute),
    CURRENT(cuMemcpyDtoDAsync),
    CURRENT(cuMemcpyHtoDAsync),
    CURRENT(cuMemcpyDtoHAsync),
    CURRENT(cuMemsetD8Async),
    CURRENT(cuIpcGetMemHandle),
    CURRENT(cuIpcOpenMemHandle),
    CURRENT(cuIpcCloseMemHandle),
    CURRENT(cuStreamCreateWithPriority),
    CURRENT(cuStreamDestroy),
    CURRENT(cuStreamSynchronize),
    CURRENT(cuStreamQuery),
    CURRENT(cuStreamIsCapturing),
    CURRENT(cuThreadExchangeStreamCaptureMode),
    CURRENT(cuStreamWaitEvent),
    CURRENT(cuStreamWaitValue64),
    CURRENT(cuStreamWriteValue64),
    CURRENT(cuEventCreate),
    CURRENT(cuEventDestroy),
    CURRENT(cuEventRecord),
    CURRENT(cuEventQuery),
};

#define SYMBOL(name, symbol, ...) #symbol,
constexpr std::string_view wanted[] = {PIPEX_DRIVER_FUNCTIONS(SYMBOL)};

constexpr bool same_names() {
  if (std::size(current) != std::size(wanted)) return false;
  for (std::size_t i = 0; i < std::size(wanted); ++i)
    if (current[i] != wanted[i]) return false;
  return true;
}
static_assert(same_names(), "a function has a newer version in this cuda.h");

static_assert(alike<ours::DeviceNumber, CUdevice>() && alike<ours::DevicePointer, CUdeviceptr>());
static_assert(sizeof(ours::IpcHandle) == sizeof(CUipcMemHandle));
static_assert(ours::kSuccess == int{CUDA_SUCCESS} && ours::kInvalidValue == int{CUDA_ERROR_INVALID_VALUE});
static_assert(ours::kOutOfMemory == int{CUDA_ERROR_OUT_OF_MEMORY});
static_assert(ours::kNotInitialized == int{CUDA_ERROR_NOT_INITIALIZED});
static_assert(ours::kInvalidContext == int{CUDA_ERROR_INVALID_CONTEXT});
static_assert(ours::kMapFailed == int{CUDA_ERROR_MAP_FAILED});
static_assert(ours::kInvalidHandle == int{CUDA_ERROR_INVALID_HANDLE});
static_assert(ours::kNotReady == int{CUDA_ERROR_NOT_READY});
static_assert(ours::kIllegalAddress == int{CUDA_ERROR_ILLEGAL_ADDRESS});
static_assert(ours::kNotSupported == int{CUDA_ERROR_NOT_SUPPORTED});
static_assert(ours::kCaptureUnsupported == int{CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED});
static_assert(ours::kCaptureImplicit == int{CUDA_ERROR_STREAM_CAPTURE_IMPLICIT});
static_assert(ours::kUnifiedAddressing == int{CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING});
static_assert(ours::kStreamMemOps64 == int{CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS});
static_assert(ours::kLegacyIpcCapable == int{CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE});
static_assert(ours::kNotCapturing == int{CU_STREAM_CAPTURE_STATUS_NONE});
static_assert(ours::kCaptureOfThread == int{CU_STREAM_CAPTURE_MODE_THREAD_LOCAL});
static_assert(ours::kNonBlockingStream == unsigned{CU_STREAM_NON_BLOCKING});
static_assert(ours::kEventWithoutTiming == unsigned{CU_EVENT_DISABLE_TIMING});
static_assert(ours::kLazyPeerAccess == unsigned{CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS});
static_assert(ours::kHostMemoryMapped == unsigned{CU_MEMHOSTALLOC_DEVICEMAP});
static_assert(ours::kWaitGreaterOrEqual == unsigned{CU_STREAM_WAIT_VALUE_GEQ});
static_assert(ours::kWriteWithFence == unsigned{CU_STREAM_WRITE_VALUE_DEFAULT});

}  // namespace
