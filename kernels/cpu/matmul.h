// The matrix product under all linear layers: rows of activations times panels of packed weights.
//
// A panel holds the weights of COLUMNS outputs. A block of it stays in the first-level cache while
// all rows pass by, and the next block is fetched meanwhile. So the time is that of the memory or
// of the arithmetic, whichever is longer, not their sum. Whatever the number of rows, an output's
// products are added in the order of the inputs, so that a row has the same bits alone as in a
// batch.
#pragma once

#include <algorithm>

#include "dot.h"
#include "parallel.h"

namespace manta {

constexpr int64_t BLOCK_ROWS = 96;
constexpr int64_t BLOCK_DEPTH = 128;     // groups: at most 32 KiB of a panel
constexpr int64_t LINES = COLUMNS / 16;  // cache lines of a panel per group

struct Operands {
    const int32_t* x;       // [rows, depth, PARTS of the Dot]
    const int32_t* weight;  // [panels, depth, COLUMNS] groups
    int64_t rows, depth, outputs;
};

// Memory to fetch while computing: `lines` cache lines per group.
struct Ahead {
    const char* from;
    int lines;
};

// sums[m][·] += Σ_k x[m][k] weight[k][·] for ROWS rows.
template <class Dot, int ROWS>
void multiply_rows(const int32_t* x, int64_t x_stride, const int32_t* weight, int64_t depth,
                   bool first, Ahead ahead, float* sums) {
    typename Dot::Total totals[ROWS][REGISTERS];
    const int32_t* inputs[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) inputs[m] = x + m * x_stride;
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < REGISTERS; ++n)
            totals[m][n] = (typename Dot::Total)(
                first ? Floats{} : load(sums + m * COLUMNS + n * WIDTH));
    for (int64_t k = 0; k < depth; ++k) {
        for (int i = 0; i < ahead.lines; ++i, ahead.from += 64) __builtin_prefetch(ahead.from);
#pragma GCC unroll 2
        for (int part = 0; part < Dot::PARTS; ++part) {
            Ints columns[REGISTERS];
#pragma GCC unroll 4
            for (int n = 0; n < REGISTERS; ++n)
                columns[n] = Dot::part(weight + k * COLUMNS, n, part);
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; ++m) {
                const Ints input = broadcast(inputs[m][k * Dot::PARTS + part]);
#pragma GCC unroll 4
                for (int n = 0; n < REGISTERS; ++n) Dot::add(totals[m][n], input, columns[n]);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < REGISTERS; ++n)
            store(sums + m * COLUMNS + n * WIDTH, (Floats)totals[m][n]);
}

template <class Dot>
void multiply_any_rows(int64_t rows, const int32_t* x, int64_t x_stride, const int32_t* weight,
                       int64_t depth, bool first, Ahead ahead, float* sums) {
    switch (rows) {
        case 1: return multiply_rows<Dot, 1>(x, x_stride, weight, depth, first, ahead, sums);
        case 2: return multiply_rows<Dot, 2>(x, x_stride, weight, depth, first, ahead, sums);
        case 3: return multiply_rows<Dot, 3>(x, x_stride, weight, depth, first, ahead, sums);
        case 4: return multiply_rows<Dot, 4>(x, x_stride, weight, depth, first, ahead, sums);
        case 5: return multiply_rows<Dot, 5>(x, x_stride, weight, depth, first, ahead, sums);
        case 6: return multiply_rows<Dot, 6>(x, x_stride, weight, depth, first, ahead, sums);
    }
}

// Rows [row, row + count) times a panel, to sums [count, COLUMNS]; `next` is the panel after it.
template <class Dot>
void multiply_panel(const Operands& o, int64_t row, int64_t count, int64_t panel, int64_t next,
                    float* sums) {
    const int64_t tiles = (count + MAX_ROWS - 1) / MAX_ROWS;
    const int lines = static_cast<int>((LINES + tiles - 1) / tiles);
    for (int64_t k = 0; k < o.depth; k += BLOCK_DEPTH) {
        const int64_t depth = std::min(BLOCK_DEPTH, o.depth - k);
        const int32_t* weight = o.weight + (panel * o.depth + k) * COLUMNS;
        const bool last = k + depth == o.depth;
        const int32_t* following =
            last ? o.weight + next * o.depth * COLUMNS : weight + depth * COLUMNS;
        const int64_t following_depth = std::min(BLOCK_DEPTH, last ? o.depth : o.depth - k - depth);
        int64_t lines_left = next < 0 && last ? 0 : following_depth * LINES;
        const char* from = reinterpret_cast<const char*>(following);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t begin = count * t / tiles, end = count * (t + 1) / tiles;
            const Ahead ahead{from, lines_left > 0 ? lines : 0};
            const int32_t* x = o.x + ((row + begin) * o.depth + k) * Dot::PARTS;
            multiply_any_rows<Dot>(end - begin, x, o.depth * Dot::PARTS, weight, depth, k == 0,
                                   ahead, sums + begin * COLUMNS);
            from += depth * lines * 64;
            lines_left -= depth * lines;
        }
    }
}

// x times weight; write(sums [count, COLUMNS], row, count, column) takes each finished block.
template <class Dot, class Write>
void multiply(const Operands& o, const Write& write) {
    const int64_t panels = (o.outputs + COLUMNS - 1) / COLUMNS;
    const int64_t blocks = (o.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for_claimed(blocks * panels, [&](int64_t item, int64_t next) {
        alignas(64) float sums[BLOCK_ROWS * COLUMNS];
        const int64_t row = item / panels * BLOCK_ROWS, panel = item % panels;
        const int64_t count = std::min(BLOCK_ROWS, o.rows - row);
        multiply_panel<Dot>(o, row, count, panel, next < 0 ? -1 : next % panels, sums);
        write(sums, row, count, panel * COLUMNS);
    });
}

// The addresses of groups [outputs, depth] in panel order; panels are filled up with zeros.
inline void pack_panels(const int32_t* weight, int64_t outputs, int64_t depth, int32_t* packed) {
    const int64_t panels = (outputs + COLUMNS - 1) / COLUMNS;
    parallel_for(panels, COLUMNS * depth, [=](int64_t panel) {
        for (int64_t c = 0; c < COLUMNS; ++c) {
            const int64_t output = panel * COLUMNS + c;
            int32_t* to = packed + panel * depth * COLUMNS + c;
            for (int64_t k = 0; k < depth; ++k)
                to[k * COLUMNS] = output < outputs ? weight[output * depth + k] : 0;
        }
    });
}

}  // namespace manta
