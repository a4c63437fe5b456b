#pragma once

#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace subspace {

// Calls work(worker) for worker 0 on this thread and for each other below `count` on one of its own, and returns when
// all have. The workers share what there is to do among themselves: where the system gives fewer threads, those there
// are do all of it. The first exception of any worker is thrown again here.
template <class Work>
void run_on_threads(std::int64_t count, const Work& work) {
  std::exception_ptr failure;
  std::mutex guard;
  const auto run = [&](std::int64_t worker) {
    try {
      work(worker);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  if (count > 1) helpers.reserve(count - 1);
  try {
    for (std::int64_t worker = 1; worker < count; ++worker) helpers.emplace_back(run, worker);
  } catch (const std::system_error&) {
    // no more threads
  }
  run(0);
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace subspace
