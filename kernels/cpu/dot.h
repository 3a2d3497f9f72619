// Dot products in the lanes of a register: what a level of instructions has for each type of
// weight.
//
// Weights are read as 32-bit groups of inputs, one output per lane: a float, two bfloat16 or half,
// four bytes. A `Dot` multiplies a group with the same inputs of one row of activations and adds
// the products to the lane. Some processors do it in one instruction. Where they do not, the group
// is taken apart into PARTS registers first; that is done once for all rows that are at hand, and
// the activations come apart already.
#pragma once

#include "simd.h"

namespace manta {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 4, MAX_ROWS = 6;  // 24 sums and their operands fill 32 registers
#elif defined(__AVX2__)
constexpr int REGISTERS = 2, MAX_ROWS = 6;  // of 16 registers
#else
constexpr int REGISTERS = 4, MAX_ROWS = 2;
#endif
constexpr int64_t COLUMNS = REGISTERS * WIDTH;  // outputs side by side

// Keeps the compiler from moving what makes v behind what follows, and so from running out of
// registers.
template <class V>
inline void pin(V& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__x86_64__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

// total = fma(x, weight, total), pinned.
inline void add_product(Floats& total, Floats x, Floats weight) {
#if defined(MANTA_AVX2)  // which has no register left for the compiler to move things about
    asm("vfmadd231ps %2, %1, %0" : "+x"(total) : "x"(x), "x"(weight));
#else
    total = fma(x, weight, total);
    pin(total);
#endif
}

// ---- instructions ----

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MANTA_BFLOAT16_DOT 1
// total + the two products of the pairs of bfloat16 in a lane.
inline Floats dot_bfloat16(Floats total, Ints a, Ints b) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
    return (Floats)vbfdotq_f32((float32x4_t)total, (bfloat16x8_t)a, (bfloat16x8_t)b);
#endif
}
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define MANTA_BYTE_DOT 1
// total + the four products of the bytes in a lane. x86 takes those of `a` as unsigned, so that
// BYTE_OFFSET is added to signed ones.
inline Ints dot_bytes(Ints total, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)a, (__m256i)b);
#else
    return (Ints)vdotq_s32((int32x4_t)total, (int8x16_t)a, (int8x16_t)b);
#endif
}
#endif

#if defined(MANTA_BYTE_DOT) && !defined(__aarch64__)
constexpr int32_t BYTE_OFFSET = 128;
#else
constexpr int32_t BYTE_OFFSET = 0;
#endif

// The two products of the 16-bit pairs in a lane, added.
inline Ints multiply_pairs(Ints a, Ints b) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(MANTA_AVX2)
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return (Ints)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Of the four signed bytes in a lane two as a pair of 16 bits: the even ones (0) or the odd (1).
inline Ints byte_pair(Ints bytes, int part) {
    return (Ints)(part == 0 ? (Pairs)((Pairs)bytes << 8) >> 8 : (Pairs)bytes >> 8);
}

// ---- one for each type of weight ----

struct DotFloat {
    using Total = Floats;
    static constexpr int PARTS = 1;
    // A part of the n-th register of groups.
    static Ints part(const int32_t* groups, int n, int) {
        return load_bits<Ints>(groups + n * WIDTH);
    }
    static void add(Floats& total, Ints x, Ints weight) {
        add_product(total, (Floats)x, (Floats)weight);
    }
};

// Of 16 bits each, widened: a group's COLUMNS first inputs lie before the second ones. Activations
// are floats.
template <class T>
struct DotWidened : DotFloat {
    static constexpr int PARTS = 2;
    static Ints part(const int32_t* groups, int n, int part) {
        return (Ints)load(reinterpret_cast<const T*>(groups) + part * COLUMNS + n * WIDTH);
    }
};

#if defined(MANTA_BFLOAT16_DOT)
struct DotBFloat16 : DotFloat {
    static void add(Floats& total, Ints x, Ints weight) {
        total = dot_bfloat16(total, x, weight);
        pin(total);
    }
};
#else
using DotBFloat16 = DotWidened<BFloat16>;
#endif

#if defined(MANTA_BYTE_DOT)
struct DotInt8 : DotFloat {
    using Total = Ints;
    static void add(Ints& total, Ints x, Ints weight) {
        total = dot_bytes(total, x, weight);
        pin(total);
    }
};
#else
struct DotInt8 {
    using Total = Ints;
    static constexpr int PARTS = 2;
    static Ints part(const int32_t* groups, int n, int part) {
        return byte_pair(load_bits<Ints>(groups + n * WIDTH), part);
    }
    static void add(Ints& total, Ints x, Ints weight) {
        total += multiply_pairs(x, weight);
        pin(total);
    }
};
#endif

}  // namespace manta
