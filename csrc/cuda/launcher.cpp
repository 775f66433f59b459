#include "cuda/launcher.hpp"

#include <limits>
#include <utility>

#include "common/named_error.hpp"

namespace pipex::cuda {
namespace {

constexpr std::uint32_t kThreadsPerWarp = 32;
constexpr std::uint32_t kMaxWarps = 32;
constexpr std::uint32_t kSharedWithoutAsking = 48 * 1024;  // what a kernel may use unless its attribute says more

std::string text(const Field& field) {
  return std::to_string(field.size) + " bytes at " + std::to_string(field.offset);
}

}  // namespace

Kernel::Kernel(std::shared_ptr<Device> device, std::string_view cubin, KernelFacts facts)
    : device_(std::move(device)),
      name_(std::move(facts.name)),
      warps_(facts.warps),
      shared_bytes_(facts.shared_bytes),
      layout_(std::move(facts.parameters)) {
  if (warps_ < 1 || warps_ > kMaxWarps)
    throw NamedError("InputError", "kernel " + name_ + " cannot have this number of warps", std::to_string(warps_),
                     "1 to 32", "");
  if (cubin.empty()) throw NamedError("InputError", "kernel " + name_ + " has no code", "0 bytes", "a cubin", "");
  const CurrentContext current(device_->context);
  try {
    load(cubin);
  } catch (...) {
    if (module_) device_->driver.module_unload(module_);
    throw;
  }
}

Kernel::~Kernel() {
  // At the end of a process the driver may refuse all of this; then the code is gone anyhow.
  CUcontext popped = nullptr;
  if (device_->driver.context_push(device_->context.get()) != CUDA_SUCCESS) return;
  device_->driver.module_unload(module_);
  device_->driver.context_pop(&popped);
}

void Kernel::load(std::string_view cubin) {
  const Driver& driver = device_->driver;
  const std::string of = " of kernel " + name_;
  driver.check(driver.module_load(&module_, cubin.data()), "cuModuleLoadData" + of);
  driver.check(driver.module_get_function(&function_, module_, name_.c_str()), "cuModuleGetFunction" + of);
  check_parameters();
  if (shared_bytes_ > kSharedWithoutAsking)
    driver.check(driver.function_set_attribute(function_, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                               static_cast<int>(shared_bytes_)),
                 "cuFuncSetAttribute" + of + ", " + std::to_string(shared_bytes_) + " bytes of shared memory");
}

// A launch with other parameters than the code reads would compute garbage, or write to any address.
void Kernel::check_parameters() const {
  if (!device_->driver.function_get_parameter) return;
  const auto& fields = layout_.fields();
  for (std::size_t i = 0; i <= fields.size(); ++i) {
    Field actual{};
    const bool exists = device_->driver.function_get_parameter(function_, i, &actual.offset, &actual.size) ==
                        CUDA_SUCCESS;  // else it has no more
    const bool expected = i < fields.size();
    if (exists == expected && (!exists || (actual.offset == fields[i].offset && actual.size == fields[i].size)))
      continue;
    throw NamedError("InputError",
                     "kernel " + name_ + " has other parameters than were announced: parameter " + std::to_string(i),
                     expected ? text(fields[i]) : "none", exists ? text(actual) : "none",
                     "compile it with the signature that it is launched with");
  }
}

void Kernel::launch(const Grid& grid, CUstream stream, std::span<const Value> values) const {
  for (const std::int64_t size : grid)
    if (size < 0 || size > std::numeric_limits<std::int32_t>::max())
      throw NamedError("InputError", "kernel " + name_ + " cannot have this grid", std::to_string(size),
                       "0 to 2147483647 blocks", "");
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return;

  alignas(kParameterAlignment) std::array<std::byte, kMaxParameterBytes> buffer;  // the driver copies it
  std::array<void*, kMaxParameterBytes / sizeof(std::int32_t)> addresses;
  layout_.write(values, device_->maps, buffer.data());
  const auto& fields = layout_.fields();
  for (std::size_t i = 0; i < fields.size(); ++i) addresses[i] = buffer.data() + fields[i].offset;

  CUlaunchConfig config{};
  config.gridDimX = static_cast<unsigned>(grid[0]);
  config.gridDimY = static_cast<unsigned>(grid[1]);
  config.gridDimZ = static_cast<unsigned>(grid[2]);
  config.blockDimX = kThreadsPerWarp * warps_;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = shared_bytes_;
  config.hStream = stream;

  const CurrentContext current(device_->context);
  const CUresult result = device_->driver.launch_kernel(&config, function_, addresses.data(), nullptr);
  if (result != CUDA_SUCCESS)
    device_->driver.check(result, "cuLaunchKernelEx of kernel " + name_ + ", grid " + std::to_string(grid[0]) + " x " +
                                      std::to_string(grid[1]) + " x " + std::to_string(grid[2]) + ", " +
                                      std::to_string(warps_) + " warps");
}

}  // namespace pipex::cuda
