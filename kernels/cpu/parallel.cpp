// The threads behind parallel loops.
//
// A barrier waits for every thread, also for one whose core another process has, until the
// scheduler gives it back: milliseconds, for loops of microseconds. So there is none. A loop is a
// door: its caller opens it and works, other threads enter when they come by and work is left, and
// when none is left the caller shuts it and waits for those inside only.
#include "parallel.h"

#include <pthread.h>

#include <chrono>
#include <thread>

#include "api.h"

namespace manta {
namespace {

// The next loop of a step comes within microseconds, so a thread that waits spins for a while. Not
// for long: it may keep its core from the one it waits for.
constexpr std::chrono::microseconds SPIN{50};

constexpr uint32_t SHUT = 1u << 31;

struct Threads {
    std::atomic<int> wanted{1};  // with the caller
    int started = 1;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;  // one loop at a time
    void (*work)(const void*) = nullptr;
    const void* context = nullptr;
    alignas(64) std::atomic<uint32_t> loops{0};      // so far: threads wait for it to change
    alignas(64) std::atomic<uint32_t> inside{SHUT};  // threads, beside the caller, and the door
};

// Never destroyed: its threads run until the process ends.
Threads& threads = *new Threads;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // `yield` does nothing on most
#endif
}

void wait_while(const std::atomic<uint32_t>& value, uint32_t old) {
    const auto end = std::chrono::steady_clock::now() + SPIN;
    do {
        for (int i = 0; i < 16; ++i, pause())
            if (value.load(std::memory_order_acquire) != old) return;
    } while (std::chrono::steady_clock::now() < end);
    value.wait(old, std::memory_order_acquire);
}

bool enter() {
    const uint32_t places = threads.wanted.load(std::memory_order_relaxed) - 1;
    uint32_t others = threads.inside.load(std::memory_order_relaxed);
    while (others < places)  // SHUT is more than there can be
        if (threads.inside.compare_exchange_weak(others, others + 1, std::memory_order_acquire))
            return true;
    return false;
}

void leave() {
    if (threads.inside.fetch_sub(1, std::memory_order_release) == SHUT + 1)
        threads.inside.notify_one();
}

void serve() {
    while (true) {
        const uint32_t loops = threads.loops.load(std::memory_order_acquire);
        if (enter()) {
            threads.work(threads.context);
            leave();
        }
        wait_while(threads.loops, loops);
    }
}

void start_missing() {
    for (; threads.started < threads.wanted.load(); ++threads.started)
        std::thread(serve).detach();
}

// The child of a fork has but the thread that forked.
void forget() {
    threads.started = 1;
    threads.inside.store(SHUT);
    threads.busy.clear();
}
const int registered = pthread_atfork(nullptr, nullptr, forget);

}  // namespace

int num_threads() { return threads.wanted.load(std::memory_order_relaxed); }

void run_on_threads(void (*work)(const void*), const void* context) {
    // While a loop of another thread runs, or this is part of one, the others are occupied.
    if (num_threads() == 1 || threads.busy.test_and_set(std::memory_order_acquire))
        return work(context);
    start_missing();
    threads.work = work;
    threads.context = context;
    threads.inside.store(0, std::memory_order_release);
    threads.loops.fetch_add(1, std::memory_order_release);
    threads.loops.notify_all();
    work(context);
    uint32_t others = threads.inside.fetch_or(SHUT, std::memory_order_acq_rel) | SHUT;
    for (; others != SHUT; others = threads.inside.load(std::memory_order_acquire))
        wait_while(threads.inside, others);
    threads.busy.clear(std::memory_order_release);
}

}  // namespace manta

// For all loops from now on; at least 1.
MANTA_API void manta_set_num_threads(int count) { manta::threads.wanted.store(count); }
