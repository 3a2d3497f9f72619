// One register of floats, the storage types around it, and exp2.
//
// Written in the vector extensions of GCC and Clang: operators work lane by lane on every
// architecture, at the width the compiler flags allow. Only what they cannot express is written
// per instruction set, with a way around for those that lack it.
//
// Nothing is contracted to fused operations but what says `fma`, so that two kernels that do the
// same operations in the same order come to the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace manta {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
// Whether this is AVX2 with registers of its own width.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define MANTA_AVX2 1
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t UInts __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Shorts __attribute__((vector_size(2 * WIDTH)));
typedef int16_t Pairs __attribute__((vector_size(4 * WIDTH)));  // two in every lane
typedef uint8_t UBytes __attribute__((vector_size(WIDTH)));

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};
struct Float8 {  // e4m3: finite up to 448
    uint8_t bits;
};

inline Floats broadcast(float x) { return x - Floats{}; }
inline Ints broadcast(int32_t x) { return x - Ints{}; }

template <size_t... I>
inline Ints iota(std::index_sequence<I...>) { return Ints{static_cast<int32_t>(I)...}; }
// 0, 1, 2, … in the lanes.
inline Ints iota() { return iota(std::make_index_sequence<WIDTH>{}); }

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

// a * b + c, rounded once where the processor can.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MANTA_AVX2)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// ---- loads and stores, converting to and from float ----

template <class V, class T>
inline V load_bits(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Floats load(const float* p) { return load_bits<Floats>(p); }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline UInts load_shorts(const void* p) {
#if defined(MANTA_AVX2)  // which GCC would take two halves for
    return (UInts)_mm256_cvtepu16_epi32(load_bits<__m128i>(static_cast<const char*>(p)));
#else
    return __builtin_convertvector(load_bits<Shorts>(static_cast<const char*>(p)), UInts);
#endif
}
// WIDTH signed bytes, and the lowest bytes of integers. (Left to itself, the compiler takes them one
// by one on x86.)
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
inline Ints load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepi8_epi32(load_bits<__m128i>(p));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(load_bits<Bytes>(p), Ints);
#endif
}
inline void store_bytes(void* p, Ints v) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)v);
    std::memcpy(p, &bytes, WIDTH);
#elif defined(__AVX2__)
    const __m256i lowest = _mm256_set_epi32(-1, -1, -1, 0x0C080400, -1, -1, -1, 0x0C080400);
    const __m256i four = _mm256_shuffle_epi8((__m256i)v, lowest);
    const __m128i second = _mm256_extracti128_si256(four, 1);
    const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(four), second);
    std::memcpy(p, &bytes, WIDTH);
#else
    const Bytes bytes = __builtin_convertvector(v, Bytes);
    std::memcpy(p, &bytes, WIDTH);
#endif
}

inline Floats load(const BFloat16* p) { return (Floats)(load_shorts(p) << 16); }

// Bits of the nearest bfloat16, ties to even; NaN stays NaN.
inline UInts to_bfloat16(Floats v) {
#if defined(__AVX512BF16__)
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    return (UInts)_mm512_cvtepu16_epi32(bits);
#else
    const UInts bits = (UInts)v;
    const UInts rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return v == v ? rounded : UInts{} + 0x7FC0;
#endif
}
inline void store(BFloat16* p, Floats v) {
    const Shorts s = __builtin_convertvector(to_bfloat16(v), Shorts);
    std::memcpy(p, &s, sizeof s);
}

// The nearest float of BITS bits, MANTISSA of them after the point, ties to even; what lies beyond
// +-limit becomes that.
template <int BITS, int MANTISSA>
inline UInts narrow(Floats v, float limit, uint32_t nan) {
    constexpr int DROPPED = 23 - MANTISSA, BIAS = (1 << (BITS - 2 - MANTISSA)) - 1;
    constexpr float LEAST = 1.0f / (1 << (BIAS - 1));  // of the normal ones
    const Floats size = (Floats)((UInts)v & 0x7FFFFFFF);
    const UInts bits = (UInts)(size < limit ? size : broadcast(limit));
    const UInts even = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1);
    const UInts normal = ((bits + even) >> DROPPED) - ((127 - BIAS) << MANTISSA);
    // Below, steps are equal; adding 1.5 * 2^23 rounds to whole ones.
    const UInts subnormal = (UInts)(size * ((1 << MANTISSA) / LEAST) + 12582912.0f) - 0x4B400000;
    const UInts sign = ((UInts)v >> 31) << (BITS - 1);
    return v == v ? (size < LEAST ? subnormal : normal) | sign : UInts{} + nan;
}

inline Floats load(const Half* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load_bits<__m256i>(p));
#elif defined(MANTA_AVX2)
    return (Floats)_mm256_cvtph_ps(load_bits<__m128i>(p));
#elif defined(__aarch64__)
    return (Floats)vcvt_f32_f16(load_bits<float16x4_t>(p));
#else  // its exponent is biased by 112 less
    const UInts bits = load_shorts(p), size = (bits & 0x7FFF) << 13;
    const UInts finite = (UInts)((Floats)size * 0x1p112f);
    return (Floats)((size < 0x7C00u << 13 ? finite : size | 0x7F800000) | (bits & 0x8000) << 16);
#endif
}
inline void store(Half* p, Floats v) {
#if defined(__AVX512F__)
    const __m256i bits = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &bits, sizeof bits);
#elif defined(MANTA_AVX2)
    const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &bits, sizeof bits);
#elif defined(__aarch64__)
    const float16x4_t bits = vcvt_f16_f32((float32x4_t)v);
    std::memcpy(p, &bits, sizeof bits);
#else
    const Shorts bits = __builtin_convertvector(narrow<16, 10>(v, 65536.0f, 0x7E00), Shorts);
    std::memcpy(p, &bits, sizeof bits);
#endif
}

inline Floats load(const Float8* p) {
    // As a half, whose exponent is biased by 8 more. (NaN becomes 480.)
    const Shorts bits = __builtin_convertvector(load_bits<UBytes>(p), Shorts);
    const Shorts half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7);
    return load(reinterpret_cast<const Half*>(&half)) * 256.0f;
}
// The nearest, ties to even; what lies beyond +-448 becomes that.
inline void store(Float8* p, Floats v) {
    store_bytes(p, (Ints)narrow<8, 3>(v, 448.0f, 0x7F));
}

// The first n < WIDTH values, zeros after them; never reads or writes beyond.
template <class T>
inline Floats load_first(const T* p, int64_t n) {
    T buffer[WIDTH] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}
template <class T>
inline void store_first(T* p, Floats v, int64_t n) {
    T buffer[WIDTH];
    store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(T));
}

// One value.
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
inline float to_float(Half x) { return load_first(&x, 1)[0]; }

// Bits of WIDTH values as the nearest bfloat16.
inline UInts bfloat16_bits(const BFloat16* p) { return load_shorts(p); }
inline UInts bfloat16_bits(const Float8* p) { return to_bfloat16(load(p)); }

// v rounded to what T can hold, as if stored and loaded again.
template <class T>
inline Floats round_to(Floats v) {
    T buffer[WIDTH];
    store(buffer, v);
    return load(buffer);
}
template <>
inline Floats round_to<float>(Floats v) { return v; }
template <>
inline Floats round_to<BFloat16>(Floats v) { return (Floats)(to_bfloat16(v) << 16); }

// ---- across the lanes ----

template <int BY, size_t... I>
inline Floats rotate(Floats v, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(v, v, ((I + BY) % WIDTH)...);
#else
    return __builtin_shuffle(v, Ints{static_cast<int32_t>((I + BY) % WIDTH)...});
#endif
}

// The lanes reduced to one, which stands in all: a lane with the one half a register on, then with
// the one a quarter on, and so forth.
template <int HALF = WIDTH / 2, class Operation>
inline Floats reduce(Floats v, const Operation& operation) {
    v = operation(v, rotate<HALF>(v, std::make_index_sequence<WIDTH>{}));
    if constexpr (HALF > 1) return reduce<HALF / 2>(v, operation);
    return v;
}

inline float sum(Floats v) {
    return reduce(v, [](Floats a, Floats b) { return a + b; })[0];
}
inline float maximum(Floats v) { return reduce(v, max)[0]; }
// a0 b0 a1 b1 …, from the first half of the lanes (HIGH = 0) or the second (HIGH = WIDTH / 2).
template <int HIGH, size_t... I>
inline Floats zip(Floats a, Floats b, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (I % 2 * WIDTH + I / 2 + HIGH)...);
#else
    return __builtin_shuffle(a, b, Ints{static_cast<int32_t>(I % 2 * WIDTH + I / 2 + HIGH)...});
#endif
}

// The sums of WIDTH registers, that of the i-th in lane i: adding zipped halves log2(WIDTH) times
// leaves them in bit-reversed order, so that is how they go in.
__attribute__((always_inline)) inline Floats sums(const Floats (&rows)[WIDTH]) {
    constexpr auto lanes = std::make_index_sequence<WIDTH>{};
    Floats parts[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) {
        int reversed = 0;
        for (int bit = 1; bit < WIDTH; bit *= 2) reversed = reversed * 2 + (i & bit ? 1 : 0);
        parts[i] = rows[reversed];
    }
#pragma GCC unroll 4
    for (int count = WIDTH / 2; count > 0; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i)
            parts[i] = zip<0>(parts[2 * i], parts[2 * i + 1], lanes) +
                       zip<WIDTH / 2>(parts[2 * i], parts[2 * i + 1], lanes);
    return parts[0];
}

// Transpose a WIDTH × WIDTH square of 32-bit values.
__attribute__((always_inline)) inline void transpose(Floats (&rows)[WIDTH]) {
    constexpr auto lanes = std::make_index_sequence<WIDTH>{};
    Floats zipped[WIDTH];
    // Zipping row i with row i + WIDTH / 2, log2(WIDTH) times, moves every value to its place.
#pragma GCC unroll 4
    for (int step = 1; step < WIDTH; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < WIDTH / 2; ++i) {
            zipped[2 * i] = zip<0>(rows[i], rows[i + WIDTH / 2], lanes);
            zipped[2 * i + 1] = zip<WIDTH / 2>(rows[i], rows[i + WIDTH / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i) rows[i] = zipped[i];
    }
}

// The same in memory, with rows `from_stride` and `to_stride` apart.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    Floats rows[WIDTH];
    for (int i = 0; i < WIDTH; ++i) rows[i] = load(from + i * from_stride);
    transpose(rows);
    for (int i = 0; i < WIDTH; ++i) store(to + i * to_stride, rows[i]);
}

// a0 b0 a1 b1 within each four lanes, from their first half (HIGH = 0) or the second (HIGH = 2); of
// single values (SIZE = 1) or pairs of them (SIZE = 2, HIGH = 0 or 2).
template <int HIGH, int SIZE, size_t... I>
inline Floats zip_fours(Floats a, Floats b, std::index_sequence<I...>) {
#define MANTA_LANE (I / 4 * 4 + HIGH + I % 4 / (2 * SIZE) * SIZE + I % SIZE + I / SIZE % 2 * WIDTH)
#if defined(__clang__)
    return __builtin_shufflevector(a, b, MANTA_LANE...);
#else
    return __builtin_shuffle(a, b, Ints{static_cast<int32_t>(MANTA_LANE)...});
#endif
#undef MANTA_LANE
}

typedef float Four __attribute__((vector_size(16)));

// A register of fours.
inline Floats join(const Four* fours) {
#if defined(__AVX512F__)
    __m512 joined = _mm512_castps128_ps512((__m128)fours[0]);
    joined = _mm512_insertf32x4(joined, (__m128)fours[1], 1);
    joined = _mm512_insertf32x4(joined, (__m128)fours[2], 2);
    return (Floats)_mm512_insertf32x4(joined, (__m128)fours[3], 3);
#elif defined(MANTA_AVX2)
    return (Floats)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)fours[0]),
                                        (__m128)fours[1], 1);
#else
    Floats joined;
    std::memcpy(&joined, fours, sizeof joined);
    return joined;
#endif
}

// Four words of WIDTH rows from `word` on, transposed: the i-th of all rows to columns[i].
__attribute__((always_inline)) inline void load_columns(const int32_t* const* rows, int64_t word,
                                                        Floats (&columns)[4]) {
    constexpr auto lanes = std::make_index_sequence<WIDTH>{};
    Floats fours[4], zipped[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        Four of_rows[WIDTH / 4];
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH / 4; ++j) of_rows[j] = load_bits<Four>(rows[4 * j + i] + word);
        fours[i] = join(of_rows);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        zipped[2 * i] = zip_fours<0, 1>(fours[2 * i], fours[2 * i + 1], lanes);
        zipped[2 * i + 1] = zip_fours<2, 1>(fours[2 * i], fours[2 * i + 1], lanes);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        columns[2 * i] = zip_fours<0, 2>(zipped[i], zipped[2 + i], lanes);
        columns[2 * i + 1] = zip_fours<2, 2>(zipped[i], zipped[2 + i], lanes);
    }
}

// ---- exponentials ----

constexpr float LOG2_E = 1.44269504f;

// 2^x within 2 ulp; 0 below 2^-126, and for -inf.
inline Floats exp2(Floats x) {
    constexpr float SHIFTER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Floats clamped = x > -126.0f ? (x < 127.0f ? x : broadcast(127.0f)) : broadcast(-126.0f);
    const Floats shifted = clamped + SHIFTER;
    const Floats f = clamped - (shifted - SHIFTER);  // in [-0.5, 0.5]
    // The Taylor series of 2^f.
    Floats p = broadcast(1.5403530e-4f);
    for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
                          6.9314718e-1f, 1.0f})
        p = fma(p, f, broadcast(c));
    const Ints exponent = ((Ints)shifted - 0x4B400000) << 23;
    const Floats power = (Floats)((Ints)p + exponent);
    return x < -126.0f ? Floats{} : power;
}

}  // namespace manta
