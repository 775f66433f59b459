// Streams, the hardware queues that they share, and events.
#include <csignal>

#include "simulator.hpp"

namespace simulated {

void Queue::put(Operation operation) {  // the state's lock is held
  if (operation.stream) ++operation.stream->enqueued;
  operations_.push_back(std::move(operation));
  if (!thread_.joinable()) {
    sigset_t every, before;  // signals are for the interpreter's threads
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    thread_ = std::thread(&Queue::run, this, ++state().queue_numbers);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  state().changed.notify_all();
}

void Queue::run(int number) {
  State& all = state();
  Chance chance(number);
  std::unique_lock lock(all.mutex);
  for (;;) {
    all.changed.wait(lock, [&] { return all.stopping || !operations_.empty(); });
    if (all.stopping) return;
    Operation& operation = operations_.front();  // stays where it is: others may only append
    chance.follow(all.settings);
    lock.unlock();
    chance.pause(all.settings.delay_us);
    operation.work(chance);
    lock.lock();
    if (operation.stream) ++operation.stream->done;
    operations_.pop_front();
    all.changed.notify_all();
  }
}

void Queue::join() {
  if (thread_.joinable()) thread_.join();
}

bool Queue::touches(const Range& range) {
  for (const Operation& operation : operations_)
    for (const Range& touched : operation.touched)
      if (touched.overlaps(range)) return true;
  return false;
}

std::shared_ptr<Stream> find(StreamHandle handle) {
  const std::lock_guard lock(state().mutex);
  const auto found = state().streams.find(handle);
  return found == state().streams.end() ? nullptr : found->second;
}

bool is_send_stream(StreamHandle handle) {
  const auto stream = find(handle);
  return stream && stream->priority == kGreatestPriority;
}

void enqueue_held() {
  for (Operation& operation : state().held) {
    --operation.stream->enqueued;  // put() counts it again
    operation.stream->queue->put(std::move(operation));
  }
  state().held.clear();
}

namespace {

std::shared_ptr<Event> find_event(EventHandle handle) {  // the lock is held
  const auto found = state().events.find(handle);
  return found == state().events.end() ? nullptr : found->second;
}

thread_local CaptureMode capture_mode{};  // all captures concern the thread, as CUDA begins

}  // namespace

Result enter_question(const char* function) {
  if (const Result result = enter(function)) return result;
  const std::lock_guard lock(state().mutex);
  for (const auto& [_, stream] : state().streams) {
    if (stream->captured_by == std::thread::id()) continue;
    if (capture_mode == kCaptureOfThread && stream->captured_by != std::this_thread::get_id()) continue;
    violate(std::string(function) + " spoils a graph");
    return kCaptureUnsupported;
  }
  return kSuccess;
}

Result submit(StreamHandle handle, std::vector<Range> touched, Work work) {
  State& all = state();
  const auto stream = find(handle);
  if (handle != nullptr && !stream) return kInvalidHandle;
  std::unique_lock lock(all.mutex);
  ++all.operations;
  if (!stream) {
    all.changed.wait(lock, [&] {
      for (const auto& [_, other] : all.streams)
        if (other->blocking && other->done < other->enqueued) return false;
      return true;
    });
    static thread_local Chance chance(0);
    chance.follow(all.settings);
    lock.unlock();
    chance.pause(all.settings.delay_us);
    work(chance);
    return kSuccess;
  }
  Operation operation{std::move(work), stream, std::move(touched)};
  if (bug("late-enqueue") && stream->priority == kGreatestPriority) {
    ++stream->enqueued;
    all.held.push_back(std::move(operation));
    return kSuccess;
  }
  stream->queue->put(std::move(operation));
  return kSuccess;
}

}  // namespace simulated

using namespace simulated;

SIMULATED Result cuStreamCreateWithPriority(StreamHandle* handle, unsigned flags, int priority) {
  if (const Result result = enter("cuStreamCreateWithPriority")) return result;
  State& all = state();
  const std::lock_guard lock(all.mutex);
  const int level = all.settings.shared ? 0 : priority;
  const int queues = all.settings.queues;
  const int number = -level * queues + all.streams_of_priority[level]++ % queues;
  while (static_cast<int>(all.queues.size()) <= number) all.queues.push_back(std::make_unique<Queue>());
  auto stream = std::make_shared<Stream>();
  stream->priority = priority;
  stream->blocking = (flags & kNonBlockingStream) == 0;
  stream->queue = all.queues[number].get();
  *handle = reinterpret_cast<StreamHandle>(stream.get());
  all.streams[*handle] = std::move(stream);
  return kSuccess;
}

SIMULATED Result cuStreamDestroy_v2(StreamHandle handle) {
  if (const Result result = enter("cuStreamDestroy_v2")) return result;
  const std::lock_guard lock(state().mutex);
  return state().streams.erase(handle) == 1 ? kSuccess : kInvalidHandle;
}

SIMULATED Result cuStreamSynchronize(StreamHandle handle) {
  if (const Result result = enter_question("cuStreamSynchronize")) return result;
  const auto stream = find(handle);
  if (!stream) return handle == nullptr ? kSuccess : kInvalidHandle;
  std::unique_lock lock(state().mutex);
  enqueue_held();
  state().changed.wait(lock, [&] { return stream->done == stream->enqueued; });
  return kSuccess;
}

SIMULATED Result cuStreamQuery(StreamHandle handle) {
  if (const Result result = enter_question("cuStreamQuery")) return result;
  const auto stream = find(handle);
  if (!stream) return handle == nullptr ? kSuccess : kInvalidHandle;
  const std::lock_guard lock(state().mutex);
  return stream->done == stream->enqueued ? kSuccess : kNotReady;
}

SIMULATED Result cuStreamIsCapturing(StreamHandle handle, CaptureStatus* status) {
  if (const Result result = enter("cuStreamIsCapturing")) return result;
  const auto stream = find(handle);
  *status = static_cast<CaptureStatus>(stream && stream->captured_by != std::thread::id());
  return kSuccess;
}

SIMULATED Result cuThreadExchangeStreamCaptureMode(CaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return enter("cuThreadExchangeStreamCaptureMode", false);
}

SIMULATED Result cuEventCreate(EventHandle* handle, unsigned) {
  if (const Result result = enter("cuEventCreate")) return result;
  auto event = std::make_shared<Event>();
  *handle = reinterpret_cast<EventHandle>(event.get());
  const std::lock_guard lock(state().mutex);
  state().events[*handle] = std::move(event);
  return kSuccess;
}

SIMULATED Result cuEventDestroy_v2(EventHandle handle) {
  if (const Result result = enter("cuEventDestroy_v2")) return result;
  const std::lock_guard lock(state().mutex);
  return state().events.erase(handle) == 1 ? kSuccess : kInvalidHandle;
}

SIMULATED Result cuEventRecord(EventHandle handle, StreamHandle stream) {
  if (const Result result = enter("cuEventRecord")) return result;
  std::unique_lock lock(state().mutex);
  const auto event = find_event(handle);
  if (!event) return kInvalidHandle;
  const auto reached = std::make_shared<bool>(false);
  event->reached = reached;
  lock.unlock();
  event->on_send_stream = is_send_stream(stream);
  return submit(stream, {}, [reached](Chance&) {
    const std::lock_guard inner(state().mutex);
    *reached = true;
    state().changed.notify_all();
  });
}

SIMULATED Result cuEventQuery(EventHandle handle) {
  if (const Result result = enter_question("cuEventQuery")) return result;
  const std::lock_guard lock(state().mutex);
  const auto event = find_event(handle);
  if (!event) return kInvalidHandle;
  if (bug("source-free-at-once") && event->on_send_stream) return kSuccess;
  return *event->reached ? kSuccess : kNotReady;
}

SIMULATED Result cuStreamWaitEvent(StreamHandle stream, EventHandle handle, unsigned) {
  if (const Result result = enter("cuStreamWaitEvent")) return result;
  if (bug("dropped-computed-wait")) return kSuccess;
  std::unique_lock lock(state().mutex);
  const auto event = find_event(handle);
  if (!event) return kInvalidHandle;
  const auto reached = event->reached;  // the latest record now, whatever is recorded later, and on which stream
  lock.unlock();
  return submit(stream, {}, [reached](Chance&) {
    std::unique_lock inner(state().mutex);
    state().changed.wait(inner, [&] { return state().stopping || *reached; });
  });
}

// For tests.

/// Ends all threads, whatever they wait for.
SIMULATED void simulated_stop() {
  State& all = state();
  {
    const std::lock_guard lock(all.mutex);
    all.stopping = true;
  }
  all.changed.notify_all();
  for (const auto& queue : all.queues) queue->join();
}

SIMULATED Result simulated_capture(StreamHandle handle, int on) {
  const auto stream = find(handle);
  if (!stream) return kInvalidHandle;
  stream->captured_by = on != 0 ? std::this_thread::get_id() : std::thread::id();
  return kSuccess;
}
