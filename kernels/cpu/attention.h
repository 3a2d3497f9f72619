// What one call of paged attention works on, how keys and values are found in the cache, and what
// its two kernels do alike.
//
// A query comes to the same bits in either kernel, whatever else is computed beside it: its keys
// are cut at multiples of PART, and a part at multiples of TILE. A score is a chain over the
// dimensions. The weights of a part are relative to its running maximum, tile by tile (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018); of a tile they are added up in
// WIDTH sums, by the position of the key, which are then reduced; values are added in the order of
// the keys. Parts are folded from the first to the last.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dot.h"

namespace manta {

// Keys that are worked on at a time; their scores and rows fit the first-level cache.
constexpr int TILE = 64;
// Keys that are reduced by themselves: few enough to share a long context out to many threads.
constexpr int PART = 512;

// T is the type of queries and outputs, C that of the cache: T or Float8.
template <class T, class C>
struct Attention {
    const T* q;  // [tokens, heads, head_dim]
    const C *k_cache, *v_cache;  // [blocks, kv_heads, block_size, head_dim]
    const int32_t *query_starts, *context_lens;
    const int32_t* block_tables;  // rows `table_stride` apart
    T* out;  // [tokens, heads, head_dim]
    int64_t requests, heads, kv_heads, head_dim, block_size, table_stride, window;
    float scale, softcap;  // 0: no softcap
    const T* sinks;        // [heads], or null

    int64_t group() const { return heads / kv_heads; }

    // What scores are multiplied by before they are exponents of 2.
    float unit() const { return softcap > 0 ? LOG2_E : scale * LOG2_E; }

    // Scores [count], a multiple of WIDTH, as softcap * tanh(scale * score / softcap).
    void cap(float* scores, int64_t count) const {
        const float steepness = 2 * LOG2_E * scale / softcap;
        for (int64_t i = 0; i < count; i += WIDTH) {
            const Floats power = exp2(load(scores + i) * steepness);
            store(scores + i, softcap - 2 * softcap / (power + 1.0f));
        }
    }

    // What a head's weights add up to, relative to their maximum, with its sink among them.
    float total(float sum, float maximum, int64_t head) const {
        if (sinks == nullptr) return sum;
        Floats sink = {};
        sink[0] = to_float(sinks[head]) * LOG2_E - maximum;
        return sum + exp2(sink)[0];
    }

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

// The places [first, last) of a tile that hold keys of [begin, end).
struct Places {
    Places(int64_t tile, int64_t begin, int64_t end)
        : first(std::max<int64_t>(begin - tile, 0)),
          last(std::clamp<int64_t>(end - tile, 0, TILE)) {}
    int64_t first, last;
};

// What a lane holds of an operand: one float, or with dot products of bfloat16 a pair of them.
template <class T>
struct Operand {
    using Element = float;
    static constexpr int PACKED = 1;  // values per element
    static Floats multiply_add(Floats total, float a, Floats b) {
        return fma(broadcast(a), b, total);
    }
    // A row of `size` values as elements.
    template <class C>
    static void pack(const C* row, float* to, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH) store(to + i, load(row + i));
    }
    // Whether elements can be read from a cache of T itself.
    static constexpr bool IN_PLACE = std::is_same_v<T, float>;
    // A register of elements of consecutive keys' values (here one key's).
    template <class C>
    static Floats values(const C* low, const C*) { return load(low); }
    // Weights of WIDTH consecutive keys as elements.
    static void store_weights(float* to, Floats weights) { store(to, weights); }
};

#if defined(MANTA_BFLOAT16_DOT)
template <>
struct Operand<BFloat16> {
    using Element = int32_t;
    static constexpr int PACKED = 2;
    static Floats multiply_add(Floats total, int32_t a, Floats b) {
        return dot_bfloat16(total, broadcast(a), (Ints)b);
    }
    static void pack(const BFloat16* row, int32_t* to, int64_t size) {
        std::memcpy(to, row, size * sizeof *row);
    }
    static void pack(const Float8* row, int32_t* to, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH)
            store(reinterpret_cast<BFloat16*>(to) + i, load(row + i));
    }
    static constexpr bool IN_PLACE = true;
    template <class C>
    static Floats values(const C* low, const C* high) {
        return (Floats)(bfloat16_bits(low) | (bfloat16_bits(high) << 16));
    }
    static void store_weights(int32_t* to, Floats weights) {
        store(reinterpret_cast<BFloat16*>(to), weights);
    }
};
#endif

// Working memory of a thread, kept from call to call; aligned to cache lines.
inline float* scratch(size_t count) {
    thread_local std::vector<float> memory;
    if (memory.size() < count + 16) memory.resize(count + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~63ull);
}

}  // namespace manta
