// What pipex needs of the CUDA driver's ABI, in its own words, so that it builds without CUDA's headers. The types and
// numbers are compared with cuda.h at compile time by tests/native/driver_api_matches_cuda.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pipex::device {

using Result = int;                   // CUresult
using DeviceNumber = int;             // CUdevice
using DevicePointer = std::uint64_t;  // CUdeviceptr
using ContextHandle = struct ContextTag*;
using StreamHandle = struct StreamTag*;
using EventHandle = struct EventTag*;

struct IpcHandle {  // CUipcMemHandle, passed by value
  unsigned char bytes[64];
};

enum : Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kInvalidContext = 201,
  kMapFailed = 205,
  kInvalidHandle = 400,
  kNotReady = 600,
  kIllegalAddress = 700,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
  kCaptureImplicit = 906,  // the legacy stream was asked while another stream of the thread captures
};

enum DeviceAttribute : int { kUnifiedAddressing = 41, kStreamMemOps64 = 122 };
enum PointerAttribute : int { kLegacyIpcCapable = 10 };
enum CaptureStatus : int { kNotCapturing = 0 };
enum CaptureMode : int { kCaptureOfThread = 1 };

constexpr unsigned kNonBlockingStream = 1;
constexpr unsigned kEventWithoutTiming = 2;
constexpr unsigned kLazyPeerAccess = 1;  // the only flag of an import, and required
constexpr unsigned kHostMemoryMapped = 2;
constexpr unsigned kWaitGreaterOrEqual = 0;  // cyclic: (int64)(*address - value) >= 0
constexpr unsigned kWriteWithFence = 0;      // what the stream did before is visible before the value is

// X(our name, the driver's symbol, its type). cuda.h renames functions to their current version; here the symbol's
// name is the exported one.
#define PIPEX_DRIVER_FUNCTIONS(X)                                                                        \
  X(device_get, cuDeviceGet, Result(DeviceNumber*, int))                                                 \
  X(device_attribute, cuDeviceGetAttribute, Result(int*, DeviceAttribute, DeviceNumber))                 \
  X(context_retain, cuDevicePrimaryCtxRetain, Result(ContextHandle*, DeviceNumber))                      \
  X(context_release, cuDevicePrimaryCtxRelease_v2, Result(DeviceNumber))                                 \
  X(context_current, cuCtxGetCurrent, Result(ContextHandle*))                                            \
  X(context_push, cuCtxPushCurrent_v2, Result(ContextHandle))                                            \
  X(context_pop, cuCtxPopCurrent_v2, Result(ContextHandle*))                                             \
  X(priority_range, cuCtxGetStreamPriorityRange, Result(int*, int*))                                     \
  X(memory_info, cuMemGetInfo_v2, Result(std::size_t*, std::size_t*))                                    \
  X(allocate, cuMemAlloc_v2, Result(DevicePointer*, std::size_t))                                        \
  X(free, cuMemFree_v2, Result(DevicePointer))                                                           \
  X(host_allocate, cuMemHostAlloc, Result(void**, std::size_t, unsigned))                                \
  X(host_free, cuMemFreeHost, Result(void*))                                                             \
  X(pointer_attribute, cuPointerGetAttribute, Result(void*, PointerAttribute, DevicePointer))            \
  X(copy, cuMemcpyDtoDAsync_v2, Result(DevicePointer, DevicePointer, std::size_t, StreamHandle))         \
  X(copy_in, cuMemcpyHtoDAsync_v2, Result(DevicePointer, const void*, std::size_t, StreamHandle))        \
  X(copy_out, cuMemcpyDtoHAsync_v2, Result(void*, DevicePointer, std::size_t, StreamHandle))             \
  X(fill, cuMemsetD8Async, Result(DevicePointer, unsigned char, std::size_t, StreamHandle))              \
  X(ipc_export, cuIpcGetMemHandle, Result(IpcHandle*, DevicePointer))                                    \
  X(ipc_import, cuIpcOpenMemHandle_v2, Result(DevicePointer*, IpcHandle, unsigned))                      \
  X(ipc_close, cuIpcCloseMemHandle, Result(DevicePointer))                                               \
  X(stream_create, cuStreamCreateWithPriority, Result(StreamHandle*, unsigned, int))                     \
  X(stream_destroy, cuStreamDestroy_v2, Result(StreamHandle))                                            \
  X(stream_synchronize, cuStreamSynchronize, Result(StreamHandle))                                       \
  X(stream_query, cuStreamQuery, Result(StreamHandle))                                                   \
  X(stream_capturing, cuStreamIsCapturing, Result(StreamHandle, CaptureStatus*))                         \
  X(thread_capture_mode, cuThreadExchangeStreamCaptureMode, Result(CaptureMode*))                        \
  X(stream_wait_event, cuStreamWaitEvent, Result(StreamHandle, EventHandle, unsigned))                   \
  X(stream_wait, cuStreamWaitValue64_v2, Result(StreamHandle, DevicePointer, std::uint64_t, unsigned))   \
  X(stream_write, cuStreamWriteValue64_v2, Result(StreamHandle, DevicePointer, std::uint64_t, unsigned)) \
  X(event_create, cuEventCreate, Result(EventHandle*, unsigned))                                         \
  X(event_destroy, cuEventDestroy_v2, Result(EventHandle))                                               \
  X(event_record, cuEventRecord, Result(EventHandle, StreamHandle))                                      \
  X(event_query, cuEventQuery, Result(EventHandle))

}  // namespace pipex::device
