// Linear layers of float32 and bfloat16 with weights packed once.
#include "api.h"

#if defined(__AVX512F__)

#include "linear.h"

namespace manta {
namespace {

struct DotFloat {
    using Total = Floats;
    static Floats add(Floats total, Ints x, Ints weight) {
        return total + (Floats)x * (Floats)weight;
    }
};

template <class Dot, class T>
void linear(const T* x, const int32_t* packed, const T* bias, T* out, int64_t rows, int64_t inputs,
            int64_t outputs) {
    const int64_t depth = inputs * sizeof(T) / 4;
    multiply<Dot>({(const int32_t*)x, packed, rows, depth, outputs},
                  [=](const float* sums, int64_t row, int64_t count, int64_t column) {
                      write_block(row, count, column, bias, out, outputs,
                                  [=](int64_t m, int64_t n, auto) {
                                      return load(sums + m * COLUMNS + n);
                                  });
                  });
}

}  // namespace
}  // namespace manta

// weight [outputs, depth] groups of 32 bits to packed [panels, depth, COLUMNS].
MANTA_API void manta_pack_weight(const int32_t* weight, int64_t outputs, int64_t depth,
                                 int32_t* packed) {
    manta::pack_panels(weight, outputs, depth, packed);
}

// x [rows, inputs] (`dtype`, its type, is for the same arguments as the other layers'), bias
// [outputs] or null, out [rows, outputs].
MANTA_API void manta_linear_float32(int /*dtype*/, const float* x, const int32_t* packed,
                                    const float* bias, float* out, int64_t rows, int64_t inputs,
                                    int64_t outputs) {
    manta::run([=] {
        manta::linear<manta::DotFloat>(x, packed, bias, out, rows, inputs, outputs);
    });
}

#if defined(__AVX512BF16__)

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

// As above; a group is two inputs.
MANTA_API void manta_linear_bfloat16(int /*dtype*/, const manta::BFloat16* x,
                                     const int32_t* packed, const manta::BFloat16* bias,
                                     manta::BFloat16* out, int64_t rows, int64_t inputs,
                                     int64_t outputs) {
    manta::run([=] {
        manta::linear<manta::DotBFloat16>(x, packed, bias, out, rows, inputs, outputs);
    });
}

#endif
#endif
