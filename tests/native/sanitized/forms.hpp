// Messages of tensors of elements of any size.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "host/message.hpp"

/// A table of tensors of so many elements each, `bytes` long, and the bytes of them all.
inline std::pair<std::string, std::uint64_t> table_of(const std::vector<std::size_t>& elements, std::uint8_t bytes) {
  std::string table;
  std::uint64_t end = 0;
  for (const std::size_t count : elements) {
    pipex::TensorRecord record{};
    record.dimensions = 1;
    record.code = 1;
    record.bits = static_cast<std::uint8_t>(8 * bytes);
    record.offset = (end + 63) / 64 * 64;
    record.shape[0] = static_cast<std::int64_t>(count);
    record.strides[0] = 1;
    end = record.offset + count * bytes;
    table.append(reinterpret_cast<const char*>(&record), sizeof record);
  }
  return {table, end};
}

inline pipex::MessageForm form_of(const std::vector<std::size_t>& elements, std::uint8_t bytes) {
  auto [table, payload_bytes] = table_of(elements, bytes);
  return {std::move(table), payload_bytes};
}
