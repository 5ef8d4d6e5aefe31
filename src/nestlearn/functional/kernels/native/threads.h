// Threads that share work.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// The pool of the caller's own OpenMP runtime, where there is one in the process. Its threads wait for work in a loop
// for
// a while after each operation of PyTorch, so others would have to share the cores with them.
using Pool = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <typename F>
struct Pieces {
  const F& each;
  const int count;
  std::atomic<int> next{0};
  std::atomic<bool> whole{true};

  static void work(void* p) {
    Pieces& pieces = *static_cast<Pieces*>(p);
    try {
      for (int i; (i = pieces.next++) < pieces.count;) pieces.each(i);
    } catch (...) {  // an exception must not leave a thread, nor this library
      pieces.whole = false;
    }
  }
};

// Calls each(i) for i in [0, count), in so many threads as far as there are any, and says whether none failed.
// start: whether threads are worth starting where there is no pool.
template <typename F>
bool in_parallel(int threads, int count, const F& each, bool start = true) {
  static const Pool pool = reinterpret_cast<Pool>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  Pieces<F> pieces{each, count};
  threads = std::min(threads, count);
  if (threads > 1 && pool) {
    pool(&Pieces<F>::work, &pieces, unsigned(threads), 0);
    return pieces.whole;
  }
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads && start; ++i) others.emplace_back(Pieces<F>::work, &pieces);
  } catch (...) {  // no more are to be had
  }
  Pieces<F>::work(&pieces);
  for (auto& other : others) other.join();
  return pieces.whole;
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
