// Weights of 4 bits in groups of 32 inputs with a scale each, 4.5 bits in all (the format of
// llama.cpp's Q4_0). Activations are rounded to 8 bits, also with a scale per group of 32.
#include "api.h"
#include "linear.h"
#include "quantize.h"

namespace manta {
namespace {

constexpr int64_t GROUP = 32;
constexpr int ROWS = 4, WIDE = 2;  // registers of sums: twice these, for a group and in all
constexpr int64_t ZERO = 8;        // the weight that stands for 0

// One group of a panel's weights. Word (i, column) holds inputs 4i … 4i + 3 of the column in the
// lower halves of its bytes, and inputs 16 + 4i … in the upper ones.
struct Group {
    int32_t words[GROUP / 8][COLUMNS];
    BFloat16 scales[COLUMNS];
};

struct Activations {
    const int32_t* groups;  // [rows, inputs / 4]: four bytes
    const float* scales;    // [rows, inputs / GROUP]
    const float* zeros;     // [rows, inputs / GROUP]: ZERO * the sum of the group's bytes
    int64_t num_groups;
};

// sums[m][·] = Σ x[m] · weight for M rows and WIDE registers of columns from `column` on.
template <int M>
void multiply_groups(const Activations& x, int64_t row, const Group* weight, const char* ahead,
                     int64_t column, float* sums) {
    Floats totals[M][WIDE] = {};
    for (int64_t g = 0; g < x.num_groups; ++g) {
        if (ahead)
            for (size_t i = 0; i < sizeof(Group); i += 64)
                __builtin_prefetch(ahead + g * sizeof(Group) + i, 0, 2);
        NibbleDots dots[M][WIDE];
        const int32_t* bytes = x.groups + (row * x.num_groups + g) * (GROUP / 4);
#pragma GCC unroll 4
        for (int i = 0; i < GROUP / 8; ++i) {
            Ints low[WIDE], high[WIDE];
#pragma GCC unroll 2
            for (int n = 0; n < WIDE; ++n) {
                const auto words = load_bits<UInts>(weight[g].words[i] + column + n * WIDTH);
                low[n] = (Ints)(words & 0x0F0F0F0F);
                high[n] = (Ints)((words >> 4) & 0x0F0F0F0F);
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const int32_t* row_bytes = bytes + m * x.num_groups * (GROUP / 4);
                const Ints first = broadcast(row_bytes[i]);
                const Ints second = broadcast(row_bytes[i + GROUP / 8]);
#pragma GCC unroll 2
                for (int n = 0; n < WIDE; ++n) {
                    dots[m][n].add(low[n], first);
                    dots[m][n].add(high[n], second);
                }
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < WIDE; ++n) {
                const int64_t at = (row + m) * x.num_groups + g;
                const Floats dot =
                    __builtin_convertvector(dots[m][n].total(), Floats) - x.zeros[at];
                const Floats scale = load(weight[g].scales + column + n * WIDTH) * x.scales[at];
                totals[m][n] = fma(dot, scale, totals[m][n]);
            }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < WIDE; ++n)
            store(sums + m * COLUMNS + column + n * WIDTH, totals[m][n]);
}

// Rows [row, row + count) times a panel; on the way the panel `next` is fetched, if there is one.
void multiply_panel(const Activations& x, int64_t row, int64_t count, const Group* weight,
                    const Group* next, float* sums) {
    for (int64_t m = 0; m < count; m += ROWS)
        for (int64_t column = 0; column < COLUMNS; column += WIDE * WIDTH) {
            const char* ahead = reinterpret_cast<const char*>(m + column == 0 ? next : nullptr);
            float* to = sums + m * COLUMNS;
            switch (std::min<int64_t>(ROWS, count - m)) {
                case 1: multiply_groups<1>(x, row + m, weight, ahead, column, to); break;
                case 2: multiply_groups<2>(x, row + m, weight, ahead, column, to); break;
                case 3: multiply_groups<3>(x, row + m, weight, ahead, column, to); break;
                case 4: multiply_groups<4>(x, row + m, weight, ahead, column, to); break;
            }
        }
}

template <class T>
void linear_int4(const T* x, const Group* weight, const T* bias, T* out, int64_t rows,
                 int64_t inputs, int64_t outputs) {
    const int64_t num_groups = inputs / GROUP;
    thread_local std::vector<int32_t> bytes;  // kept from call to call
    thread_local std::vector<float> scales_and_zeros;
    if (bytes.size() < static_cast<size_t>(rows * inputs / 4)) bytes.resize(rows * inputs / 4);
    if (scales_and_zeros.size() < static_cast<size_t>(2 * rows * num_groups))
        scales_and_zeros.resize(2 * rows * num_groups);
    int32_t* quantized = bytes.data();
    float *scales = scales_and_zeros.data(), *zeros = scales + rows * num_groups;
    parallel_for(rows, inputs, [=](int64_t row) {
        for (int64_t g = row * num_groups; g < (row + 1) * num_groups; ++g) {
            const ByteScale scale(largest_magnitude(x + g * GROUP, GROUP));
            scales[g] = scale.scale;
            zeros[g] = ZERO * sum(round_to_bytes(x + g * GROUP, scale.inverse, 0, GROUP,
                                                 quantized + g * (GROUP / 4)));
        }
    });
    const Activations activations{quantized, scales, zeros, num_groups};
    const int64_t panels = (outputs + COLUMNS - 1) / COLUMNS;
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for_claimed(blocks * panels, [&](int64_t item, int64_t next) {
        alignas(64) float sums[BLOCK_ROWS * COLUMNS];
        const int64_t row = item / panels * BLOCK_ROWS, panel = item % panels;
        const int64_t count = std::min(BLOCK_ROWS, rows - row);
        multiply_panel(activations, row, count, weight + panel * num_groups,
                       next < 0 ? nullptr : weight + next % panels * num_groups, sums);
        write_block(row, count, panel * COLUMNS, bias, out, outputs,
                    [&](int64_t m, int64_t n, auto) { return load(sums + m * COLUMNS + n); });
    });
}

}  // namespace
}  // namespace manta

// weight [outputs, inputs] bytes 0 … 15 and scales [outputs, inputs / 32], to packed
// [panels, inputs / 32] Groups of 18 * COLUMNS bytes.
MANTA_API void manta_pack_int4(const uint8_t* weight, const manta::BFloat16* scales,
                               int64_t outputs, int64_t inputs, void* packed) {
    using namespace manta;
    const int64_t num_groups = inputs / GROUP;
    parallel_for((outputs + COLUMNS - 1) / COLUMNS, COLUMNS * inputs, [=](int64_t panel) {
        Group* groups = static_cast<Group*>(packed) + panel * num_groups;
        std::memset(groups, 0, num_groups * sizeof(Group));
        const int64_t columns = std::min(COLUMNS, outputs - panel * COLUMNS);
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t g = 0; g < num_groups; ++g) {
                const int64_t at = (panel * COLUMNS + c) * num_groups + g;
                groups[g].scales[c] = scales[at];
                for (int64_t i = 0; i < GROUP / 2; ++i) {
                    const uint32_t pair = weight[at * GROUP + i] |
                                          weight[at * GROUP + GROUP / 2 + i] << 4;
                    groups[g].words[i / 4][c] |= static_cast<int32_t>(pair << i % 4 * 8);
                }
            }
    });
}

// x [rows, inputs], inputs a multiple of 32; bias [outputs] or null; out [rows, outputs].
MANTA_API void manta_linear_int4(int dtype, const void* x, const void* packed, const void* bias,
                                 void* out, int64_t rows, int64_t inputs, int64_t outputs) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::linear_int4((const T*)x, (const manta::Group*)packed, (const T*)bias, (T*)out, rows,
                           inputs, outputs);
    });
}
