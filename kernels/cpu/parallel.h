// Parallel loops on torch's OpenMP threads.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>

namespace manta {

// Below this many values a loop is not worth waking the other threads for.
constexpr int64_t MIN_PARALLEL_VALUES = 16384;

// body(i) for i in [0, count). The schedule is dynamic: where another process takes a core for a
// while, the other threads go on with its share instead of waiting.
template <class Body>
inline void parallel_for(int64_t count, int64_t values_each, const Body& body) {
    const bool worth_it = count > 1 && count * values_each >= MIN_PARALLEL_VALUES;
    const int threads = worth_it ? omp_get_max_threads() : 1;
    if (threads == 1) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    const int64_t chunk = count / (threads * 8) > 1 ? count / (threads * 8) : 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) body(i);
}

// body(i, next) for i in [0, count), where `next` is what the same thread runs after i, -1 at its
// end: a thread claims an item ahead, so that it can fetch what that one needs.
template <class Body>
inline void for_claimed(int64_t count, const Body& body) {
    std::atomic<int64_t> unclaimed{0};
    const auto claim = [&] {
        const int64_t i = unclaimed.fetch_add(1, std::memory_order_relaxed);
        return i < count ? i : -1;
    };
#pragma omp parallel num_threads(omp_get_max_threads())
    {
        for (int64_t i = claim(), next; i >= 0; i = next) {
            next = claim();
            body(i, next);
        }
    }
}

}  // namespace manta
