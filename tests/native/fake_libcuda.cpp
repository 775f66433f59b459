// A driver for the tests of csrc/cuda: it launches nothing, writes down what it is asked for, and fails when told to.
// The tests talk to it through the functions at the end.
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define FAKE extern "C" __attribute__((visibility("default")))

namespace {

struct Field {
  std::size_t offset, size;
};

std::string journal;                      // one line per call
std::map<std::string, int> failures;      // function -> what it returns from now on
std::vector<Field> next_fields;           // the parameter list of the kernel that is loaded next
std::vector<std::vector<Field>> kernels;  // those of the loaded ones; a CUfunction is its number, counted from 1
std::string parameter_bytes;              // of the last launch, gaps as 0xEE
std::vector<CUcontext> contexts;          // the stack of the calling thread (tests have one)

const std::vector<Field>& fields_of(CUfunction function) {
  return kernels[reinterpret_cast<std::size_t>(function) - 1];
}

CUcontext const kPrimary = reinterpret_cast<CUcontext>(0x1000);

std::string hex(std::uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
  return text;
}

CUresult record(const std::string& function, const std::string& arguments = "") {
  journal += function + (arguments.empty() ? "" : " " + arguments) + "\n";
  const auto failure = failures.find(function);
  return failure == failures.end() ? CUDA_SUCCESS : static_cast<CUresult>(failure->second);
}

template <typename T>
std::string list(const T* numbers, std::size_t count) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) text += (i ? "," : "") + std::to_string(numbers[i]);
  return text;
}

}  // namespace

FAKE CUresult cuInit(unsigned) { return record("cuInit"); }

FAKE CUresult cuGetErrorName(CUresult error, const char** name) {
  if (error != CUDA_ERROR_INVALID_VALUE && error != CUDA_ERROR_NO_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  *name = error == CUDA_ERROR_NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_INVALID_VALUE";
  return CUDA_SUCCESS;
}

FAKE CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "as the test wished";
  return CUDA_SUCCESS;
}

FAKE CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return record("cuDeviceGet", std::to_string(ordinal));
}

FAKE CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = kPrimary;
  return record("cuDevicePrimaryCtxRetain");
}

FAKE CUresult cuDevicePrimaryCtxRelease(CUdevice) { return record("cuDevicePrimaryCtxRelease"); }

FAKE CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return CUDA_SUCCESS;
}

FAKE CUresult cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(context);
  return record("cuCtxPushCurrent");
}

FAKE CUresult cuCtxPopCurrent(CUcontext* context) {
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = contexts.back();
  contexts.pop_back();
  return record("cuCtxPopCurrent");
}

FAKE CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (contexts.empty() || contexts.back() != kPrimary) return CUDA_ERROR_INVALID_CONTEXT;
  const CUresult result = record("cuModuleLoadData", std::string(static_cast<const char*>(image), 4));
  if (result == CUDA_SUCCESS) *module = reinterpret_cast<CUmodule>(0x2000);
  return result;
}

FAKE CUresult cuModuleUnload(CUmodule) { return record("cuModuleUnload"); }

FAKE CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  kernels.push_back(next_fields);
  *function = reinterpret_cast<CUfunction>(kernels.size());
  return record("cuModuleGetFunction", name);
}

FAKE CUresult cuFuncGetParamInfo(CUfunction function, std::size_t index, std::size_t* offset, std::size_t* size) {
  const auto& fields = fields_of(function);
  if (index >= fields.size()) return CUDA_ERROR_INVALID_VALUE;
  *offset = fields[index].offset;
  *size = fields[index].size;
  return CUDA_SUCCESS;
}

FAKE CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
  return record("cuFuncSetAttribute", std::to_string(attribute) + "=" + std::to_string(value));
}

// A map is the running number of its encoding, in every byte: distinct, and easy to find in a launch's bytes.
FAKE CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                     const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                     const cuuint32_t* every, CUtensorMapInterleave interleave,
                                     CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                     CUtensorMapFloatOOBfill fill) {
  static unsigned char number = 0;
  std::memset(map, ++number, sizeof *map);
  return record("cuTensorMapEncodeTiled",
                "address=" + hex(reinterpret_cast<std::uintptr_t>(address)) + " type=" + std::to_string(type) +
                    " sizes=" + list(sizes, rank) + " strides=" + list(strides, rank - 1) + " box=" + list(box, rank) +
                    " every=" + list(every, rank) + " interleave=" + std::to_string(interleave) +
                    " swizzle=" + std::to_string(swizzle) + " promotion=" + std::to_string(promotion) +
                    " fill=" + std::to_string(fill));
}

FAKE CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (contexts.empty() || contexts.back() != kPrimary) return CUDA_ERROR_INVALID_CONTEXT;
  if (extra != nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto& fields = fields_of(function);
  parameter_bytes.assign(fields.back().offset + fields.back().size, '\xEE');
  for (std::size_t i = 0; i < fields.size(); ++i)
    std::memcpy(&parameter_bytes[fields[i].offset], parameters[i], fields[i].size);
  return record("cuLaunchKernelEx", "grid=" + list(&config->gridDimX, 3) + " block=" + list(&config->blockDimX, 3) +
                                        " shared=" + std::to_string(config->sharedMemBytes) +
                                        " stream=" + hex(reinterpret_cast<std::uintptr_t>(config->hStream)) +
                                        " attributes=" + std::to_string(config->numAttrs));
}

// What the tests call.

FAKE const char* fake_journal() { return journal.c_str(); }

FAKE void fake_fail(const char* function, int result) { failures[function] = result; }

FAKE void fake_set_parameters(const std::size_t* offsets_and_sizes, std::size_t count) {
  next_fields.clear();
  for (std::size_t i = 0; i < count; ++i)
    next_fields.push_back({offsets_and_sizes[2 * i], offsets_and_sizes[2 * i + 1]});
}

FAKE std::size_t fake_parameter_bytes(char* to, std::size_t room) {
  std::memcpy(to, parameter_bytes.data(), parameter_bytes.size() < room ? parameter_bytes.size() : room);
  return parameter_bytes.size();
}

FAKE void fake_make_current(std::uintptr_t context) { contexts.assign(1, reinterpret_cast<CUcontext>(context)); }

FAKE std::uintptr_t fake_current() { return contexts.empty() ? 0 : reinterpret_cast<std::uintptr_t>(contexts.back()); }
