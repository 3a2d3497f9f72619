// Attention of many queries of one request: bound by arithmetic, so tiles of matrix products.
//
// Everything is computed transposed, a query per lane: scores[key][query] and out[dim][query]. The
// softmax then needs no operation across lanes, keys are broadcast from where they lie in the
// cache, and only the queries (once per item) and the output are ever transposed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"

namespace manta {

// Query rows, (token, head) pairs that share a kv head, per work item.
constexpr int ROWS = 96;

// What a lane holds of an operand: one float, or with bfloat16 dot products a pair of them.
template <class T>
struct Operand {
    using Element = float;
    static constexpr int PACKED = 1;  // values per element
    static Floats multiply_add(Floats total, float a, Floats b) { return total + a * b; }
    // A row of `size` values as elements.
    template <class C>
    static void pack(const C* row, float* to, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH) store(to + i, load(row + i));
    }
    // Whether elements can be read from a cache of T itself.
    static constexpr bool IN_PLACE = std::is_same_v<T, float>;
};

#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
    using Element = int32_t;
    static constexpr int PACKED = 2;
    static Floats multiply_add(Floats total, int32_t a, Floats b) {
        return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(a),
                                        (__m512bh)b);
    }
    static void pack(const BFloat16* row, int32_t* to, int64_t size) {
        std::memcpy(to, row, size * sizeof *row);
    }
    static void pack(const Float8* row, int32_t* to, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH)
            store(reinterpret_cast<BFloat16*>(to) + i, load(row + i));
    }
    static constexpr bool IN_PLACE = true;
};
#endif

// c[m][·] = c[m][·] * shrink[·] + Σ_k a[m][k] b[k][·] for M rows of a and N registers of columns;
// without `shrink` c is overwritten. Columns of b and c are ROWS apart.
template <class O, int M, int N>
inline void multiply_block(const typename O::Element* const* a, int64_t a_step, int64_t depth,
                           const float* b, float* c, const float* shrink) {
    Floats totals[M][N];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n)
            totals[m][n] = shrink ? load(c + m * ROWS + n * WIDTH) * load(shrink + n * WIDTH)
                                  : Floats{};
    for (int64_t k = 0; k < depth; ++k) {
        Floats columns[N];
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) columns[n] = load(b + k * ROWS + n * WIDTH);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const auto value = a[m][k * a_step];
#pragma GCC unroll 6
            for (int n = 0; n < N; ++n)
                totals[m][n] = O::multiply_add(totals[m][n], value, columns[n]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 6
        for (int n = 0; n < N; ++n) store(c + m * ROWS + n * WIDTH, totals[m][n]);
}

// The same for any number of registers: N at a time, the rest with fewer.
template <class O, int M, int N = WIDTH == 16 ? 6 : 3>  // 4 × N and operands fill the register file
inline void multiply(const typename O::Element* const* a, int64_t a_step, int64_t depth,
                     const float* b, float* c, const float* shrink, int64_t registers) {
    for (; registers >= N; registers -= N) {
        multiply_block<O, M, N>(a, a_step, depth, b, c, shrink);
        b += N * WIDTH;
        c += N * WIDTH;
        if (shrink) shrink += N * WIDTH;
    }
    if constexpr (N > 1)
        if (registers > 0) multiply<O, M, N - 1>(a, a_step, depth, b, c, shrink, registers);
}

struct PromptItem {
    int64_t request, kv_head, row_begin, row_end;
};

template <class T, class C>
class PromptAttention {
    using O = Operand<T>;
    using Element = typename O::Element;

public:
    explicit PromptAttention(const Attention<T, C>& attention)
        : a(attention),
          dim(a.head_dim),
          depth(dim / O::PACKED),
          padded_depth((depth + WIDTH - 1) / WIDTH * WIDTH) {}

    void run(const PromptItem& item) const {
        const State s = make_state(item);
        const int64_t begin = a.first_visible(s.first_position);
        const int64_t end = s.last_position + 1;
        load_queries(item, s);
        for (int64_t key = begin; key < end; key += TILE) {
            const int64_t count = std::min<int64_t>(TILE, end - key);
            int64_t offsets[TILE];
            a.locate(item.request, item.kv_head, key, count, offsets);
            score(s, offsets, count);
            const bool cut = key + count - 1 > s.first_position ||
                             key < a.first_visible(s.last_position);
            if (cut) mask(s, key, count);
            soften(s, count);
            add_values(s, offsets, count);
        }
        write(item, s);
    }

private:
    struct State {
        int64_t registers, first_position, last_position;
        float *queries, *out, *scores, *weights, *maxima, *sums, *shrink;
        Element *keys, *values;
        Ints positions[ROWS / WIDTH];
    };

    State make_state(const PromptItem& item) const {
        State s;
        float* next = scratch(ROWS * (padded_depth + dim + 2 * TILE + 3) + 2 * TILE * dim);
        const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
        s.queries = take(ROWS * padded_depth);
        s.out = take(ROWS * dim);
        s.scores = take(ROWS * TILE);
        s.weights = take(ROWS * TILE);
        s.maxima = take(ROWS);
        s.sums = take(ROWS);
        s.shrink = take(ROWS);
        s.keys = reinterpret_cast<Element*>(take(TILE * dim));
        s.values = reinterpret_cast<Element*>(take(TILE * dim));
        std::fill(s.out, s.out + ROWS * dim, 0.0f);
        std::fill(s.maxima, s.maxima + ROWS, -INFINITY);
        std::fill(s.sums, s.sums + ROWS, 0.0f);

        const int64_t start = a.context_lens[item.request] - a.num_queries(item.request);
        s.first_position = start + item.row_begin / a.group();
        s.last_position = start + (item.row_end - 1) / a.group();
        s.registers = (item.row_end - item.row_begin + WIDTH - 1) / WIDTH;
        for (int64_t n = 0; n < s.registers; ++n)
            for (int lane = 0; lane < WIDTH; ++lane)
                s.positions[n][lane] = static_cast<int32_t>(
                    start + std::min(item.row_begin + n * WIDTH + lane, item.row_end - 1) /
                                a.group());
        return s;
    }

    // Queries as elements, transposed: [depth][ROWS]. Lanes past the last row repeat it.
    void load_queries(const PromptItem& item, const State& s) const {
        Element* rows = reinterpret_cast<Element*>(s.out);  // free until the first values come
        static_assert(sizeof(Element) == sizeof(float));
        for (int64_t n = 0; n < s.registers; ++n) {
            for (int lane = 0; lane < WIDTH; ++lane) {
                const int64_t row = std::min(item.row_begin + n * WIDTH + lane, item.row_end - 1);
                O::pack(a.q + a.row_offset(item.request, item.kv_head, row),
                        rows + lane * padded_depth, dim);
            }
            for (int64_t d = 0; d < depth; d += WIDTH)
                transpose(reinterpret_cast<float*>(rows) + d, padded_depth,
                          s.queries + d * ROWS + n * WIDTH, ROWS);
        }
        std::fill(s.out, s.out + ROWS * dim, 0.0f);
    }

    void score(const State& s, const int64_t* offsets, int64_t count) const {
        const Element* rows[TILE];
        for (int64_t j = 0; j < count; ++j) {
            const C* key = a.k_cache + offsets[j];
            if constexpr (O::IN_PLACE && std::is_same_v<T, C>) {
                rows[j] = reinterpret_cast<const Element*>(key);
            } else {
                rows[j] = s.keys + j * depth;
                O::pack(key, s.keys + j * depth, dim);
            }
        }
        int64_t j = 0;
        for (; j + 4 <= count; j += 4)
            multiply<O, 4>(rows + j, 1, depth, s.queries, s.scores + j * ROWS, nullptr,
                           s.registers);
        for (; j < count; ++j)
            multiply<O, 1>(rows + j, 1, depth, s.queries, s.scores + j * ROWS, nullptr,
                           s.registers);
    }

    void mask(const State& s, int64_t first_key, int64_t count) const {
        const int32_t window = a.window > 0 ? static_cast<int32_t>(a.window) : INT32_MAX;
        for (int64_t j = 0; j < count; ++j)
            for (int64_t n = 0; n < s.registers; ++n) {
                float* scores = s.scores + j * ROWS + n * WIDTH;
                const Ints distance = s.positions[n] - static_cast<int32_t>(first_key + j);
                const Ints visible = (distance >= 0) & (distance < window);
                store(scores, visible ? load(scores) : broadcast(-INFINITY));
            }
    }

    // Scores to weights, rescaling as in DecodeAttention::soften.
    void soften(const State& s, int64_t count) const {
        for (int64_t n = 0; n < s.registers; ++n) {
            const int64_t column = n * WIDTH;
            const float scale = a.scale * LOG2_E;
            Floats best = broadcast(-INFINITY);
            for (int64_t j = 0; j < count; ++j) best = max(best, load(s.scores + j * ROWS + column));
            best = max(best * scale, load(s.maxima + column));
            // Nothing visible yet: any finite maximum keeps exp2(-inf - maximum) at zero.
            const Floats safe = best == -INFINITY ? Floats{} : best;
            const Floats shrink = exp2(load(s.maxima + column) - safe);
            store(s.maxima + column, best);
            store(s.shrink + column, shrink);
            const Floats total = exponentiate(s, column, count, scale, safe);
            store(s.sums + column, load(s.sums + column) * shrink + total);
        }
    }

    // Write the weights of one register of rows as elements; returns their sums.
    Floats exponentiate(const State& s, int64_t column, int64_t count, float scale,
                        Floats maxima) const {
        const auto weight = [&](int64_t j) {
            return exp2(load(s.scores + j * ROWS + column) * scale - maxima);
        };
        Floats total = {};
        if constexpr (O::PACKED == 1) {
            for (int64_t j = 0; j < count; ++j) {
                const Floats w = weight(j);
                store(s.weights + j * ROWS + column, w);
                total += w;
            }
        } else {
            for (int64_t j = 0; j < count; j += 2) {
                const Floats low = weight(j), high = j + 1 < count ? weight(j + 1) : Floats{};
                const UInts pair = to_bfloat16(low) | (to_bfloat16(high) << 16);
                store(s.weights + j / 2 * ROWS + column, (Floats)pair);
                total += low + high;
            }
        }
        return total;
    }

    // out[d][row] = out[d][row] * shrink[row] + Σ_key value[key][d] * weight[key][row]
    void add_values(const State& s, const int64_t* offsets, int64_t count) const {
        const Element* columns[4];
        const int64_t elements = pack_values(s, offsets, count);
        for (int64_t d = 0; d < dim; d += 4) {
            for (int i = 0; i < 4; ++i) columns[i] = s.values + d + i;
            multiply<O, 4>(columns, dim, elements, s.weights, s.out + d * ROWS, s.shrink,
                           s.registers);
        }
    }

    // Values as elements [count / PACKED][dim]: consecutive keys make a pair. Returns their number.
    int64_t pack_values(const State& s, const int64_t* offsets, int64_t count) const {
        if constexpr (O::PACKED == 1) {
            for (int64_t j = 0; j < count; ++j)
                O::pack(a.v_cache + offsets[j], s.values + j * dim, dim);
            return count;
        } else {
            for (int64_t j = 0; j < count; j += 2) {
                const C *low = a.v_cache + offsets[j];
                const C *high = j + 1 < count ? a.v_cache + offsets[j + 1] : nullptr;
                for (int64_t d = 0; d < dim; d += WIDTH) {
                    const UInts upper = high ? bfloat16_bits(high + d) << 16 : UInts{};
                    store(reinterpret_cast<float*>(s.values) + j / 2 * dim + d,
                          (Floats)(bfloat16_bits(low + d) | upper));
                }
            }
            return (count + 1) / 2;
        }
    }

    void write(const PromptItem& item, const State& s) const {
        float* rows = s.queries;  // no longer needed: [WIDTH][dim]
        for (int64_t n = 0; n < s.registers; ++n) {
            const int64_t column = n * WIDTH;
            for (int64_t d = 0; d < dim; d += WIDTH)
                transpose(s.out + d * ROWS + column, ROWS, rows + d, dim);
            for (int lane = 0; lane < WIDTH; ++lane) {
                const int64_t row = item.row_begin + column + lane;
                if (row >= item.row_end) return;
                T* to = a.out + a.row_offset(item.request, item.kv_head, row);
                const float scale = 1.0f / s.sums[column + lane];
                for (int64_t d = 0; d < dim; d += WIDTH)
                    store(to + d, load(rows + lane * dim + d) * scale);
            }
        }
    }

    const Attention<T, C>& a;
    const int64_t dim, depth, padded_depth;
};

}  // namespace manta
