// What lies in a slot: a header, a table that says what the tensors are, and their bytes (pipex/transport/header.py).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "host/dlpack.hpp"

namespace pipex {

constexpr int kMaxDimensions = 8;
constexpr std::size_t kTensorAlignment = 64;  // of every tensor, as torch's own allocator gives
constexpr std::size_t kMaxTensors = 4096;     // of one message: a bound for what another process may claim

/// Where a message's bytes lie.
enum : std::uint8_t { kInSlot = 0 };  // else in the consumer's device memory of this generation

/// The first bytes of a message. What comes before `count` is the same for all messages of an edge.
struct MessageHeader {
  std::array<std::byte, 32> edge;  // magic, version, digest of the plan, both stages
  std::uint8_t kind, place;
  std::uint16_t count;  // of tensors
  std::uint32_t microbatch;
  std::uint64_t step, sequence;
  std::uint64_t bytes;  // of the tensors with what lies between them
};
static_assert(sizeof(MessageHeader) == 64);

/// A row of the table.
struct TensorRecord {
  std::uint8_t dtype, dimensions, wants_gradient;
  std::uint8_t code, bits;  // DLPack's
  std::uint8_t unused[3];
  std::uint64_t offset;                                         // from the first tensor's beginning
  std::int64_t shape[kMaxDimensions], strides[kMaxDimensions];  // in elements
};
static_assert(sizeof(TensorRecord) == 144);

/// The header at the front of a ring is not the expected one. The message stays where it is.
class HeaderMismatch : public std::exception {
 public:
  HeaderMismatch(const MessageHeader& got, const MessageHeader& needed) : got(got), needed(needed) {}

  const char* what() const noexcept override { return "header mismatch"; }

  MessageHeader got, needed;
};

/// What the tensors of a message are. Many messages have the same form.
class MessageForm {
 public:
  /// Proves that a table can be used: every tensor lies within `payload_bytes`. Throws NamedError (MessageMismatch).
  MessageForm(std::string table, std::uint64_t payload_bytes);

  const std::string& table() const { return table_; }
  std::size_t count() const { return spans_.size(); }
  const TensorRecord& tensor(std::size_t index) const { return records_[index]; }

  /// Bytes from a tensor's first element to its last, with whatever lies between them.
  std::size_t span(std::size_t index) const { return spans_[index]; }

  std::size_t payload_bytes() const { return payload_bytes_; }

  /// Where the tensors begin, from the beginning of the message.
  std::size_t payload() const { return payload_of(count()); }
  std::size_t total() const { return payload() + payload_bytes_; }

  static std::size_t payload_of(std::size_t count);

 private:
  std::string table_;
  std::uint64_t payload_bytes_;
  std::vector<TensorRecord> records_;
  std::vector<std::size_t> spans_;
};

}  // namespace pipex
