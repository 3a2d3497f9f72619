// Linear layers of bfloat16 with weights packed once.
#include "api.h"

#if defined(__AVX512BF16__)

#include "linear.h"

namespace manta {
namespace {

struct DotBFloat16 {
    using Total = Floats;
    static Floats add(Floats total, Ints x, Ints weight) {
        return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)x, (__m512bh)weight);
    }
};

}  // namespace
}  // namespace manta

// weight [outputs, depth] groups of 32 bits to packed [panels, depth, COLUMNS].
MANTA_API void manta_pack_weight(const int32_t* weight, int64_t outputs, int64_t depth,
                                 int32_t* packed) {
    manta::pack_panels(weight, outputs, depth, packed);
}

// x [rows, inputs] bfloat16 (`dtype` is for the same arguments as the other layers'), packed pairs
// of inputs, bias [outputs] or null, out [rows, outputs].
MANTA_API void manta_linear_bfloat16(int /*dtype*/, const void* x, const void* packed,
                                     const void* bias, void* out, int64_t rows, int64_t inputs,
                                     int64_t outputs) {
    using namespace manta;
    multiply<DotBFloat16>(
        {(const int32_t*)x, (const int32_t*)packed, rows, inputs / 2, outputs},
        [=](const float* sums, int64_t row, int64_t count, int64_t column) {
            write_block(row, count, column, (const BFloat16*)bias, (BFloat16*)out, outputs,
                        [=](int64_t m, int64_t n, auto) { return load(sums + m * COLUMNS + n); });
        });
}

#endif
