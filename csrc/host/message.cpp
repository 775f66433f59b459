#include "host/message.hpp"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "common/named_error.hpp"
#include "host/segment.hpp"

namespace pipex {
namespace {

NamedError impossible(const std::string& what) {
  return {"MessageMismatch", "a message between two ranks says what cannot be", what, "a tensor within its message",
          "use one version of pipex on all ranks; if it is one, some code writes out of bounds"};
}

// Where the payload begins in its page: processors take a load for one of what was just stored where both agree in the
// last 12 bits of their addresses, and torch's large tensors begin at 64 in a page. A copy to a few hundred bytes
// further on loads what only seems just stored: 4 MiB took 3 to 8 % longer.
constexpr std::size_t kPayloadUnit = 1024;

/// Throws if the tensor's bytes cannot be counted.
std::size_t span_of(const TensorRecord& record) {
  if (record.dimensions > kMaxDimensions) throw impossible(std::to_string(record.dimensions) + " dimensions");
  if (record.bits == 0 || record.bits % 8 != 0)
    throw impossible("elements of " + std::to_string(record.bits) + " bits");
  const auto is_set = [](auto value) { return value != 0; };
  if (std::any_of(std::begin(record.unused), std::end(record.unused), is_set) ||
      std::any_of(record.shape + record.dimensions, std::end(record.shape), is_set) ||
      std::any_of(record.strides + record.dimensions, std::end(record.strides), is_set) || record.wants_gradient > 1)
    throw impossible("something where nothing may stand");
  std::int64_t last = 0;      // element
  std::int64_t elements = 1;  // an expanded tensor has more of them than bytes
  bool empty = false;
  for (int i = 0; i < record.dimensions; ++i) {
    std::int64_t reach;
    if (record.shape[i] < 0 || record.strides[i] < 0) throw impossible("a size or stride below 0");
    empty = empty || record.shape[i] == 0;
    if (record.shape[i] > 0 &&
        (__builtin_mul_overflow(record.shape[i] - 1, record.strides[i], &reach) ||
         __builtin_add_overflow(last, reach, &last) || __builtin_mul_overflow(elements, record.shape[i], &elements)))
      throw impossible("a tensor larger than any memory");
  }
  std::int64_t bytes;
  if (empty) return 0;
  if (__builtin_add_overflow(last, 1, &last) || __builtin_mul_overflow(last, record.bits / 8, &bytes))
    throw impossible("a tensor larger than any memory");
  return static_cast<std::size_t>(bytes);
}

}  // namespace

std::size_t MessageForm::payload_of(std::size_t count) {
  const std::size_t bytes = Segment::kHeaderBytes + sizeof(MessageHeader) + count * sizeof(TensorRecord);
  return (bytes + kPayloadUnit - 1) / kPayloadUnit * kPayloadUnit - Segment::kHeaderBytes;
}

MessageForm::MessageForm(std::string table, std::uint64_t payload_bytes)
    : table_(std::move(table)), payload_bytes_(payload_bytes), records_(table_.size() / sizeof(TensorRecord)) {
  if (table_.size() % sizeof(TensorRecord) != 0 || records_.size() > kMaxTensors)
    throw impossible("a table of " + std::to_string(table_.size()) + " bytes");
  if (payload_bytes > std::numeric_limits<std::int64_t>::max())
    throw impossible(std::to_string(payload_bytes) + " bytes");
  if (!records_.empty()) std::memcpy(records_.data(), table_.data(), table_.size());
  for (const TensorRecord& record : records_) {
    const std::size_t span = span_of(record);
    if (record.offset % kTensorAlignment != 0 || record.offset > payload_bytes || span > payload_bytes - record.offset)
      throw impossible(std::to_string(span) + " bytes at " + std::to_string(record.offset) + " of " +
                       std::to_string(payload_bytes));
    spans_.push_back(span);
  }
}

}  // namespace pipex
