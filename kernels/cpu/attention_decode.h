// Attention of single queries: bound by memory, so every key and value is read once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"

namespace manta {

// How a query row is kept for dot products with rows of C, and how `STEP` products are added.
template <class C>
struct Dot {
    using Query = float;
    static constexpr int STEP = WIDTH;
    static Floats add(Floats total, const float* q, const C* k) { return total + load(q) * load(k); }
    static Floats add_last(Floats total, const float*, const C*) { return total; }
    template <class T>
    static void convert(const T* q, float* to, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH) store(to + i, load(q + i));
    }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<BFloat16> {
    using Query = BFloat16;
    static constexpr int STEP = 32;
    static Floats add(Floats total, const BFloat16* q, const BFloat16* k) {
        return (Floats)_mm512_dpbf16_ps((__m512)total, load_bits<__m512bh>(q),
                                        load_bits<__m512bh>(k));
    }
    // The last 16 of a row that is no multiple of 32; the query's row is padded.
    static Floats add_last(Floats total, const BFloat16* q, const BFloat16* k) {
        const __m512i last = _mm512_zextsi256_si512(load_bits<__m256i>(k));
        return (Floats)_mm512_dpbf16_ps((__m512)total, load_bits<__m512bh>(q), (__m512bh)last);
    }
    static void convert(const BFloat16* q, BFloat16* to, int64_t size) {
        std::memcpy(to, q, size * sizeof *q);
    }
};
#endif

// Share of one request's context, for all heads that share a kv head.
struct DecodeItem {
    int64_t request, kv_head, begin, end;
    // Unnormalized output [group, head_dim], then maxima [group] and sums [group] of the weights;
    // null when the item covers the whole context.
    float* partial;
};

template <class T, class C>
class DecodeAttention {
    using D = Dot<C>;
    using Query = typename D::Query;

public:
    explicit DecodeAttention(const Attention<T, C>& attention)
        : a(attention), dim(a.head_dim), group(a.group()), padded_dim((dim + 31) / 32 * 32) {}

    static int64_t partial_size(const Attention<T, C>& a) { return a.group() * (a.head_dim + 2); }

    void run(const DecodeItem& item) const {
        float* memory = scratch(group * (dim + 2 + TILE + padded_dim));
        State s{memory, memory + group * dim, memory + group * (dim + 1),
                memory + group * (dim + 2),
                reinterpret_cast<Query*>(memory + group * (dim + 2 + TILE))};
        if (item.partial)
            s = {item.partial, item.partial + group * dim, item.partial + group * (dim + 1),
                 s.scores, s.queries};
        std::fill(s.out, s.out + group * dim, 0.0f);
        std::fill(s.maxima, s.maxima + group, -INFINITY);
        std::fill(s.sums, s.sums + group, 0.0f);
        const int64_t row = a.row_offset(item.request, item.kv_head, 0);
        for (int64_t g = 0; g < group; ++g) {
            Query* query = s.queries + g * padded_dim;
            std::fill(query, query + padded_dim, Query{});
            D::convert(a.q + row + g * dim, query, dim);
        }
        visit_tiles(item, s);
        if (!item.partial) write(s.out, s.sums, a.out + row);
    }

    // Merge `count` partial results of one request and kv head, in their order.
    void combine(const float* partials, int64_t count, int64_t request, int64_t kv_head) const {
        float* out = scratch(group * (dim + 1));
        float* sums = out + group * dim;
        std::fill(out, sums + group, 0.0f);
        for (int64_t g = 0; g < group; ++g) {
            float best = -INFINITY;
            for (int64_t i = 0; i < count; ++i)
                best = std::max(best, partials[i * partial_size(a) + group * dim + g]);
            for (int64_t i = 0; i < count; ++i) {
                const float* part = partials + i * partial_size(a);
                const float weight = std::exp2(part[group * dim + g] - best);
                sums[g] += weight * part[group * (dim + 1) + g];
                for (int64_t d = 0; d < dim; d += WIDTH)
                    store(out + g * dim + d,
                          load(out + g * dim + d) + weight * load(part + g * dim + d));
            }
        }
        write(out, sums, a.out + a.row_offset(request, kv_head, 0));
    }

private:
    struct State {
        float *out, *maxima, *sums, *scores;
        Query* queries;
    };

    void visit_tiles(const DecodeItem& item, const State& s) const {
        int64_t here[TILE], ahead[TILE];
        int64_t count = std::min<int64_t>(TILE, item.end - item.begin);
        a.locate(item.request, item.kv_head, item.begin, count, here);
        for (int64_t begin = item.begin; begin < item.end; begin += TILE) {
            const int64_t next = std::min<int64_t>(TILE, item.end - begin - count);
            a.locate(item.request, item.kv_head, begin + count, next, ahead);
            // While a tile's keys are read its values are fetched, and with those the next keys.
            score(s, here, count);
            for (int64_t g = 0; g < group; ++g) soften(s, g, count);
            add_values(s, here, count, ahead, next);
            std::copy(ahead, ahead + next, here);
            count = next;
        }
    }

    void prefetch(const C* row) const {
        const char* bytes = reinterpret_cast<const char*>(row);
        for (int64_t i = 0; i < static_cast<int64_t>(dim * sizeof(C)); i += 64)
            __builtin_prefetch(bytes + i);
    }

    // Scores of a register of keys at a time; those past `count` are of the last key.
    void score(const State& s, const int64_t* rows, int64_t count) const {
        for (int64_t begin = 0; begin < count; begin += WIDTH) {
            const C* keys[WIDTH];
            for (int64_t i = 0; i < WIDTH; ++i) {
                const int64_t j = std::min(begin + i, count - 1);
                keys[i] = a.k_cache + rows[j];
                if (j == begin + i) prefetch(a.v_cache + rows[j]);
            }
            int64_t g = 0;
            if (!std::is_same<C, Query>::value)  // converting keys costs more than reading them
                for (; g + 2 <= group; g += 2) score_two_heads(s, g, keys, begin);
            for (; g < group; ++g)
                store(s.scores + g * TILE + begin, products<1>(s.queries + g * padded_dim, keys));
        }
    }

    void score_two_heads(const State& s, int64_t first, const C* const* keys,
                         int64_t begin) const {
        constexpr int HALF = WIDTH / 2;
        for (int at = 0; at < WIDTH; at += HALF) {
            float scores[WIDTH];
            store(scores, products<2>(s.queries + first * padded_dim, keys + at));
            for (int h = 0; h < 2; ++h)
                std::copy_n(scores + h * HALF, HALF, s.scores + (first + h) * TILE + begin + at);
        }
    }

    // Of HEADS queries with WIDTH / HEADS keys, one query after the other.
    template <int HEADS>
    Floats products(const Query* queries, const C* const* keys) const {
        constexpr int KEYS = WIDTH / HEADS;
        Floats totals[WIDTH] = {};
        int64_t d = 0;
        for (; d + D::STEP <= dim; d += D::STEP)
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                totals[i] = D::add(totals[i], queries + i / KEYS * padded_dim + d,
                                   keys[i % KEYS] + d);
        if (d < dim)
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                totals[i] = D::add_last(totals[i], queries + i / KEYS * padded_dim + d,
                                        keys[i % KEYS] + d);
        return sums(totals);
    }

    // Scores to weights relative to the running maximum, to which the output so far is rescaled
    // (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
    void soften(const State& s, int64_t g, int64_t count) const {
        float* scores = s.scores + g * TILE;
        const int64_t padded = (count + WIDTH - 1) / WIDTH * WIDTH;
        std::fill(scores + count, scores + padded, -INFINITY);
        const float scale = a.scale * LOG2_E;
        Floats best = broadcast(s.maxima[g]);
        for (int64_t j = 0; j < padded; j += WIDTH) {
            const Floats scaled = load(scores + j) * scale;
            store(scores + j, scaled);
            best = max(best, scaled);
        }
        const float maximum_now = maximum(best);
        Floats total = {};
        for (int64_t j = 0; j < padded; j += WIDTH) {
            const Floats weight = exp2(load(scores + j) - maximum_now);
            store(scores + j, weight);
            total += weight;
        }
        const float shrink = std::exp2(s.maxima[g] - maximum_now);
        s.sums[g] = s.sums[g] * shrink + sum(total);
        s.maxima[g] = maximum_now;
        if (shrink != 1.0f)
            for (int64_t d = 0; d < dim; d += WIDTH)
                store(s.out + g * dim + d, load(s.out + g * dim + d) * shrink);
    }

    void add_values(const State& s, const int64_t* rows, int64_t count, const int64_t* ahead,
                    int64_t next) const {
        int64_t g = 0;
        for (; g + 4 <= group; g += 4, next = 0) add_values_to<4>(s, g, rows, count, ahead, next);
        for (; g + 2 <= group; g += 2, next = 0) add_values_to<2>(s, g, rows, count, ahead, next);
        for (; g < group; ++g, next = 0) add_values_to<1>(s, g, rows, count, ahead, next);
    }

    template <int HEADS>
    void add_values_to(const State& s, int64_t g, const int64_t* rows, int64_t count,
                       const int64_t* ahead, int64_t next) const {
        // As many columns at a time as accumulators fit the registers.
        constexpr int COLUMNS = (WIDTH == 16 ? 16 : 8) / HEADS;
        int64_t d = 0;
        for (; d + COLUMNS * WIDTH <= dim; d += COLUMNS * WIDTH, next = 0)
            add_columns<HEADS, COLUMNS>(s, g, d, rows, count, ahead, next);
        for (; d < dim; d += WIDTH, next = 0)
            add_columns<HEADS, 1>(s, g, d, rows, count, ahead, next);
    }

    template <int HEADS, int COLUMNS>
    void add_columns(const State& s, int64_t g, int64_t d, const int64_t* rows, int64_t count,
                     const int64_t* ahead, int64_t next) const {
        Floats totals[HEADS][COLUMNS];
        float* out = s.out + g * dim + d;
        const float* weights = s.scores + g * TILE;
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 16
            for (int c = 0; c < COLUMNS; ++c) totals[h][c] = load(out + h * dim + c * WIDTH);
        for (int64_t j = 0; j < count; ++j) {
            if (j < next) prefetch(a.k_cache + ahead[j]);
            const C* value = a.v_cache + rows[j] + d;
#pragma GCC unroll 16
            for (int c = 0; c < COLUMNS; ++c) {
                const Floats v = load(value + c * WIDTH);
#pragma GCC unroll 4
                for (int h = 0; h < HEADS; ++h) totals[h][c] += weights[h * TILE + j] * v;
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 16
            for (int c = 0; c < COLUMNS; ++c) store(out + h * dim + c * WIDTH, totals[h][c]);
    }

    void write(const float* out, const float* sums, T* to) const {
        for (int64_t g = 0; g < group; ++g)
            for (int64_t d = 0; d < dim; d += WIDTH)
                store(to + g * dim + d, load(out + g * dim + d) / sums[g]);
    }

    const Attention<T, C>& a;
    const int64_t dim, group, padded_dim;
};

}  // namespace manta
