// W8A8: weights of 8 bits with a scale per output, activations of 8 bits with a scale per row.
#include "api.h"
#include "linear.h"
#include "quantize.h"

namespace manta {
namespace {

struct Int8Weight {
    const int32_t* packed;  // [panels, inputs / 4, COLUMNS] groups of four
    const float* scales;    // [outputs]
    const int32_t* sums;    // [outputs], over the inputs
};

// A row as bytes, times a scale that it returns, in the parts of groups that DotInt8 multiplies.
template <class T>
float quantize_row(const T* x, int64_t inputs, int32_t* to) {
    const ByteScale scale(largest_magnitude(x, inputs));
    for (int64_t i = 0; i < inputs; i += 4 * WIDTH) {
        int32_t bytes[WIDTH];
        round_to_bytes(x + i, scale.inverse, BYTE_OFFSET, 4 * WIDTH, bytes);
        int32_t parts[DotInt8::PARTS][WIDTH];
        for (int part = 0; part < DotInt8::PARTS; ++part) {
            const Ints words = DotInt8::part(bytes, 0, part);
            std::memcpy(parts[part], &words, sizeof words);
        }
        for (int group = 0; group < WIDTH; ++group)
            for (const auto& part : parts) *to++ = part[group];
    }
    return scale.scale;
}

template <class T>
void linear_int8(const T* x, const Int8Weight& weight, const T* bias, T* out, int64_t rows,
                 int64_t inputs, int64_t outputs, int64_t stride) {
    thread_local std::vector<int32_t> groups;  // kept from call to call
    thread_local std::vector<float> row_scales;
    const int64_t row_words = inputs / 4 * DotInt8::PARTS;
    if (groups.size() < static_cast<size_t>(rows * row_words)) groups.resize(rows * row_words);
    if (row_scales.size() < static_cast<size_t>(rows)) row_scales.resize(rows);
    int32_t* quantized = groups.data();
    float* scales = row_scales.data();
    parallel_for(rows, inputs, [=](int64_t row) {
        scales[row] = quantize_row(x + row * inputs, inputs, quantized + row * row_words);
    });
    multiply<DotInt8>(
        {quantized, weight.packed, rows, inputs / 4, outputs},
        [=](const float* sums, int64_t row, int64_t count, int64_t column) {
            write_block(row, count, column, bias, out, outputs, stride,
                        [=](int64_t m, int64_t n, auto lanes) {
                            const Ints offset =
                                (Ints)lanes.load((const float*)weight.sums + column + n) *
                                BYTE_OFFSET;
                            const Ints total = (Ints)load(sums + m * COLUMNS + n) - offset;
                            return __builtin_convertvector(total, Floats) * scales[row + m] *
                                   lanes.load(weight.scales + column + n);
                        });
        });
}

}  // namespace
}  // namespace manta

// x [rows, inputs], inputs a multiple of 64; the weight is described at Int8Weight.
MANTA_API void manta_linear_int8(int dtype, const void* x, const int32_t* packed,
                                 const float* scales, const int32_t* sums, const void* bias,
                                 void* out, int64_t rows, int64_t inputs, int64_t outputs,
                                 int64_t stride) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::linear_int8((const T*)x, {packed, scales, sums}, (const T*)bias, (T*)out,
                           rows, inputs, outputs, stride);
    });
}
