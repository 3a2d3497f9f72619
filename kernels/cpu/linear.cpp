// Linear layers in floating point, with weights packed once.
#include "linear.h"

#include <type_traits>
#include <vector>

#include "api.h"

namespace manta {
namespace {

template <class T>
using DotOf =
    std::conditional_t<std::is_same_v<T, float>, DotFloat,
                       std::conditional_t<std::is_same_v<T, Half>, DotWidened<Half>, DotBFloat16>>;

// `count` times COLUMNS pairs to as many first values, then the second ones.
void part_pairs(int64_t count, int32_t* packed) {
    parallel_for(count, 2 * COLUMNS, [=](int64_t i) {
        uint16_t pairs[2 * COLUMNS], parted[2 * COLUMNS];
        std::memcpy(pairs, packed + i * COLUMNS, sizeof pairs);
        for (int64_t j = 0; j < 2 * COLUMNS; ++j) parted[j % 2 * COLUMNS + j / 2] = pairs[j];
        std::memcpy(packed + i * COLUMNS, parted, sizeof parted);
    });
}

// Activations as the parts of groups that a Dot multiplies: as they are, or as floats.
template <class Dot, class T>
const int32_t* take_apart(const T* x, int64_t rows, int64_t inputs) {
    if constexpr (Dot::PARTS == 1) {
        return reinterpret_cast<const int32_t*>(x);
    } else {
        thread_local std::vector<float> memory;  // kept from call to call
        if (memory.size() < static_cast<size_t>(rows * inputs)) memory.resize(rows * inputs);
        float* floats = memory.data();
        parallel_for(rows, inputs, [=](int64_t row) {
            for_lanes(inputs, [=](int64_t i, auto lanes) {
                lanes.store(floats + row * inputs + i, lanes.load(x + row * inputs + i));
            });
        });
        return reinterpret_cast<const int32_t*>(floats);
    }
}

template <class T>
void linear(const T* x, const int32_t* packed, const T* bias, T* out, int64_t rows, int64_t inputs,
            int64_t outputs, int64_t stride) {
    using Dot = DotOf<T>;
    const int64_t depth = inputs * sizeof(T) / 4;
    multiply<Dot>({take_apart<Dot>(x, rows, inputs), packed, rows, depth, outputs},
                  [=](const float* sums, int64_t row, int64_t count, int64_t column) {
                      write_block(row, count, column, bias, out, outputs, stride,
                                  [=](int64_t m, int64_t n, auto) {
                                      return load(sums + m * COLUMNS + n);
                                  });
                  });
}

// Outputs `ids` of a weight, to out [count, inputs].
template <class T>
void rows_of_linear(const int64_t* ids, int64_t count, const int32_t* packed, T* out,
                    int64_t inputs) {
    constexpr int64_t PER_GROUP = 4 / sizeof(T);
    parallel_for(count, inputs, [=](int64_t row) {
        const T* panel = (const T*)packed + ids[row] / COLUMNS * COLUMNS * inputs;
        const int64_t column = ids[row] % COLUMNS;
        T* to = out + row * inputs;
        for (int64_t i = 0; i < inputs; ++i) {
            const int64_t k = i / PER_GROUP, j = i % PER_GROUP;
            const int64_t within = DotOf<T>::PARTS == 1 ? column * PER_GROUP + j : j * COLUMNS + column;
            to[i] = panel[k * PER_GROUP * COLUMNS + within];
        }
    });
}

}  // namespace
}  // namespace manta

// Outputs per panel of packed weights, which are filled up to a multiple of it.
MANTA_API int64_t manta_panel_columns() { return manta::COLUMNS; }

// weight [outputs, depth] groups of 32 bits to packed [panels, depth, COLUMNS]; `dtype` is that of
// the layer, or float32 for groups that are to stay together.
MANTA_API void manta_pack_weight(int dtype, const int32_t* weight, int64_t outputs, int64_t depth,
                                 int32_t* packed) {
    manta::dispatch(dtype, [=](auto t) {
        manta::pack_panels(weight, outputs, depth, packed);
        if constexpr (manta::DotOf<decltype(t)>::PARTS == 2)
            manta::part_pairs((outputs + manta::COLUMNS - 1) / manta::COLUMNS * depth, packed);
    });
}

// x [rows, inputs], bias [outputs] or null, out [rows, stride], of which it has the first outputs.
MANTA_API void manta_linear(int dtype, const void* x, const int32_t* packed, const void* bias,
                            void* out, int64_t rows, int64_t inputs, int64_t outputs,
                            int64_t stride) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::linear((const T*)x, packed, (const T*)bias, (T*)out, rows, inputs, outputs,
                      stride);
    });
}

// Outputs `ids` of a weight, to out [count, inputs].
MANTA_API void manta_linear_rows(int dtype, const int64_t* ids, int64_t count,
                                 const int32_t* packed, void* out, int64_t inputs) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::rows_of_linear(ids, count, packed, (T*)out, inputs);
    });
}
