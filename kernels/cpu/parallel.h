// Parallel loops on a few threads of our own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace manta {

// Below this many values a loop is not worth waking the other threads for.
constexpr int64_t MIN_PARALLEL_VALUES = 16384;

// How many threads a loop may have, with the one that calls it.
int num_threads();

// Calls work(context) on this thread at once, and on others that come while it runs here. All that
// came have left when this returns.
void run_on_threads(void (*work)(const void*), const void* context);

// work() shares out what there is to do by itself: any number of threads may call it.
template <class Work>
inline void on_threads(const Work& work) {
    run_on_threads([](const void* w) { (*static_cast<const Work*>(w))(); }, &work);
}

// Numbers from 0 on, each for one thread. Where another process takes a core for a while, the
// other threads go on with its share instead of waiting, and slow cores take on less.
class Claims {
public:
    explicit Claims(int64_t count) : count(count) {}

    // The first of `size` numbers, or -1 when all are gone.
    int64_t take(int64_t size = 1) {
        const int64_t first = unclaimed.fetch_add(size, std::memory_order_relaxed);
        return first < count ? first : -1;
    }

private:
    alignas(64) std::atomic<int64_t> unclaimed{0};
    alignas(64) const int64_t count;
};

// body(i) for i in [0, count).
template <class Body>
inline void parallel_for(int64_t count, int64_t values_each, const Body& body) {
    if (count <= 1 || count * values_each < MIN_PARALLEL_VALUES) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    const int64_t chunk = std::max<int64_t>(1, count / (num_threads() * 8));
    Claims claims(count);
    on_threads([&] {
        for (int64_t begin; (begin = claims.take(chunk)) >= 0;)
            for (int64_t i = begin; i < std::min(begin + chunk, count); ++i) body(i);
    });
}

// body(i, next) for i in [0, count), where `next` is what the same thread runs after i, -1 at its
// end: a thread claims an item ahead, so that it can fetch what that one needs.
template <class Body>
inline void for_claimed(int64_t count, const Body& body) {
    Claims claims(count);
    on_threads([&] {
        for (int64_t i = claims.take(), next; i >= 0; i = next) {
            next = claims.take();
            body(i, next);
        }
    });
}

}  // namespace manta
