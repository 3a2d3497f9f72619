// Norms and the gated activation: one pass over each row, rounding where kernels.reference does.
#include "api.h"
#include "parallel.h"
#include "row.h"

namespace manta {
namespace {

template <class T>
void rms_norm(const T* x, int64_t stride, const T* weight, float eps, T* out, int64_t rows,
              int64_t size) {
    parallel_for(rows, size, [=](int64_t row) {
        const T* from = x + row * stride;
        const float scale = inverse_rms(from, size, eps);
        scale_row(from, scale, weight, out + row * size, size);
    });
}

template <class T>
void add_rms_norm(const T* x, const T* residual, const T* weight, float eps, T* out, T* sum_out,
                  int64_t rows, int64_t size) {
    parallel_for(rows, size, [=](int64_t row) {
        const T *a = x + row * size, *b = residual + row * size;
        T* added = sum_out + row * size;
        for_lanes(size, [=](int64_t i, auto lanes) {
            lanes.store(added + i, lanes.load(a + i) + lanes.load(b + i));
        });
        scale_row(added, inverse_rms(added, size, eps), weight, out + row * size, size);
    });
}

template <class T>
void gate_and_mul(const T* x, T* out, int64_t rows, int64_t size, float linear, float cubic) {
    parallel_for(rows, size, [=](int64_t row) {
        const T *gate = x + row * 2 * size, *up = gate + size;
        T* to = out + row * size;
        for_lanes(size, [=](int64_t i, auto lanes) {
            const Floats g = lanes.load(gate + i);
            const Floats z = cubic == 0 ? g : g + cubic * g * g * g;  // no 0 times infinity
            const Floats gated = round_to<T>(g / (1.0f + exp2(z * (-LOG2_E * linear))));
            lanes.store(to + i, gated * lanes.load(up + i));
        });
    });
}

}  // namespace
}  // namespace manta

// x [rows, size] with rows `stride` apart; weight [size]; out [rows, size].
MANTA_API void manta_rms_norm(int dtype, const void* x, int64_t stride, const void* weight,
                              float eps, void* out, int64_t rows, int64_t size) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::rms_norm((const T*)x, stride, (const T*)weight, eps, (T*)out, rows, size);
    });
}

// x, residual, out and sum_out [rows, size].
MANTA_API void manta_add_rms_norm(int dtype, const void* x, const void* residual,
                                  const void* weight, float eps, void* out, void* sum_out,
                                  int64_t rows, int64_t size) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::add_rms_norm((const T*)x, (const T*)residual, (const T*)weight, eps, (T*)out,
                            (T*)sum_out, rows, size);
    });
}

// x [rows, 2 * size]: gates g, then ups; out [rows, size], by g * sigmoid(linear * (g + cubic * g^3)).
MANTA_API void manta_gate_and_mul(int dtype, const void* x, void* out, int64_t rows, int64_t size,
                                  float linear, float cubic) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::gate_and_mul((const T*)x, (T*)out, rows, size, linear, cubic);
    });
}
