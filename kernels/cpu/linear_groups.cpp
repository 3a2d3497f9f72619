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
                   int64_t num_groups, float* sums) {
    constexpr int64_t WORDS = GROUP / 4 * Dot::PARTS;
    const int64_t at = row * x.row_groups + first;
    const int32_t* bytes = x.words + row * x.row_words + first * WORDS;
    for (int64_t g = 0; g < num_groups; ++g) {
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
                       const Chunk& chunk, int64_t groups, float* sums) {
#define MANTA_ROWS(N) \
    case N: return multiply_rows<Dot, GROUP, HAS_MINIMUMS, N>(x, row, first, chunk, groups, sums);
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
            const int64_t size = std::min(CHUNK, inputs - i);
            from = take_apart<Dot, GROUP>(layout, size, from, to_next, chunk);
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t begin = count * t / tiles, end = count * (t + 1) / tiles;
                multiply_any_rows<Dot, GROUP, HAS_MINIMUMS>(
                    end - begin, rounded, row + begin, i / GROUP, chunk, size / GROUP,
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

}  // namespace
}  // namespace manta

// levels [outputs, inputs] bytes, to their places in packed, which is all of a weight; columns
// past the last output are left as they are.
MANTA_API void manta_pack_levels(int bits, int group, int scale, int second, const uint8_t* levels,
                                 int64_t outputs, int64_t inputs, void* packed) {
    using namespace manta;
    const Layout layout{bits, group, scale, second};
    const int64_t blocks = inputs / layout.block_inputs();
    parallel_for((outputs + COLUMNS - 1) / COLUMNS, COLUMNS * inputs, [=](int64_t panel) {
        char* to = static_cast<char*>(packed) + panel * blocks * layout.block_bytes();
        pack_levels(layout, levels, panel * COLUMNS, outputs, inputs, to);
    });
}

// values [outputs, blocks, per_block] of `size` bytes each, to `offset` of each block, where they
// lie [per_block, COLUMNS].
MANTA_API void manta_pack_scales(int bits, int group, int scale, int second, const uint8_t* values,
                                 int64_t size, int64_t per_block, int64_t offset, int64_t outputs,
                                 int64_t inputs, void* packed) {
    using namespace manta;
    const Layout layout{bits, group, scale, second};
    const int64_t blocks = inputs / layout.block_inputs();
    for (int64_t output = 0; output < outputs; ++output)
        for (int64_t i = 0; i < blocks * per_block; ++i) {
            char* block = static_cast<char*>(packed) +
                          (output / COLUMNS * blocks + i / per_block) * layout.block_bytes();
            const int64_t at = i % per_block * COLUMNS + output % COLUMNS;
            std::memcpy(block + layout.value_bytes() + offset * COLUMNS + at * size,
                        values + (output * blocks * per_block + i) * size, size);
        }
}

// x [rows, inputs], bias [outputs] or null, out [rows, stride]; the rest as in Layout.
MANTA_API void manta_linear_groups(int dtype, const void* x, int bits, int group, int scale,
                                   int second, const void* packed, const void* bias, void* out,
                                   int64_t rows, int64_t inputs, int64_t outputs, int64_t stride) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        using namespace manta;
        const Layout layout{bits, group, scale, second};
        const auto run = [&](auto dot, auto size) {
            with_minimums<decltype(dot), decltype(size)::value>(
                layout, (const T*)x, (const char*)packed, layout, (const T*)bias, (T*)out, rows,
                inputs, outputs, stride);
        };
        if (bits == 8)
            run(DotBytes{}, std::integral_constant<int, 32>{});
        else if (group == 16)
            run(DotLevels{}, std::integral_constant<int, 16>{});
        else
            run(DotLevels{}, std::integral_constant<int, 32>{});
    });
}
