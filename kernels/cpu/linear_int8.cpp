// W8A8: weights of 8 bits with a scale per output, activations of 8 bits with a scale per row.
#include "api.h"

#if defined(__AVX512VNNI__)

#include "linear.h"
#include "quantize.h"

namespace manta {
namespace {

// The instruction takes one unsigned operand, so 128 is added to the activations.
constexpr int32_t OFFSET = 128;

struct DotInt8 {
    using Total = Ints;
    static Ints add(Ints total, Ints x, Ints weight) {
        return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)x, (__m512i)weight);
    }
};

struct Int8Weight {
    const int32_t* packed;       // [panels, inputs / 4, COLUMNS] groups of four
    const float* scales;         // [outputs]
    const int32_t* offset_sums;  // [outputs]: OFFSET * the sum of the output's weights
};

template <class T>
void linear_int8(const T* x, const Int8Weight& weight, const T* bias, T* out, int64_t rows,
                 int64_t inputs, int64_t outputs) {
    thread_local std::vector<int32_t> groups;  // kept from call to call
    thread_local std::vector<float> row_scales;
    if (groups.size() < static_cast<size_t>(rows * inputs / 4)) groups.resize(rows * inputs / 4);
    if (row_scales.size() < static_cast<size_t>(rows)) row_scales.resize(rows);
    int32_t* quantized = groups.data();
    float* scales = row_scales.data();
    parallel_for(rows, inputs, [=](int64_t row) {
        const ByteScale scale(largest_magnitude(x + row * inputs, inputs));
        scales[row] = scale.scale;
        round_to_bytes(x + row * inputs, scale.inverse, OFFSET, inputs,
                       quantized + row * inputs / 4);
    });
    multiply<DotInt8>(
        {quantized, weight.packed, rows, inputs / 4, outputs},
        [=](const float* sums, int64_t row, int64_t count, int64_t column) {
            write_block(row, count, column, bias, out, outputs,
                        [=](int64_t m, int64_t n, auto lanes) {
                            const Ints total = (Ints)load(sums + m * COLUMNS + n) -
                                               (Ints)lanes.load((const float*)weight.offset_sums +
                                                                column + n);
                            return __builtin_convertvector(total, Floats) * scales[row + m] *
                                   lanes.load(weight.scales + column + n);
                        });
        });
}

}  // namespace
}  // namespace manta

// x [rows, inputs], inputs a multiple of 64; the weight is described at Int8Weight.
MANTA_API void manta_linear_int8(int dtype, const void* x, const int32_t* packed,
                                 const float* scales, const int32_t* offset_sums, const void* bias,
                                 void* out, int64_t rows, int64_t inputs, int64_t outputs) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::linear_int8((const T*)x, {packed, scales, offset_sums}, (const T*)bias, (T*)out,
                           rows, inputs, outputs);
    });
}

#endif
