// Attention of many queries of one request: bound by arithmetic, so tiles of matrix products.
//
// Everything is computed transposed, a query per lane: scores[key][query] and out[dim][query]. The
// softmax then needs no operation across lanes, keys are broadcast from where they lie in the
// cache, and only the queries (once per item) and the output are ever transposed.
#pragma once

#include "attention.h"

namespace manta {

// Query rows, (token, head) pairs that share a kv head, per work item.
constexpr int ROWS = 96;

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
        State s = make_state(item);
        load_queries(item, s);
        const int64_t begin = a.first_visible(s.first_position);
        const int64_t end = s.last_position + 1;
        for (int64_t part = begin / PART * PART; part < end; part += PART) {
            std::fill(s.out, s.out + ROWS * dim, 0.0f);
            std::fill(s.maxima, s.maxima + ROWS, -INFINITY);
            std::fill(s.sums, s.sums + ROWS, 0.0f);
            const int64_t part_begin = std::max(part, begin);
            const int64_t part_end = std::min(part + PART, end);
            for (int64_t tile = part_begin / TILE * TILE; tile < part_end; tile += TILE)
                visit_tile(item, s, tile, Places(tile, part_begin, part_end));
            if (part > begin) fold(s);
            std::swap(s.out, s.whole);
            std::swap(s.maxima, s.whole_maxima);
            std::swap(s.sums, s.whole_sums);
        }
        write(item, s);
    }

private:
    // Of the part at hand, and of all parts so far.
    struct State {
        int64_t registers, first_position, last_position;
        float *queries, *scores, *weights, *shrink;
        float *out, *maxima, *sums, *whole, *whole_maxima, *whole_sums;
        Element *keys, *values;
        Ints positions[ROWS / WIDTH];
    };

    State make_state(const PromptItem& item) const {
        State s;
        float* next = scratch(ROWS * (padded_depth + 2 * dim + 2 * TILE + 5) + 2 * TILE * dim);
        const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
        s.queries = take(ROWS * padded_depth);
        s.out = take(ROWS * dim);
        s.whole = take(ROWS * dim);
        s.scores = take(ROWS * TILE);
        s.weights = take(ROWS * TILE);
        s.maxima = take(ROWS);
        s.sums = take(ROWS);
        s.whole_maxima = take(ROWS);
        s.whole_sums = take(ROWS);
        s.shrink = take(ROWS);
        s.keys = reinterpret_cast<Element*>(take(TILE * dim));
        s.values = reinterpret_cast<Element*>(take(TILE * dim));

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
    }

    void visit_tile(const PromptItem& item, const State& s, int64_t tile, Places places) const {
        int64_t offsets[TILE];
        a.locate(item.request, item.kv_head, tile + places.first, places.last - places.first,
                 offsets + places.first);
        score(s, offsets, places);
        if (a.softcap > 0)
            for (int64_t j = places.first; j < places.last; ++j)
                a.cap(s.scores + j * ROWS, s.registers * WIDTH);
        const bool cut = tile + places.last - 1 > s.first_position ||
                         tile + places.first < a.first_visible(s.last_position);
        if (cut) mask(s, tile, places);
        soften(s, places);
        add_values(s, offsets, places);
    }

    void score(const State& s, const int64_t* offsets, Places places) const {
        const Element* rows[TILE];
        for (int64_t j = places.first; j < places.last; ++j) {
            const C* key = a.k_cache + offsets[j];
            if constexpr (O::IN_PLACE && std::is_same_v<T, C>) {
                rows[j] = reinterpret_cast<const Element*>(key);
            } else {
                rows[j] = s.keys + j * depth;
                O::pack(key, s.keys + j * depth, dim);
            }
        }
        int64_t j = places.first;
        for (; j + 4 <= places.last; j += 4)
            multiply<O, 4>(rows + j, 1, depth, s.queries, s.scores + j * ROWS, nullptr,
                           s.registers);
        for (; j < places.last; ++j)
            multiply<O, 1>(rows + j, 1, depth, s.queries, s.scores + j * ROWS, nullptr,
                           s.registers);
    }

    void mask(const State& s, int64_t tile, Places places) const {
        const int32_t window = a.window > 0 ? static_cast<int32_t>(a.window) : INT32_MAX;
        for (int64_t j = places.first; j < places.last; ++j)
            for (int64_t n = 0; n < s.registers; ++n) {
                float* scores = s.scores + j * ROWS + n * WIDTH;
                const Ints distance = s.positions[n] - static_cast<int32_t>(tile + j);
                const Ints visible = (distance >= 0) & (distance < window);
                store(scores, visible ? load(scores) : broadcast(-INFINITY));
            }
    }

    // Scores to weights, relative to the running maxima.
    void soften(const State& s, Places places) const {
        for (int64_t n = 0; n < s.registers; ++n) {
            const int64_t column = n * WIDTH;
            const float scale = a.unit();
            Floats best = load(s.maxima + column);
            for (int64_t j = places.first; j < places.last; ++j)
                best = max(best, load(s.scores + j * ROWS + column) * scale);
            const Floats shrink = exp2(load(s.maxima + column) - finite(best));
            store(s.maxima + column, best);
            store(s.shrink + column, shrink);
            const Floats total = exponentiate(s, column, places, scale, finite(best));
            store(s.sums + column, load(s.sums + column) * shrink + total);
        }
    }

    // Nothing is visible yet where a maximum is -inf; any other keeps exp2(-inf - maximum) at zero.
    static Floats finite(Floats maxima) { return maxima == -INFINITY ? Floats{} : maxima; }

    // Write the weights of one register of rows as elements; returns their sums.
    Floats exponentiate(const State& s, int64_t column, Places places, float scale,
                        Floats maxima) const {
        Floats totals[WIDTH] = {};
        const auto weight = [&](int64_t j) {
            const Floats w = exp2(load(s.scores + j * ROWS + column) * scale - maxima);
            totals[j % WIDTH] += w;
            return w;
        };
        if constexpr (O::PACKED == 1) {
            for (int64_t j = places.first; j < places.last; ++j)
                store(s.weights + j * ROWS + column, weight(j));
        } else {
            for (int64_t j = places.first / 2 * 2; j < places.last; j += 2) {
                const Floats low = j < places.first ? Floats{} : weight(j);
                const Floats high = j + 1 < places.last ? weight(j + 1) : Floats{};
                const UInts pair = to_bfloat16(low) | (to_bfloat16(high) << 16);
                store(s.weights + j / 2 * ROWS + column, (Floats)pair);
            }
        }
        for (int half = WIDTH / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) totals[i] += totals[i + half];
        return totals[0];
    }

    // out[d][row] = out[d][row] * shrink[row] + Σ_key value[key][d] * weight[key][row]
    void add_values(const State& s, const int64_t* offsets, Places places) const {
        // Those of consecutive keys make an element; one that is not there weighs nothing.
        const int64_t first = places.first / O::PACKED;
        const int64_t last = (places.last + O::PACKED - 1) / O::PACKED;
        for (int64_t e = first; e < last; ++e) {
            const C* low = a.v_cache + offsets[std::max(e * O::PACKED, places.first)];
            const C* high = a.v_cache + offsets[std::min((e + 1) * O::PACKED, places.last) - 1];
            float* values = reinterpret_cast<float*>(s.values) + e * dim;
            for (int64_t d = 0; d < dim; d += WIDTH) store(values + d, O::values(low + d, high + d));
        }
        for (int64_t d = 0; d < dim; d += 4) {
            const Element* columns[4];
            for (int i = 0; i < 4; ++i) columns[i] = s.values + first * dim + d + i;
            multiply<O, 4>(columns, dim, last - first, s.weights + first * ROWS, s.out + d * ROWS,
                           s.shrink, s.registers);
        }
    }

    // Fold what all parts so far have come to into this one.
    void fold(const State& s) const {
        for (int64_t column = 0; column < s.registers * WIDTH; column += WIDTH) {
            const Floats before = load(s.whole_maxima + column), own = load(s.maxima + column);
            const Floats best = max(before, own);
            const Floats shrink = exp2(before - finite(best)), share = exp2(own - finite(best));
            store(s.maxima + column, best);
            const auto add = [&](const float* whole, float* part) {
                store(part, fma(load(part), share, load(whole) * shrink));
            };
            add(s.whole_sums + column, s.sums + column);
            for (int64_t d = column; d < ROWS * dim; d += ROWS) add(s.whole + d, s.out + d);
        }
    }

    void write(const PromptItem& item, const State& s) const {
        float* rows = s.queries;  // no longer needed: [WIDTH][dim]
        for (int64_t n = 0; n < s.registers; ++n) {
            const int64_t column = n * WIDTH;
            for (int64_t d = 0; d < dim; d += WIDTH)
                transpose(s.whole + d * ROWS + column, ROWS, rows + d, dim);
            for (int lane = 0; lane < WIDTH; ++lane) {
                const int64_t row = item.row_begin + column + lane;
                if (row >= item.row_end) return;
                T* to = a.out + a.row_offset(item.request, item.kv_head, row);
                const int64_t head = item.kv_head * a.group() + row % a.group();
                const float scale = 1.0f / a.total(s.whole_sums[column + lane],
                                                   s.whole_maxima[column + lane], head);
                for (int64_t d = 0; d < dim; d += WIDTH)
                    store(to + d, load(rows + lane * dim + d) * scale);
            }
        }
    }

    const Attention<T, C>& a;
    const int64_t dim, depth, padded_depth;
};

}  // namespace manta
