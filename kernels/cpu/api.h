// What Python calls (the Python files beside hold the same signatures): plain C, pointers and sizes.
#pragma once

#include <cstdint>

#include "record.h"
#include "simd.h"

#define MANTA_API extern "C" __attribute__((visibility("default")))

namespace manta {

// Run function(T{}), as `run` does, for the type that Python's code for a dtype stands for.
template <class Function>
inline void dispatch(int dtype, const Function& function) {
    switch (dtype) {
        case 0: return run([=] { function(float{}); });
        case 1: return run([=] { function(BFloat16{}); });
        case 2: return run([=] { function(Half{}); });
    }
}

// Run function(T{}, C{}), for a dtype and the type of a cache beside it.
template <class Function>
inline void dispatch_cache(int dtype, bool has_float8_cache, const Function& function) {
    dispatch(dtype, [=](auto t) {
        if (has_float8_cache)
            function(t, Float8{});
        else
            function(t, t);
    });
}

}  // namespace manta
