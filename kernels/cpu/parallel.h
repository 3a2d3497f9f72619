// Parallel loops on torch's OpenMP threads.
#pragma once

#include <omp.h>

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

}  // namespace manta
