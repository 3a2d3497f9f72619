// Weights of 2 to 8 bits in groups of inputs that share a scale, as files of many formats have
// them. Activations are rounded to 8 bits with a scale per 32 inputs.
//
// A panel is taken apart to bytes some inputs at a time, which stay in the first-level cache while
// all rows pass by: so what formats differ in costs nothing per row, and is all in levels.h.
#include "levels.h"

#include <vector>

#include "api.h"
#include "linear.h"
#include "quantize.h"

namespace manta {
namespace {

constexpr int64_t ROUNDED = 32;  // activations that share a scale

// Activations: bytes in the words that a Dot multiplies, and by group of weights what
// sums begin with (see Dot::start), the scale, and the sum of what was rounded.
struct Rounded {
    const int32_t* words;
    const int32_t* starts;
    const float *scales, *sums;
    int64_t row_words, row_groups;
};

template <class Dot, int GROUP, bool HAS_MINIMUMS, int ROWS>
void multiply_rows(const Rounded& x, int64_t row, int64_t first, const Chunk& chunk,
                   int64_t num_groups, Ahead ahead, float* sums) {
    constexpr int64_t WORDS = GROUP / 4 * Dot::PARTS;
    const int64_t at = row * x.row_groups + first;
    const int32_t* bytes = x.words + row * x.row_words + first * WORDS;
    for (int64_t g = 0; g < num_groups; ++g) {
        for (int i = 0; i < ahead.lines; ++i, ahead.from += 64)
            __builtin_prefetch(ahead.from, 0, 2);
        Ints dots[ROWS][REGISTERS];
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < REGISTERS; ++n)
                dots[m][n] = broadcast(x.starts[at + m * x.row_groups + g]);
        for (int64_t i = g * WORDS; i < (g + 1) * WORDS; ++i) {
            Ints levels[REGISTERS];
#pragma GCC unroll 4
            for (int n = 0; n < REGISTERS; ++n)
                levels[n] = load_bits<Ints>(chunk.words[i] + n * WIDTH);
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; ++m) {
                const Ints input = broadcast(bytes[m * x.row_words + i]);
#pragma GCC unroll 4
                for (int n = 0; n < REGISTERS; ++n) Dot::add(dots[m][n], input, levels[n]);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
            const int64_t group = at + m * x.row_groups + g;
#pragma GCC unroll 4
            for (int n = 0; n < REGISTERS; ++n) {
                float* total = sums + m * COLUMNS + n * WIDTH;
                const Floats dot = __builtin_convertvector(Dot::total(dots[m][n]), Floats);
                const Floats scale = load(chunk.scales[g] + n * WIDTH) * x.scales[group];
                Floats sum = fma(dot, scale, load(total));
                if (HAS_MINIMUMS)
                    sum = fma(load(chunk.minimums[g] + n * WIDTH), broadcast(x.sums[group]), sum);
                store(total, sum);
            }
        }
    }
}

template <class Dot, int GROUP, bool HAS_MINIMUMS>
void multiply_any_rows(int64_t rows, const Rounded& x, int64_t row, int64_t first,
                       const Chunk& chunk, int64_t groups, Ahead ahead, float* sums) {
#define MANTA_ROWS(N)                                                                           \
    case N:                                                                                     \
        return multiply_rows<Dot, GROUP, HAS_MINIMUMS, N>(x, row, first, chunk, groups, ahead, \
                                                          sums);
    switch (rows) {
        MANTA_ROWS(1) MANTA_ROWS(2) MANTA_ROWS(3) MANTA_ROWS(4) MANTA_ROWS(5) MANTA_ROWS(6)
    }
#undef MANTA_ROWS
}

template <class Dot, int GROUP, class T>
void round_row(const T* x, int64_t inputs, int32_t excess, int32_t* words, int32_t* starts,
               float* scales, float* sums) {
    for (int64_t i = 0; i < inputs; i += ROUNDED) {
        const ByteScale scale(largest_magnitude(x + i, ROUNDED));
        int8_t bytes[ROUNDED];
        round_to_bytes(x + i, scale.inverse, 0, ROUNDED, bytes);
        for (int64_t at = 0; at < ROUNDED; at += GROUP) {
            int32_t first = 0, second = 0;  // of the pairs in every word
            for (int64_t j = at; j < at + GROUP; j += 4) {
                first += bytes[j] + bytes[j + 1];
                second += bytes[j + 2] + bytes[j + 3];
            }
            *starts++ = Dot::start(-excess * first, -excess * second);
            *scales++ = scale.scale;
            *sums++ = scale.scale * (first + second);
        }
        for (int64_t j = 0; j < ROUNDED; j += 4) Dot::take_apart(bytes + j, words);
    }
}

template <class Dot, int GROUP, bool HAS_MINIMUMS, class T>
void linear_groups(const T* x, const char* packed, const Layout& layout, const T* bias, T* out,
                   int64_t rows, int64_t inputs, int64_t outputs, int64_t stride) {
    const int64_t row_words = inputs / 4 * Dot::PARTS, row_groups = inputs / GROUP;
    thread_local std::vector<int32_t> integers;  // kept from call to call
    thread_local std::vector<float> floats;
    const auto need = [](auto& memory, int64_t size) {
        if (memory.size() < static_cast<size_t>(size)) memory.resize(size);
        return memory.data();
    };
    int32_t *words = need(integers, rows * (row_words + row_groups)),
            *starts = words + rows * row_words;
    float *scales = need(floats, 2 * rows * row_groups), *sums = scales + rows * row_groups;
    parallel_for(rows, inputs, [=, &layout](int64_t row) {
        round_row<Dot, GROUP>(x + row * inputs, inputs, layout.excess(), words + row * row_words,
                              starts + row * row_groups, scales + row * row_groups,
                              sums + row * row_groups);
    });
    const Rounded rounded{words, starts, scales, sums, row_words, row_groups};
    const int64_t panels = (outputs + COLUMNS - 1) / COLUMNS;
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t panel_bytes = inputs / layout.block_inputs() * layout.block_bytes();
    for_claimed(blocks * panels, [&](int64_t item, int64_t next) {
        alignas(64) float totals[BLOCK_ROWS * COLUMNS];
        alignas(64) Chunk chunk;
        const int64_t row = item / panels * BLOCK_ROWS, panel = item % panels;
        const int64_t count = std::min(BLOCK_ROWS, rows - row);
        const int64_t tiles = (count + MAX_ROWS - 1) / MAX_ROWS;
        std::memset(totals, 0, count * COLUMNS * sizeof(float));
        const char* from = packed + panel * panel_bytes;
        const int64_t to_next = next < 0 ? 0 : (next % panels - panel) * panel_bytes;
        for (int64_t i = 0; i < inputs; i += CHUNK) {
            const int64_t size = std::min(CHUNK, inputs - i), groups = size / GROUP;
            // The next panel. More lines than can be on their way are fetched while multiplying.
            const bool is_large = layout.bits > 5;
            Ahead ahead{from + to_next, 0};
            from = take_apart<Dot, GROUP>(layout, size, from, is_large ? 0 : to_next, chunk);
            if (to_next && is_large)
                ahead.lines = ((from + to_next - ahead.from) / 64 + groups) / groups;
            for (int64_t t = 0; t < tiles; ++t, ahead.lines = 0) {
                const int64_t begin = count * t / tiles, end = count * (t + 1) / tiles;
                multiply_any_rows<Dot, GROUP, HAS_MINIMUMS>(end - begin, rounded, row + begin,
                                                            i / GROUP, chunk, groups, ahead,
                                                            totals + begin * COLUMNS);
            }
        }
        write_block(row, count, panel * COLUMNS, bias, out, outputs, stride,
                    [&](int64_t m, int64_t n, auto) { return load(totals + m * COLUMNS + n); });
    });
}

template <class Dot, int GROUP, class... Arguments>
void with_minimums(const Layout& layout, Arguments... arguments) {
    if (layout.second == NOTHING)
        linear_groups<Dot, GROUP, false>(arguments...);
    else
        linear_groups<Dot, GROUP, true>(arguments...);
}

// Outputs `ids` of a weight, to out [count, inputs].
template <class Dot, int GROUP, class T>
void rows_of_groups(const int64_t* ids, int64_t count, const char* packed, const Layout& layout,
                    T* out, int64_t inputs) {
    const int64_t panel_bytes = inputs / layout.block_inputs() * layout.block_bytes();
    parallel_for(count, COLUMNS * inputs, [=, &layout](int64_t row) {
        alignas(64) Chunk chunk;
        const int64_t panel = ids[row] / COLUMNS, column = ids[row] % COLUMNS;
        const char* from = packed + panel * panel_bytes;
        for (int64_t i = 0; i < inputs; i += CHUNK) {
            const int64_t size = std::min(CHUNK, inputs - i);
            from = take_apart<Dot, GROUP>(layout, size, from, 0, chunk);
            float values[CHUNK];
            for (int64_t j = 0; j < size; ++j) {
                const auto* words = chunk.words + j / 4 * Dot::PARTS;
                const int32_t level = Dot::level(words, column, j % 4) - layout.excess();
                values[j] = level * chunk.scales[j / GROUP][column];
                if (layout.second != NOTHING) values[j] += chunk.minimums[j / GROUP][column];
            }
            for_lanes(size, [&](int64_t j, auto lanes) {
                lanes.store(out + row * inputs + i + j, lanes.load(values + j));
            });
        }
    });
}

// run(T{}, Dot{}, integral_constant<GROUP>{}) of activations' type and a layout; as `dispatch`.
template <class Run>
void dispatch_layout(int dtype, const Layout& layout, const Run& run) {
    dispatch(dtype, [=](auto t) {
        if (layout.bits == 8)
            run(t, DotBytes{}, std::integral_constant<int, 32>{});
        else if (layout.group == 16)
            run(t, DotLevels{}, std::integral_constant<int, 16>{});
        else
            run(t, DotLevels{}, std::integral_constant<int, 32>{});
    });
}

// each(panel, begin, end) for the columns [begin, end) of panels that outputs [first, first +
// count) are in.
template <class Each>
void for_panels(int64_t first, int64_t count, int64_t inputs, const Each& each) {
    const int64_t panel = first / COLUMNS, last = first + count;
    parallel_for((last - 1) / COLUMNS - panel + 1, COLUMNS * inputs, [=, &each](int64_t i) {
        const int64_t start = (panel + i) * COLUMNS;
        each(panel + i, std::max(first - start, int64_t{0}), std::min(last - start, COLUMNS));
    });
}

}  // namespace
}  // namespace manta

// levels [count, inputs] bytes, of outputs from `first` on, to their places in packed, which is all
// of a weight.
MANTA_API void manta_pack_levels(int bits, int group, int scale, int second, const uint8_t* levels,
                                 int64_t first, int64_t count, int64_t inputs, void* packed) {
    using namespace manta;
    const Layout layout{bits, group, scale, second};
    const int64_t panel_bytes = inputs / layout.block_inputs() * layout.block_bytes();
    for_panels(first, count, inputs, [=](int64_t panel, int64_t begin, int64_t end) {
        const uint8_t* own = levels + (panel * COLUMNS + begin - first) * inputs;
        char* to = static_cast<char*>(packed) + panel * panel_bytes;
        pack_levels(layout, own, begin, end, inputs, to);
    });
}

// values [count, blocks, per_block] of `size` bytes each, to `offset` of each block, where they
// lie [per_block, COLUMNS].
MANTA_API void manta_pack_scales(int bits, int group, int scale, int second, const uint8_t* values,
                                 int64_t size, int64_t per_block, int64_t offset, int64_t first,
                                 int64_t count, int64_t inputs, void* packed) {
    using namespace manta;
    const Layout layout{bits, group, scale, second};
    const int64_t blocks = inputs / layout.block_inputs(), bytes = layout.block_bytes();
    const int64_t start = layout.value_bytes() + offset * COLUMNS;
    for_panels(first, count, inputs, [=](int64_t panel, int64_t begin, int64_t end) {
        char* to = static_cast<char*>(packed) + panel * blocks * bytes + start;
        for (int64_t c = begin; c < end; ++c) {
            const uint8_t* from =
                values + (panel * COLUMNS + c - first) * blocks * per_block * size;
            for (int64_t block = 0; block < blocks; ++block)
                for (int64_t i = 0; i < per_block; ++i, from += size)
                    for (int64_t byte = 0; byte < size; ++byte)
                        to[block * bytes + (i * COLUMNS + c) * size + byte] = from[byte];
        }
    });
}

// Outputs `ids` of a weight, to out [count, inputs].
MANTA_API void manta_linear_groups_rows(int dtype, const int64_t* ids, int64_t count, int bits,
                                        int group, int scale, int second, const void* packed,
                                        void* out, int64_t inputs) {
    using namespace manta;
    const Layout layout{bits, group, scale, second};
    dispatch_layout(dtype, layout, [=](auto t, auto dot, auto size) {
        using T = decltype(t);
        rows_of_groups<decltype(dot), decltype(size)::value>(ids, count, (const char*)packed,
                                                             layout, (T*)out, inputs);
    });
}

// x [rows, inputs], bias [outputs] or null, out [rows, stride]; the rest as in Layout.
MANTA_API void manta_linear_groups(int dtype, const void* x, int bits, int group, int scale,
                                   int second, const void* packed, const void* bias, void* out,
                                   int64_t rows, int64_t inputs, int64_t outputs, int64_t stride) {
    using namespace manta;
    const Layout layout{bits, group, scale, second};
    dispatch_layout(dtype, layout, [=](auto t, auto dot, auto size) {
        using T = decltype(t);
        with_minimums<decltype(dot), decltype(size)::value>(
            layout, (const T*)x, (const char*)packed, layout, (const T*)bias, (T*)out, rows, inputs,
            outputs, stride);
    });
}
