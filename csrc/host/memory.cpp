#include "host/memory.hpp"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace pipex {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

/// The number after `key` in a file of "key number" lines; `missing` where there is none.
std::uint64_t field(const char* path, const std::string& key, std::uint64_t missing) {
  std::ifstream file(path);
  std::string name;
  std::uint64_t value = 0;
  while (file >> name) {
    if (name == key) return (file >> value) ? value : missing;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return missing;
}

std::uint64_t number(const char* path, std::uint64_t missing) {
  std::ifstream file(path);
  std::uint64_t value = 0;
  return (file >> value) ? value : missing;
}

/// Inside a container the group's own files are mounted here; on a bare host the root group has no memory.max.
std::uint64_t group_memory() {
  const std::uint64_t limit = number("/sys/fs/cgroup/memory.max", kUnlimited);
  if (limit == kUnlimited) return kUnlimited;
  const char* stat = "/sys/fs/cgroup/memory.stat";
  const std::uint64_t cache = field(stat, "inactive_file", 0) + field(stat, "active_file", 0);  // given up on demand
  const std::uint64_t used = number("/sys/fs/cgroup/memory.current", 0);
  const std::uint64_t held = used - std::min(used, cache);
  return limit - std::min(limit, held);
}

}  // namespace

std::uint64_t available_memory() {
  const std::uint64_t kib = field("/proc/meminfo", "MemAvailable:", kUnlimited / 1024);
  return std::min(kib * 1024, group_memory());
}

}  // namespace pipex
