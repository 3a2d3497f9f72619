// Instructions of x86 that the processor at hand lacks, each as the manuals define it, so that the
// code of a level that has them runs as it stands. For a compiler that targets AVX2; to be included
// first.
#pragma once

#include <immintrin.h>

// Whatever else the kernels include, before names are taken from it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulated {

// Both halves of a register by an instruction of AVX2.
template <class To, class From, class Operation>
inline To halves(From from, const Operation& operation) {
    To to;
    for (int i = 0; i < 2; ++i) {
        char in[sizeof(From) / 2];
        std::memcpy(in, reinterpret_cast<const char*>(&from) + i * sizeof in, sizeof in);
        const auto out = operation(in);
        std::memcpy(reinterpret_cast<char*>(&to) + i * sizeof out, &out, sizeof out);
    }
    return to;
}

// lane(i) to every lane of type T.
template <class T, class Register, class Lane>
inline Register lanes(const Lane& lane) {
    T values[sizeof(Register) / sizeof(T)];
    for (size_t i = 0; i < sizeof(Register) / sizeof(T); ++i) values[i] = lane(i);
    Register made;
    std::memcpy(&made, values, sizeof made);
    return made;
}

// The i-th T of a register.
template <class T, class Register>
inline T at(const Register& r, size_t i) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&r) + i * sizeof value, sizeof value);
    return value;
}

inline float widen(uint16_t bfloat16) {
    const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
    return at<float>(bits, 0);
}

// AVX-512

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return lanes<float, __m512>([&](size_t i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
inline __m512 cvtph_ps(__m256i v) {
    return halves<__m512>(v, [](const void* half) {
        return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(half)));
    });
}
inline __m256i cvtps_ph(__m512 v, int) {
    return halves<__m256i>(v, [](const void* half) {
        return _mm256_cvtps_ph(_mm256_loadu_ps(static_cast<const float*>(half)),
                               _MM_FROUND_TO_NEAREST_INT);
    });
}
inline __m512 castps128_ps512(__m128 v) {
    return lanes<float, __m512>([&](size_t i) { return i < 4 ? v[i] : NAN; });
}
inline __m512 insertf32x4(__m512 to, __m128 v, int place) {
    std::memcpy(reinterpret_cast<char*>(&to) + 16 * place, &v, 16);
    return to;
}
inline __m512i cvtepu16_epi32(__m256i v) {
    return lanes<uint32_t, __m512i>([&](size_t i) { return at<uint16_t>(v, i); });
}
inline __m512i cvtepi8_epi32(__m128i v) {
    return lanes<int32_t, __m512i>([&](size_t i) { return at<int8_t>(v, i); });
}
inline __m128i cvtepi32_epi8(__m512i v) {
    return lanes<int8_t, __m128i>([&](size_t i) { return at<int8_t>(v, 4 * i); });
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
    return lanes<int32_t, __m512i>([&](size_t i) {
        return at<int16_t>(a, 2 * i) * at<int16_t>(b, 2 * i) +
               at<int16_t>(a, 2 * i + 1) * at<int16_t>(b, 2 * i + 1);
    });
}
inline __m512i maddubs_epi16(__m512i a, __m512i b) {
    return lanes<int16_t, __m512i>([&](size_t i) {
        const int total = at<uint8_t>(a, 2 * i) * at<int8_t>(b, 2 * i) +
                          at<uint8_t>(a, 2 * i + 1) * at<int8_t>(b, 2 * i + 1);
        return std::clamp(total, -32768, 32767);
    });
}

// Dot products of bytes, and of bfloat16

template <class Register>
inline Register dpbusd_epi32(Register total, Register a, Register b) {
    return lanes<int32_t, Register>([&](size_t i) {
        int32_t sum = at<int32_t>(total, i);
        for (size_t j = 4 * i; j < 4 * i + 4; ++j) sum += at<uint8_t>(a, j) * at<int8_t>(b, j);
        return sum;
    });
}
inline __m512 dpbf16_ps(__m512 total, __m512bh a, __m512bh b) {
    return lanes<float, __m512>([&](size_t i) {
        const auto product = [&](size_t j) {
            return widen(at<uint16_t>(a, j)) * widen(at<uint16_t>(b, j));
        };
        return total[i] + product(2 * i + 1) + product(2 * i);
    });
}
inline __m256bh cvtneps_pbh(__m512 v) {
    return lanes<uint16_t, __m256bh>([&](size_t i) -> uint16_t {
        const uint32_t bits = at<uint32_t>(v, i);
        if (v[i] != v[i]) return bits >> 16 | 0x40;
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    });
}

}  // namespace emulated

#if defined(EMULATED_AVX512F)
#define __AVX512F__ 1
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_castps128_ps512 emulated::castps128_ps512
#undef _mm512_insertf32x4
#define _mm512_insertf32x4 emulated::insertf32x4
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define asm(...)  // which keeps values in registers that are not there
#endif
#if defined(EMULATED_AVX512BW)
#define __AVX512BW__ 1
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_maddubs_epi16 emulated::maddubs_epi16
#endif
#if defined(EMULATED_AVX512VNNI)
#define __AVX512VNNI__ 1
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#endif
#if defined(EMULATED_AVXVNNI)
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd_epi32
#endif
#if defined(EMULATED_AVX512BF16)
#define __AVX512BF16__ 1
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#endif
