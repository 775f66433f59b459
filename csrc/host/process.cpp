#include "host/process.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <sstream>
#include <string>

namespace pipex {
namespace {

int generation = 0;
std::atomic<std::uint64_t> own_start = 0;  // of this process; 0: not read yet

}  // namespace

std::optional<std::uint64_t> start_time(pid_t pid) {
  const Descriptor file(::open(("/proc/" + std::to_string(pid) + "/stat").c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.valid()) return errno == ENOENT ? std::optional<std::uint64_t>(0) : std::nullopt;
  char text[1024];  // its 52 fields are shorter
  const ssize_t length = ::read(file.get(), text, sizeof text);
  if (length <= 0) return errno == ESRCH ? std::optional<std::uint64_t>(0) : std::nullopt;
  const std::string line(text, static_cast<std::size_t>(length));
  // The command (field 2) stands in parentheses and may hold anything, a ')' too: fields are counted after the last.
  std::istringstream fields(line.substr(line.rfind(')') + 1));
  std::string state, skipped;
  fields >> state;
  if (state == "Z" || state == "X") return 0;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  std::uint64_t ticks = 0;
  fields >> ticks;
  return ticks;
}

std::uint64_t own_start_time() {
  fork_generation();  // from here on a fork forgets what was read
  const std::uint64_t known = own_start.load();
  if (known != 0) return known;
  const std::optional<std::uint64_t> start = start_time(::getpid());
  if (!start) throw system_failure("/proc does not tell when this process has started", errno);
  own_start.store(*start);
  return *start;
}

NamedError system_failure(const std::string& problem, int error) {
  if (error == ENFILE)
    return {"PipexError", problem, "no file descriptor left: " + std::string(std::strerror(error)),
            "fewer open files in all processes of this host", "end some, or raise fs.file-max (sysctl)"};
  if (error != EMFILE) return {"PipexError", problem, std::strerror(error), "", ""};
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  return {"InputError", problem, "no file descriptor left: " + std::string(std::strerror(error)),
          "more than the " + std::to_string(limit.rlim_cur) + " that this process may have",
          "raise the limit (ulimit -n)"};
}

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int fork_generation() {
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] {
    ++generation;
    own_start.store(0);
  });
  return registered == 0 ? generation : 0;
}

void Descriptor::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

}  // namespace pipex
