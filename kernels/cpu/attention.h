// What one call of paged attention works on, and how keys and values are found in the cache.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace manta {

// Keys that are worked on at a time; their scores and rows fit the first-level cache.
constexpr int TILE = 64;

// T is the type of queries and outputs, C that of the cache: T or Float8.
template <class T, class C>
struct Attention {
    const T* q;  // [tokens, heads, head_dim]
    const C *k_cache, *v_cache;  // [blocks, kv_heads, block_size, head_dim]
    const int32_t *query_starts, *context_lens;
    const int32_t* block_tables;  // rows `table_stride` apart
    T* out;  // [tokens, heads, head_dim]
    int64_t requests, heads, kv_heads, head_dim, block_size, table_stride, window;
    float scale;

    int64_t group() const { return heads / kv_heads; }

    int64_t num_queries(int64_t request) const {
        return query_starts[request + 1] - query_starts[request];
    }

    // Query and output row of a request's row-th (token, head of the group) pair.
    int64_t row_offset(int64_t request, int64_t kv_head, int64_t row) const {
        const int64_t token = query_starts[request] + row / group();
        return (token * heads + kv_head * group() + row % group()) * head_dim;
    }

    // The first key that a query at `position` sees.
    int64_t first_visible(int64_t position) const {
        return window > 0 && position >= window ? position - window + 1 : 0;
    }

    // Offsets into either cache of the rows of keys [begin, begin + count).
    void locate(int64_t request, int64_t kv_head, int64_t begin, int64_t count,
                int64_t* offsets) const {
        const int32_t* table = block_tables + request * table_stride;
        int64_t block = begin / block_size, slot = begin % block_size;
        for (int64_t i = 0; i < count; ++block, slot = 0) {
            const int64_t start = (table[block] * kv_heads + kv_head) * block_size;
            for (; slot < block_size && i < count; ++slot, ++i)
                offsets[i] = (start + slot) * head_dim;
        }
    }
};

// Working memory of a thread, kept from call to call; aligned to cache lines.
inline float* scratch(size_t count) {
    thread_local std::vector<float> memory;
    if (memory.size() < count + 16) memory.resize(count + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~63ull);
}

}  // namespace manta
