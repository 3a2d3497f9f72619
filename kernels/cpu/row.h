// Loops over the values of one row, and the RMS norm of a row.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace manta {

struct AllLanes {
    template <class T>
    Floats load(const T* p) const { return manta::load(p); }
    template <class T>
    void store(T* p, Floats v) const { manta::store(p, v); }
};

struct FirstLanes {
    int64_t count;
    template <class T>
    Floats load(const T* p) const { return load_first(p, count); }
    template <class T>
    void store(T* p, Floats v) const { store_first(p, v, count); }
};

// body(i, lanes) for i = 0, WIDTH, 2 * WIDTH, …; the last `lanes` cover what is left of `size`.
template <class Body>
inline void for_lanes(int64_t size, const Body& body) {
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) body(i, AllLanes{});
    if (i < size) body(i, FirstLanes{size - i});
}

template <class T>
inline float inverse_rms(const T* x, int64_t size, float eps) {
    Floats squares[2] = {};  // two, for each waits on its last addition
    int64_t i = 0;
    for (; i + 2 * WIDTH <= size; i += 2 * WIDTH) {
        const Floats a = load(x + i), b = load(x + i + WIDTH);
        squares[0] = fma(a, a, squares[0]);
        squares[1] = fma(b, b, squares[1]);
    }
    for_lanes(size - i, [&](int64_t j, auto lanes) {
        const Floats a = lanes.load(x + i + j);
        squares[0] = fma(a, a, squares[0]);
    });
    return 1.0f / std::sqrt(sum(squares[0] + squares[1]) / size + eps);
}

// to = x * scale, rounded, times weight. `to` may be x, and of another type than the weight.
template <class X, class T, class Out>
inline void scale_row(const X* x, float scale, const T* weight, Out* to, int64_t size) {
    for_lanes(size, [=](int64_t i, auto lanes) {
        lanes.store(to + i, round_to<T>(lanes.load(x + i) * scale) * lanes.load(weight + i));
    });
}

}  // namespace manta
