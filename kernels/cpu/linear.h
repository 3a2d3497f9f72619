// Writing the sums of a linear layer as its outputs.
#pragma once

#include "matmul.h"
#include "row.h"

namespace manta {

// out[row + m][column + n] = value(m, n, lanes) + bias[column + n] for a block of sums; lanes past
// the last output are left out. Rows of `out` are `stride` apart.
template <class T, class Value>
inline void write_block(int64_t row, int64_t count, int64_t column, const T* bias, T* out,
                        int64_t outputs, int64_t stride, const Value& value) {
    const int64_t columns = std::min(COLUMNS, outputs - column);
    for (int64_t m = 0; m < count; ++m)
        for_lanes(columns, [&](int64_t n, auto lanes) {
            Floats total = value(m, n, lanes);
            if (bias) total += lanes.load(bias + column + n);
            lanes.store(out + (row + m) * stride + column + n, total);
        });
}

}  // namespace manta
