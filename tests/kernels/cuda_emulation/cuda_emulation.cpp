// The scheduler of the emulation: blocks one after another, and in each one fiber a thread.
#include "cuda_emulation.h"

#include <ucontext.h>

#include <csetjmp>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

emulated::Index threadIdx, blockIdx, blockDim;

namespace emulated {
namespace {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 * 1024, kMostShared = 48 * 1024;

bool backwards = false;
int gpu = 80;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};

  State state = State::kDone;
  const char* file = nullptr;  // where it waits
  int line = 0;
  const void* given = nullptr;  // to its warp
  size_t size = 0;

  std::deque<std::vector<Copy>> copies{1};  // by group, the last is open
};

class Scheduler {
 public:
  void run_block(int threads, const std::function<void()>& body) {
    body_ = &body;
    threads_ = threads;
    fresh_.clear();
    shared_ = 0;
    error_.clear();
    while (static_cast<int>(fibers_.size()) < threads) {
      fibers_.push_back(std::make_unique<Fiber>());
    }
    for (int i = 0; i < threads; ++i) {
      fibers_[i]->state = State::kReady;
      fibers_[i]->copies.assign(1, {});
    }
    while (step()) {
    }
  }

  // Called on a fiber.
  void wait(State state, const char* file, int line) {
    Fiber& fiber = *fibers_[current_];
    fiber.state = state;
    fiber.file = file;
    fiber.line = line;
    leave(fiber);
  }
  const char* exchange(const void* given, size_t size, const char* file, int line) {
    Fiber& fiber = *fibers_[current_];
    fiber.given = given;
    fiber.size = size;
    wait(State::kAtExchange, file, line);
    return exchanged_[current_ / kWarp].data();
  }
  std::deque<std::vector<Copy>>& copies() { return fibers_[current_]->copies; }
  void* shared(void* memory, size_t size) {
    if (fresh_.insert(memory).second) {
      std::memset(memory, 0xff, size);
      shared_ += size;
      if (shared_ > kMostShared) {
        throw std::runtime_error("a block uses more than 48 KB of shared memory");
      }
    }
    return memory;
  }

 private:
  // Every ready thread once, and then those whose wait is over. False when all are done.
  bool step() {
    bool ran = false;
    for (int i = 0; i < threads_; ++i) {
      const int thread = backwards ? threads_ - 1 - i : i;
      if (fibers_[thread]->state == State::kReady) {
        ran = true;
        enter(thread);
      }
    }
    if (!error_.empty()) {
      fail(error_);
    }
    if (!ran) {
      return stuck();
    }
    for (int first = 0; first < threads_; first += kWarp) {
      finish_exchange(first);
    }
    finish_barrier();
    return true;
  }

  bool stuck() {
    for (int i = 0; i < threads_; ++i) {
      const Fiber& fiber = *fibers_[i];
      if (fiber.state != State::kDone) {
        fail("thread " + std::to_string(i) + " waits at " + site(fiber) +
             " for threads that do not come");
      }
    }
    return false;
  }

  bool all_wait(int first, int count, State state) const {
    for (int i = first; i < first + count; ++i) {
      if (fibers_[i]->state != state || fibers_[i]->line != fibers_[first]->line) {
        return false;
      }
    }
    return true;
  }

  void finish_barrier() {
    if (all_wait(0, threads_, State::kAtBarrier)) {
      for (int i = 0; i < threads_; ++i) {
        fibers_[i]->state = State::kReady;
      }
    }
  }

  void finish_exchange(int first) {
    if (!all_wait(first, kWarp, State::kAtExchange)) {
      return;
    }
    const size_t size = fibers_[first]->size;
    std::vector<char>& all = exchanged_[first / kWarp];
    all.resize(kWarp * size);
    for (int lane = 0; lane < kWarp; ++lane) {
      Fiber& fiber = *fibers_[first + lane];
      if (size) {
        std::memcpy(&all[lane * size], fiber.given, size);
      }
      fiber.state = State::kReady;
    }
  }

  static std::string site(const Fiber& fiber) {
    return std::string(fiber.file) + ":" + std::to_string(fiber.line);
  }

  // The stacks of threads that wait are dropped with all that is on them.
  [[noreturn]] void fail(const std::string& error) {
    fibers_.clear();
    throw std::runtime_error(error);
  }

  void enter(int thread) {
    Fiber& fiber = *fibers_[thread];
    current_ = thread;
    threadIdx.x = static_cast<unsigned>(thread);
    if (_setjmp(scheduler_) != 0) {
      return;  // the fiber has left
    }
    if (fiber.started) {
      _longjmp(fiber.resume, 1);
    }
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Scheduler::live), 0);
    setcontext(&fiber.context);
  }

  void leave(Fiber& fiber) {
    if (_setjmp(fiber.resume) == 0) {
      _longjmp(scheduler_, 1);
    }
  }

  // A fiber's whole life: one thread after another.
  static void live();

  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void()>* body_ = nullptr;
  int threads_ = 0, current_ = 0;
  jmp_buf scheduler_;
  std::string error_;
  std::set<void*> fresh_;
  size_t shared_ = 0;
  std::vector<char> exchanged_[kMostThreads / kWarp];  // by warp, until its next exchange
};

Scheduler scheduler;
std::mutex one_launch;

void Scheduler::live() {
  for (;;) {
    try {
      (*scheduler.body_)();
    } catch (const std::exception& error) {
      scheduler.error_ = error.what();
    }
    Fiber& fiber = *scheduler.fibers_[scheduler.current_];
    fiber.state = State::kDone;
    scheduler.leave(fiber);
  }
}

}  // namespace

const char* run(int64_t blocks, int threads, const std::function<void()>& body) {
  static std::string failure;
  const std::lock_guard<std::mutex> lock(one_launch);
  try {
    if (threads % kWarp != 0 || threads > kMostThreads || blocks < 1) {
      throw std::runtime_error("no GPU runs such blocks");
    }
    blockDim.x = static_cast<unsigned>(threads);
    for (int64_t i = 0; i < blocks; ++i) {
      blockIdx.x = static_cast<unsigned>(backwards ? blocks - 1 - i : i);
      scheduler.run_block(threads, body);
    }
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}

void barrier(const char* file, int line) { scheduler.wait(State::kAtBarrier, file, line); }

const void* exchange(const void* given, size_t size, const char* file, int line) {
  return scheduler.exchange(given, size, file, line);
}

uint64_t shuffle_xor_bits(unsigned mask, uint64_t bits, int lanes, const char* file, int line) {
  const struct Given {
    uint64_t bits;
    unsigned mask;
    int lanes;
  } given = {bits, mask, lanes};
  const auto* all = static_cast<const Given*>(exchange(&given, sizeof(given), file, line));
  for (int lane = 0; lane < kWarp; ++lane) {
    if (all[lane].mask != ~0u || all[lane].lanes != lanes) {
      throw std::runtime_error(std::string("the lanes of a warp disagree about a shuffle at ") +
                               file + ":" + std::to_string(line));
    }
  }
  return all[(threadIdx.x ^ static_cast<unsigned>(lanes)) % kWarp].bits;
}

void copy_asynchronously(void* to, const void* from) {
  scheduler.copies().back().push_back({to, from});
}
void close_group() { scheduler.copies().emplace_back(); }
void wait_for_groups(size_t most) {
  auto& groups = scheduler.copies();
  for (; groups.size() > most + 1; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, 16);
    }
  }
}

int architecture() { return gpu; }

void* shared(void* memory, size_t size) { return scheduler.shared(memory, size); }

void assert_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    const std::string size = std::to_string(bytes);
    throw std::runtime_error(size + " bytes at an address that is no multiple of " + size);
  }
}

}  // namespace emulated

// Whether blocks and threads run from the last to the first: what depends on it is a race.
extern "C" __attribute__((visibility("default"))) void dfq_emulate_backwards(int value) {
  emulated::backwards = value != 0;
}
// 75, 80 or 90: what kernels take this for.
extern "C" __attribute__((visibility("default"))) void dfq_emulate_architecture(int value) {
  emulated::gpu = value;
}
