// Threads that share work.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

// Calls work(i) for i in [0, threads), each in a thread of its own as far as there are any, and says whether none failed:
// an exception must not leave a thread, nor this library.
template <typename F>
bool in_threads(int threads, const F& work) {
  std::atomic<bool> whole{true};
  const auto guarded = [&](int i) {
    try {
      work(i);
    } catch (...) {
      whole = false;
    }
  };
  std::vector<std::thread> others;
  int started = 1;
  try {
    for (; started < threads; ++started) others.emplace_back(guarded, started);
  } catch (...) {  // no more are to be had
  }
  guarded(0);
  for (int i = started; i < threads; ++i) guarded(i);
  for (auto& other : others) other.join();
  return whole;
}

// For functions that C calls: 0, or 1 if memory ran out.
template <typename F>
std::int32_t status(const F& work) {
  try {
    work();
    return 0;
  } catch (...) {
    return 1;
  }
}
