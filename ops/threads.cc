#include "ops/threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace qmoe_plugin {

unsigned CoreCount() { return std::max(1u, std::thread::hardware_concurrency()); }

void OnAllCores(const std::function<void()>& body) {
  std::exception_ptr failure;
  std::mutex mutex;
  const auto guarded = [&] {
    try {
      body();
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < CoreCount(); ++i) threads.emplace_back(guarded);
  guarded();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

void ForEachOnAllCores(int64_t count, const std::function<void(int64_t)>& body) {
  const int64_t run = std::max<int64_t>(1, count / (int64_t(CoreCount()) * 16));
  std::atomic<int64_t> next = 0;
  const auto worker = [&] {
    for (int64_t first; (first = next.fetch_add(run)) < count;)
      for (int64_t i = first; i < std::min(first + run, count); ++i) body(i);
  };
  if (count <= run) {
    worker();  // not worth a thread
  } else {
    OnAllCores(worker);
  }
}

}  // namespace qmoe_plugin
