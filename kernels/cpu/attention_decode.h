// Attention of single queries: bound by memory, so every key and value is read once.
#pragma once

#include "attention.h"

namespace manta {

// Part of one request's context, for all heads that share a kv head.
struct DecodeItem {
    int64_t request, kv_head, begin, end;
    int64_t split;  // of the plan; -1 when this is the whole context
    // For a split: unnormalized output [group, head_dim], then maxima [group] and sums [group] of
    // the weights; else null.
    float* partial;
};

template <class T, class C>
class DecodeAttention {
    using O = Operand<T>;
    using Element = typename O::Element;
    static constexpr bool IS_BFLOAT16 = std::is_same_v<C, BFloat16>;
    // Keys are read as 32-bit words of PARTS elements: as they lie in the cache, or converted.
    static constexpr int PARTS = O::PACKED == 1 && IS_BFLOAT16 ? 2 : 1;
    static constexpr bool IN_PLACE = IS_BFLOAT16 || std::is_same_v<C, float>;

public:
    explicit DecodeAttention(const Attention<T, C>& attention)
        : a(attention),
          dim(a.head_dim),
          group(a.group()),
          depth(dim / O::PACKED),
          words(depth / PARTS) {}

    static int64_t partial_size(const Attention<T, C>& a) { return a.group() * (a.head_dim + 2); }

    void run(const DecodeItem& item) const {
        State s;
        float* next = scratch(group * (dim + 2 + 2 * TILE + depth) + TILE * depth);
        const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
        s.scores = take(group * TILE);
        s.weights = reinterpret_cast<Element*>(take(group * TILE));
        s.queries = reinterpret_cast<Element*>(take(group * depth));
        s.keys = reinterpret_cast<Element*>(take(TILE * depth));
        if (item.partial) next = item.partial;
        s.out = take(group * dim);
        s.maxima = take(group);
        s.sums = take(group);
        std::fill(s.out, s.out + group * dim, 0.0f);
        std::fill(s.maxima, s.maxima + group, -INFINITY);
        std::fill(s.sums, s.sums + group, 0.0f);
        const int64_t row = a.row_offset(item.request, item.kv_head, 0);
        for (int64_t g = 0; g < group; ++g)
            O::pack(a.q + row + g * dim, s.queries + g * depth, dim);
        visit_tiles(item, s);
        if (!item.partial) write(s.out, item.request, item.kv_head);
    }

    // Fold `count` partial results of one request and kv head into the first.
    void combine(float* partials, int64_t count, int64_t request, int64_t kv_head) const {
        float *out = partials, *maxima = out + group * dim, *sums = maxima + group;
        for (int64_t i = 1; i < count; ++i) {
            const float* part = partials + i * partial_size(a);
            for (int64_t g = 0; g < group; ++g) {
                const float own = part[group * dim + g], best = std::max(maxima[g], own);
                const Floats shrink = exp2(broadcast(maxima[g] - best));
                const Floats share = exp2(broadcast(own - best));
                maxima[g] = best;
                sums[g] = fma(broadcast(part[group * (dim + 1) + g]), share,
                              broadcast(sums[g]) * shrink)[0];
                for (int64_t d = g * dim; d < (g + 1) * dim; d += WIDTH)
                    store(out + d, fma(load(part + d), share, load(out + d) * shrink));
            }
        }
        write(out, request, kv_head);
    }

private:
    struct State {
        float *out, *maxima, *sums, *scores;  // scores and weights: TILE places per head
        Element *weights, *queries, *keys;
    };

    void visit_tiles(const DecodeItem& item, const State& s) const {
        int64_t here[TILE], ahead[TILE];
        int64_t tile = item.begin / TILE * TILE;
        Places places(tile, item.begin, item.end);
        const auto locate = [&](int64_t* rows) {
            a.locate(item.request, item.kv_head, tile + places.first, places.last - places.first,
                     rows + places.first);
        };
        for (locate(here); places.last > 0; std::copy_n(ahead, places.last, here)) {
            const Places now = places;
            tile += TILE;
            places = Places(tile, item.begin, item.end);
            locate(ahead);
            // While a tile's keys are read its values are fetched, and with those the next keys.
            score(s, here, now);
            for (int64_t g = 0; g < group; ++g) soften(s, g, now);
            add_values(s, here, now, ahead, places.last);
        }
    }

    void prefetch(const C* row) const {
        const char* bytes = reinterpret_cast<const char*>(row);
        for (int64_t i = 0; i < static_cast<int64_t>(dim * sizeof(C)); i += 64)
            __builtin_prefetch(bytes + i);
    }

    // Scores of a few registers of keys at a time; where there is none, that of the nearest.
    void score(const State& s, const int64_t* rows, Places places) const {
        constexpr int64_t KEYS = 2 * WIDTH;
        for (int64_t begin = places.first / KEYS * KEYS; begin < places.last; begin += KEYS) {
            const int32_t* keys[KEYS];
            for (int64_t i = 0; i < KEYS; ++i) {
                const int64_t place = std::clamp(begin + i, places.first, places.last - 1);
                const C* key = a.k_cache + rows[place];
                if constexpr (IN_PLACE) {
                    keys[i] = reinterpret_cast<const int32_t*>(key);
                } else {
                    O::pack(key, s.keys + i * depth, dim);
                    keys[i] = reinterpret_cast<const int32_t*>(s.keys + i * depth);
                }
                if (place == begin + i) prefetch(a.v_cache + rows[place]);
            }
            int64_t g = 0;
            for (; g + 4 <= group; g += 4) score_heads<4>(s, g, keys, begin);
            for (; g + 2 <= group; g += 2) score_heads<2>(s, g, keys, begin);
            for (; g < group; ++g) score_heads<1>(s, g, keys, begin);
        }
    }

    // A key per lane, two registers of them; their words are transposed, and the queries broadcast.
    template <int HEADS>
    void score_heads(const State& s, int64_t g, const int32_t* const* keys, int64_t begin) const {
        Floats totals[2][HEADS] = {};
        for (int64_t word = 0; word < words; word += 4) {
            const Element* queries = s.queries + g * depth + word * PARTS;
#pragma GCC unroll 2
            for (int n = 0; n < 2; ++n) {
                Floats columns[4];
                load_columns(keys + n * WIDTH, word, columns);
#pragma GCC unroll 8
                for (int i = 0; i < 4 * PARTS; ++i) {
                    Floats key = columns[i / PARTS];
                    if constexpr (PARTS == 2)
                        key = (Floats)(i % 2 == 0 ? (Ints)key << 16
                                                  : (Ints)key & (int32_t)0xFFFF0000);
#pragma GCC unroll 4
                    for (int h = 0; h < HEADS; ++h)
                        totals[n][h] = O::multiply_add(totals[n][h], queries[h * depth + i], key);
                }
            }
        }
        for (int n = 0; n < 2; ++n)
            for (int h = 0; h < HEADS; ++h)
                store(s.scores + (g + h) * TILE + begin + n * WIDTH, totals[n][h]);
    }

    // Scores to weights, relative to the running maximum, to which the output so far is rescaled.
    void soften(const State& s, int64_t g, Places places) const {
        float* scores = s.scores + g * TILE;
        Element* weights = s.weights + g * TILE;
        const int64_t begin = places.first / WIDTH * WIDTH;
        const int64_t end = (places.last + WIDTH - 1) / WIDTH * WIDTH;
        if (a.softcap > 0) a.cap(scores + begin, end - begin);
        std::fill(scores + begin, scores + places.first, -INFINITY);
        std::fill(scores + places.last, scores + end, -INFINITY);
        const float scale = a.unit();
        Floats best = broadcast(s.maxima[g]);
        for (int64_t j = begin; j < end; j += WIDTH) best = max(best, load(scores + j) * scale);
        const float maximum_now = maximum(best);
        Floats total = {};
        for (int64_t j = begin; j < end; j += WIDTH) {
            const Floats weight = exp2(load(scores + j) * scale - maximum_now);
            O::store_weights(weights + j / O::PACKED, weight);
            total += weight;
        }
        const float shrink = exp2(broadcast(s.maxima[g] - maximum_now))[0];
        s.sums[g] = s.sums[g] * shrink + sum(total);
        s.maxima[g] = maximum_now;
        if (shrink != 1.0f)
            for (int64_t d = 0; d < dim; d += WIDTH)
                store(s.out + g * dim + d, load(s.out + g * dim + d) * shrink);
    }

    void add_values(const State& s, const int64_t* rows, Places places, const int64_t* ahead,
                    int64_t next) const {
        int64_t g = 0;
        for (; g + 4 <= group; g += 4, next = 0) add_values_to<4>(s, g, rows, places, ahead, next);
        for (; g + 2 <= group; g += 2, next = 0) add_values_to<2>(s, g, rows, places, ahead, next);
        for (; g < group; ++g, next = 0) add_values_to<1>(s, g, rows, places, ahead, next);
    }

    template <int HEADS>
    void add_values_to(const State& s, int64_t g, const int64_t* rows, Places places,
                       const int64_t* ahead, int64_t next) const {
        // As many columns at a time as accumulators fit the registers.
        constexpr int COUNT = (WIDTH == 16 ? 16 : 8) / HEADS;
        int64_t d = 0;
        for (; d + COUNT * WIDTH <= dim; d += COUNT * WIDTH, next = 0)
            add_columns<HEADS, COUNT>(s, g, d, rows, places, ahead, next);
        for (; d < dim; d += WIDTH, next = 0)
            add_columns<HEADS, 1>(s, g, d, rows, places, ahead, next);
    }

    template <int HEADS, int COUNT>
    void add_columns(const State& s, int64_t g, int64_t d, const int64_t* rows, Places places,
                     const int64_t* ahead, int64_t next) const {
        Floats totals[HEADS][COUNT];
        float* out = s.out + g * dim + d;
        const Element* weights = s.weights + g * TILE;
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 16
            for (int c = 0; c < COUNT; ++c) totals[h][c] = load(out + h * dim + c * WIDTH);
        for (int64_t e = places.first / O::PACKED; e * O::PACKED < places.last; ++e) {
            for (int64_t j = e * O::PACKED; j < std::min(next, (e + 1) * O::PACKED); ++j)
                prefetch(a.k_cache + ahead[j]);
            // An element's keys; one that is not there weighs nothing.
            const C* low = a.v_cache + rows[std::max(e * O::PACKED, places.first)] + d;
            const C* high = a.v_cache + rows[std::min((e + 1) * O::PACKED, places.last) - 1] + d;
#pragma GCC unroll 16
            for (int c = 0; c < COUNT; ++c) {
                const Floats v = O::values(low + c * WIDTH, high + c * WIDTH);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; ++h)
                    totals[h][c] = O::multiply_add(totals[h][c], weights[h * TILE + e], v);
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 16
            for (int c = 0; c < COUNT; ++c) store(out + h * dim + c * WIDTH, totals[h][c]);
    }

    // `out` [group, dim], and behind it maxima [group] and sums [group].
    void write(const float* out, int64_t request, int64_t kv_head) const {
        const float *maxima = out + group * dim, *sums = maxima + group;
        T* to = a.out + a.row_offset(request, kv_head, 0);
        for (int64_t g = 0; g < group; ++g) {
            const float scale = 1.0f / a.total(sums[g], maxima[g], kv_head * group + g);
            for (int64_t d = 0; d < dim; d += WIDTH)
                store(to + g * dim + d, load(out + g * dim + d) * scale);
        }
    }

    const Attention<T, C>& a;
    const int64_t dim, group, depth, words;
};

}  // namespace manta
