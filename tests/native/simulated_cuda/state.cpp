// Settings, the device and its context, errors, and what tests ask the simulator itself.
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <sstream>

#include "simulator.hpp"

namespace simulated {
namespace {

State* current = nullptr;
std::mutex making;
thread_local std::vector<ContextHandle> contexts;
char primary_context;

ContextHandle primary() { return reinterpret_cast<ContextHandle>(&primary_context); }

void start_afresh() {
  current = nullptr;  // the parent's is left alone: its threads are not here, its lock may be held for ever
  new (&making) std::mutex;
  contexts.clear();
}

}  // namespace

void Settings::set(const std::string& key, const std::string& value) {
  if (key == "seed") {
    seed = std::stoull(value);
    static int times = 0;
    sown = ++times;
  } else if (key == "queues") {
    queues = std::stoi(value);
  } else if (key == "delay") {
    delay_us = std::stoi(value);
  } else if (key == "memory") {
    memory = std::stoull(value);
  } else if (key == "shared") {
    shared = value == "1";
  } else if (key == "poison") {
    poison = value == "1";
  } else if (key == "bug") {
    bug = value;
  } else if (key.starts_with("fail:")) {
    const auto at = value.find('@');
    failures[key.substr(5)] = {std::stoi(value), at == std::string::npos ? 1 : std::stoi(value.substr(at + 1))};
  } else if (key.starts_with("attribute:")) {
    attributes[std::stoi(key.substr(10))] = std::stoi(value);
  } else {
    std::abort();  // a misspelt setting would make a test pass for nothing
  }
}

State& state() {
  const std::lock_guard lock(making);
  if (current == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, start_afresh);
    (void)registered;
    current = new State;
    const char* text = std::getenv("SIMULATED_CUDA");
    std::istringstream settings(text == nullptr ? "" : text);
    for (std::string setting; std::getline(settings, setting, ',');) {
      const auto equals = setting.find('=');
      current->settings.set(setting.substr(0, equals), setting.substr(equals + 1));
    }
  }
  return *current;
}

void Chance::follow(const Settings& settings) {
  if (sown_ == settings.sown) return;
  sown_ = settings.sown;
  state_ = (settings.seed * 64 + thread_) * 0x9E3779B97F4A7C15u + 1;
}

std::uint64_t Chance::next() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return state_;
}

void Chance::pause(int delay_us) {
  if (delay_us == 0) return;
  const std::uint64_t number = next();
  state().drawn += number;
  if (number % 4 == 0) ::usleep(static_cast<useconds_t>((number >> 8) % delay_us));
  if (number % 4 == 1) ::sched_yield();
}

Result enter(const char* function, bool needs_context) {
  State& all = state();
  const std::lock_guard lock(all.mutex);
  const auto failure = all.settings.failures.find(function);
  if (failure != all.settings.failures.end() && ++failure->second.calls >= failure->second.from_call)
    return failure->second.result;
  if (std::strcmp(function, "cuInit") == 0) return kSuccess;
  if (!all.initialised) return kNotInitialized;
  return needs_context && contexts.empty() ? kInvalidContext : kSuccess;
}

void violate(const std::string& what) { state().violations += what + "\n"; }

bool bug(const char* name) { return state().settings.bug == name; }

}  // namespace simulated

using namespace simulated;

SIMULATED Result cuInit(unsigned flags) {
  if (flags != 0) return kInvalidValue;
  if (const Result result = enter("cuInit")) return result;
  state().initialised = true;
  return kSuccess;
}

SIMULATED Result cuGetErrorName(Result error, const char** name) {
  static const std::map<Result, const char*> names = {
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},     {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"}, {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
      {kMapFailed, "CUDA_ERROR_MAP_FAILED"},           {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
      {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED"},
  };
  const auto found = names.find(error);
  if (found == names.end()) return kInvalidValue;
  *name = found->second;
  return kSuccess;
}

SIMULATED Result cuGetErrorString(Result, const char** text) {
  *text = "simulated";
  return kSuccess;
}

SIMULATED Result cuDeviceGet(DeviceNumber* device, int ordinal) {
  *device = ordinal;
  return enter("cuDeviceGet", false);
}

SIMULATED Result cuDeviceGetAttribute(int* value, DeviceAttribute attribute, DeviceNumber) {
  const auto& attributes = state().settings.attributes;
  const auto found = attributes.find(attribute);
  *value = found == attributes.end() ? 1 : found->second;
  return enter("cuDeviceGetAttribute", false);
}

SIMULATED Result cuDevicePrimaryCtxRetain(ContextHandle* context, DeviceNumber) {
  *context = primary();
  return enter("cuDevicePrimaryCtxRetain", false);
}

SIMULATED Result cuDevicePrimaryCtxRelease_v2(DeviceNumber) { return enter("cuDevicePrimaryCtxRelease_v2", false); }

SIMULATED Result cuCtxGetCurrent(ContextHandle* context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return enter("cuCtxGetCurrent", false);
}

SIMULATED Result cuCtxPushCurrent_v2(ContextHandle context) {
  if (const Result result = enter("cuCtxPushCurrent_v2", false)) return result;
  if (context != primary()) return kInvalidContext;
  contexts.push_back(context);
  return kSuccess;
}

SIMULATED Result cuCtxPopCurrent_v2(ContextHandle* context) {
  if (const Result result = enter("cuCtxPopCurrent_v2")) return result;
  *context = contexts.back();
  contexts.pop_back();
  return kSuccess;
}

SIMULATED Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = kGreatestPriority;
  return enter("cuCtxGetStreamPriorityRange");
}

// What tests ask.

SIMULATED void simulated_set(const char* key, const char* value) {
  const std::lock_guard lock(state().mutex);
  state().settings.set(key, value);
}

SIMULATED void simulated_forget() {
  const std::lock_guard lock(making);
  current = nullptr;  // left alone, as whoever still holds memory of it may look at it
  contexts.clear();
}

SIMULATED std::uint64_t simulated_operations() {
  const std::lock_guard lock(state().mutex);
  return state().operations;
}

SIMULATED std::uint64_t simulated_mismatches() {
  const std::lock_guard lock(state().mutex);
  return state().mismatches;
}

SIMULATED std::uint64_t simulated_drawn() { return state().drawn; }

SIMULATED std::size_t simulated_mappings() {
  const std::lock_guard lock(state().mutex);
  return state().mappings.size();
}

SIMULATED std::size_t simulated_contexts() { return contexts.size(); }

SIMULATED std::size_t simulated_violations(char* to, std::size_t room) {
  const std::lock_guard lock(state().mutex);
  const std::string& text = state().violations;
  std::strncpy(to, text.c_str(), room);
  return text.size();
}
