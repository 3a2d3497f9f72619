// Activations rounded to 8 bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "row.h"

namespace manta {

template <class T>
inline float largest_magnitude(const T* x, int64_t size) {
    Floats best = {};
    for_lanes(size, [&](int64_t i, auto lanes) {
        const Floats v = lanes.load(x + i);
        best = max(best, max(v, -v));
    });
    return maximum(best);
}

// to = round(x * inverse_scale) + offset as bytes, for `size` a multiple of WIDTH. Returns the sum
// of the rounded values, without the offset.
template <class T>
inline Ints round_to_bytes(const T* x, float inverse_scale, int32_t offset, int64_t size,
                           void* to) {
    constexpr float SHIFTER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Ints total = {};
    for (int64_t i = 0; i < size; i += WIDTH) {
        const Ints rounded = (Ints)(load(x + i) * inverse_scale + SHIFTER) - 0x4B400000;
        store_bytes(static_cast<char*>(to) + i, rounded + offset);
        total += rounded;
    }
    return total;
}

// The scale that maps a magnitude to 127, and its inverse; zeros, and what is next to zero, become
// zeros.
struct ByteScale {
    explicit ByteScale(float magnitude)
        : scale(magnitude / 127.0f), inverse(magnitude > 1e-30f ? 127.0f / magnitude : 0.0f) {}
    float scale, inverse;
};

inline int32_t sum(Ints v) {
    int32_t total = 0;
    for (int i = 0; i < WIDTH; ++i) total += v[i];
    return total;
}

}  // namespace manta
