#include "cuda/kernels/requirements.hpp"

#include <limits>
#include <utility>

#include "common/named_error.hpp"

namespace pipex::cuda {
namespace {

constexpr std::int64_t kMaxBlocksAcross = 65535;                                     // of a grid's second dimension
constexpr std::int64_t kMaxElements = std::numeric_limits<std::int64_t>::max() / 8;  // byte offsets stay in 64 bits

[[noreturn]] void refuse(std::string problem, std::string got, std::string needed) {
  throw NamedError("InputError", std::move(problem), std::move(got), std::move(needed), "");
}

const char* name(NumberType type) {
  switch (type) {
    case NumberType::float32:
      return "float32";
    case NumberType::float16:
      return "float16";
    case NumberType::bfloat16:
      return "bfloat16";
  }
  return "unknown";
}

}  // namespace

NumberType to_number_type(const std::string& text) {
  for (const NumberType type : {NumberType::float32, NumberType::float16, NumberType::bfloat16})
    if (text == name(type)) return type;
  refuse("gradients cannot be of this type", text, "float32, float16 or bfloat16");
}

std::size_t size_of(NumberType type) { return type == NumberType::float32 ? 4 : 2; }

bool is_vector_aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % kVectorBytes == 0; }

void require_pointer(const void* data, std::size_t alignment, const char* what) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  if (address == 0 || address % alignment != 0)
    refuse(std::string(what) + " is not at a usable address", std::to_string(address),
           "a multiple of " + std::to_string(alignment) + ", not 0");
}

void require_gradient(const GradientBuffer& gradient, NumberType part_type) {
  if (gradient.type != NumberType::float32 && gradient.type != part_type)
    refuse("a gradient of this type cannot be added to", name(gradient.type),
           part_type == NumberType::float32 ? "float32" : std::string("float32 or ") + name(part_type));
  require_pointer(gradient.data, size_of(gradient.type), "the gradient");
}

void require_columns(std::int64_t columns, std::int64_t columns_per_block) {
  const std::int64_t most = kMaxBlocksAcross * columns_per_block;
  if (columns < 1 || columns > most)
    refuse("a matrix cannot have this width", std::to_string(columns) + " columns", "1 to " + std::to_string(most));
}

void require_workspace(const Workspace& workspace, std::size_t needed) {
  if (workspace.bytes < needed)
    refuse("the workspace is too small", std::to_string(workspace.bytes) + " bytes", std::to_string(needed));
  if (needed > 0) require_pointer(workspace.data, kVectorBytes, "the workspace");
}

void require_count(std::int64_t count) {
  if (count < 0 || count > kMaxElements)
    refuse("there is no such number of elements", std::to_string(count), "0 to " + std::to_string(kMaxElements));
}

void require_blocks(std::int64_t blocks, const char* what) {
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();  // of a grid's first dimension
  if (blocks > most)
    refuse(std::string("there are too many ") + what, std::to_string(blocks) + " blocks", std::to_string(most));
}

Parts stack(const std::vector<Part>& parts, NumberType type, std::int64_t columns) {
  if (parts.empty() || parts.size() > kMaxParts)
    refuse("so many micro-batches cannot be summed in one call", std::to_string(parts.size()),
           "1 to " + std::to_string(kMaxParts));
  Parts stacked{};
  for (const Part& part : parts) {
    const std::string what = "micro-batch " + std::to_string(stacked.count) + " of the call";
    const std::int64_t before = stacked.begin[stacked.count];
    if (part.rows < 0 || part.rows > kMaxElements / columns - before)
      refuse(what + " cannot have this size", std::to_string(part.rows) + " rows",
             "0 or more, and fewer than 2^60 elements in all");
    if (part.rows > 0) require_pointer(part.data, size_of(type), what.c_str());
    stacked.data[stacked.count] = part.data;
    stacked.begin[++stacked.count] = before + part.rows;
  }
  return stacked;
}

bool is_vector_aligned(const std::vector<Part>& parts, NumberType type, std::int64_t columns) {
  if (columns * static_cast<std::int64_t>(size_of(type)) % kVectorBytes != 0) return false;
  for (const Part& part : parts)
    if (!is_vector_aligned(part.data)) return false;
  return true;
}

}  // namespace pipex::cuda
