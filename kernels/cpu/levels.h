// Weights of few bits in memory, and taken apart: bytes with a scale and a minimum per group.
//
// A value is (level - zero) * scale, or level * scale + minimum. A panel is a row of blocks, each
// of some inputs of COLUMNS outputs: first their levels, then their scales.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dot.h"

namespace manta {

constexpr int64_t CHUNK = 256;  // inputs that are taken apart at once

// What a block has beside its scales, and the type of these. BYTE: a super-block, whose whole
// scales of 8 bits are multiplied by a half of its own, the minimums by another.
enum Second { NOTHING, MINIMUMS, ZEROS };
enum Scale { HALF, BFLOAT16, BYTE };

struct Layout {
    int bits;    // 2, 3, 4, 5, 6 or 8
    int group;   // inputs with the same scale: 32, 64, 128, of super-blocks 16 or 32
    int scale;   // one of Scale
    int second;  // one of Second; zeros are signed bytes, from the middle on; minimums as scales

    int64_t block_inputs() const { return scale == BYTE ? CHUNK : group; }
    int64_t value_bytes() const { return block_inputs() * bits / 8 * COLUMNS; }
    int64_t block_bytes() const {
        const int64_t kinds = second == MINIMUMS ? 2 : 1;
        const int64_t scales = scale == BYTE ? kinds * (CHUNK / group + 2) : kinds * 2;
        return value_bytes() + (scales + (second == ZEROS)) * COLUMNS;
    }
    // The level in the middle, which stands for 0 where no other does.
    int32_t middle() const { return 1 << (bits - 1); }
    // What dot products take off levels, so that they are counted from the middle: whole bytes are
    // stored as far from it as the instructions want them.
    int32_t excess() const { return bits == 8 ? BYTE_OFFSET : middle(); }
};

// ---- dot products of levels and signed bytes, by words of four ----

// All levels are whole bytes.
struct DotBytes {
#if defined(MANTA_BYTE_DOT)
    static constexpr int PARTS = 1;
    static void add(Ints& total, Ints x, Ints levels) {
        total = dot_bytes(total, levels, x);
        pin(total);
    }
#elif defined(MANTA_AVX2)
    static constexpr int PARTS = 1;
    static void add(Ints& total, Ints x, Ints levels) {  // |levels|, and x with their signs
        const __m256i y = _mm256_sign_epi8((__m256i)x, (__m256i)levels);
        const auto pairs = (Ints)_mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)levels), y);
        total += multiply_pairs(pairs, (Ints)(Pairs{} + 1));
        pin(total);
    }
#else
    static constexpr int PARTS = 2;
    static void add(Ints& total, Ints x, Ints levels) {
        total += multiply_pairs(levels, x);
        pin(total);
    }
#endif
    static Ints total(Ints dots) { return dots; }
    // What sums begin with, where the bytes of first pairs and of second ones add up to these.
    static int32_t start(int32_t first, int32_t second) { return first + second; }
    // Four activations as words; `to` moves on.
    static void take_apart(const int8_t* bytes, int32_t*& to) {
        if constexpr (PARTS == 1) {
            std::memcpy(to++, bytes, 4);
        } else {
            for (int part = 0; part < 2; ++part) {
                const int16_t pair[] = {bytes[part], bytes[2 + part]};
                std::memcpy(to++, pair, 4);
            }
        }
    }
    // The i-th level of a word.
    static int32_t level(const int32_t (*words)[COLUMNS], int64_t column, int64_t i) {
        if constexpr (PARTS == 2) return static_cast<int16_t>(words[i % 2][column] >> i / 2 * 16);
        const auto byte = static_cast<uint8_t>(words[0][column] >> i * 8);
        return BYTE_OFFSET == 0 ? static_cast<int8_t>(byte) : byte;
    }
};

// Levels of up to 4 bits, of 5 in groups of 32, of 6 in groups of 16: their sums fit into 16 bits
// once all products are there, and may wrap before.
#if !defined(MANTA_BYTE_DOT) && (defined(__AVX512BW__) || defined(MANTA_AVX2))
struct DotLevels {
    static constexpr int PARTS = 1;
    static void add(Ints& total, Ints x, Ints levels) {
#if defined(__AVX512BW__)
        total = (Ints)((Pairs)total + (Pairs)_mm512_maddubs_epi16((__m512i)levels, (__m512i)x));
#else
        total = (Ints)((Pairs)total + (Pairs)_mm256_maddubs_epi16((__m256i)levels, (__m256i)x));
#endif
        pin(total);
    }
    static Ints total(Ints dots) { return multiply_pairs(dots, (Ints)(Pairs{} + 1)); }
    static int32_t start(int32_t first, int32_t second) {
        return static_cast<int32_t>((first & 0xFFFF) | static_cast<uint32_t>(second) << 16);
    }
    static void take_apart(const int8_t* bytes, int32_t*& to) { std::memcpy(to++, bytes, 4); }
    static int32_t level(const int32_t (*words)[COLUMNS], int64_t column, int64_t i) {
        return words[0][column] >> i * 8 & 0xFF;
    }
};
#else
using DotLevels = DotBytes;
#endif

// ---- taking a panel apart ----

struct Chunk {
    int32_t words[CHUNK / 4 * DotBytes::PARTS][COLUMNS];
    float scales[CHUNK / 16][COLUMNS], minimums[CHUNK / 16][COLUMNS];
};

// Of 32 inputs, a plane of BITS of each level: in BITS words by column, of which the t-th BITS of
// every byte belong to word `j + BITS * t` of bytes.
template <int BITS, class Each>
inline void for_plane(const int32_t* from, const Each& each) {
    constexpr uint32_t MASK = 0x01010101u * ((1u << BITS) - 1);
#pragma GCC unroll 8
    for (int j = 0; j < BITS; ++j) {
        const auto words = load_bits<UInts>(from + j * COLUMNS);
#pragma GCC unroll 8
        for (int t = 0; t < 8 / BITS; ++t) each(j + BITS * t, (words >> (BITS * t)) & MASK);
    }
}

template <class Dot, int LOW, int HIGH>
void take_levels_apart(const int32_t* from, int64_t inputs, int32_t (*to)[COLUMNS]) {
    for (int64_t i = 0; i < inputs; i += 32, from += (LOW + HIGH) * COLUMNS, to += 8 * Dot::PARTS)
#pragma GCC unroll 4
        for (int n = 0; n < REGISTERS; ++n) {
            UInts words[8];
            for_plane<LOW>(from + n * WIDTH, [&](int i, UInts bits) { words[i] = bits; });
            if constexpr (HIGH > 0)
                for_plane<HIGH>(from + LOW * COLUMNS + n * WIDTH,
                                [&](int i, UInts bits) { words[i] |= bits << LOW; });
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
                for (int part = 0; part < Dot::PARTS; ++part) {
                    const Ints word = Dot::PARTS == 1 ? (Ints)words[i] : byte_pair((Ints)words[i], part);
                    std::memcpy(to[Dot::PARTS * i + part] + n * WIDTH, &word, sizeof word);
                }
        }
}

inline Floats load_signed(const int8_t* p) {
    return __builtin_convertvector(load_bytes(p), Floats);
}

// The scales of a block of `groups`, and minimums for levels that are counted from the middle.
template <class T, int SECOND>
void take_scales_apart(const char* from, int64_t groups, float middle, float (*scales)[COLUMNS],
                       float (*minimums)[COLUMNS]) {
    const T* own = reinterpret_cast<const T*>(from);
    for (int64_t n = 0; n < COLUMNS; n += WIDTH) {
        const Floats scale = load(own + n);
        Floats minimum = {};
        if constexpr (SECOND == MINIMUMS) minimum = fma(scale, broadcast(middle), load(own + COLUMNS + n));
        if constexpr (SECOND == ZEROS)
            minimum = -scale * load_signed((const int8_t*)(own + COLUMNS) + n);
        for (int64_t g = 0; g < groups; ++g) {
            store(scales[g] + n, scale);
            if constexpr (SECOND != NOTHING) store(minimums[g] + n, minimum);
        }
    }
}

template <bool HAS_MINIMUMS>
void take_super_apart(const char* from, int64_t groups, float middle, float (*scales)[COLUMNS],
                      float (*minimums)[COLUMNS]) {
    const auto* bytes = reinterpret_cast<const int8_t*>(from);
    const auto* halves =
        reinterpret_cast<const Half*>(from + (HAS_MINIMUMS ? 2 : 1) * groups * COLUMNS);
    for (int64_t n = 0; n < COLUMNS; n += WIDTH) {
        const Floats common = load(halves + n);
        const Floats of_minimums = HAS_MINIMUMS ? load(halves + COLUMNS + n) : Floats{};
        for (int64_t g = 0; g < groups; ++g) {
            const Floats scale = load_signed(bytes + g * COLUMNS + n) * common;
            store(scales[g] + n, scale);
            if constexpr (HAS_MINIMUMS) {
                const Floats minimum = load_signed(bytes + (groups + g) * COLUMNS + n) * of_minimums;
                store(minimums[g] + n, fma(scale, broadcast(middle), minimum));
            }
        }
    }
}

// `inputs` of a panel, whose blocks begin at `from`; returns where the next ones do. What lies
// `to_next` bytes further on is fetched, if that is not 0.
template <class Dot, int GROUP>
const char* take_apart(const Layout& layout, int64_t inputs, const char* from, int64_t to_next,
                       Chunk& chunk) {
    const int64_t block_inputs = layout.block_inputs(), value_bytes = layout.value_bytes();
    const int64_t block_bytes = layout.block_bytes(), groups = block_inputs / GROUP;
    const float middle = static_cast<float>(layout.middle());
    for (int64_t i = 0; i < inputs; i += block_inputs, from += block_bytes) {
        if (to_next)
            for (int64_t at = 0; at < block_bytes; at += 64)
                __builtin_prefetch(from + to_next + at, 0, 2);
        const auto* levels = reinterpret_cast<const int32_t*>(from);
        const char* scales = from + value_bytes;
        auto* words = chunk.words + i / 4 * Dot::PARTS;
        if constexpr (std::is_same_v<Dot, DotLevels>) switch (layout.bits) {
            case 2: take_levels_apart<Dot, 2, 0>(levels, block_inputs, words); break;
            case 3: take_levels_apart<Dot, 2, 1>(levels, block_inputs, words); break;
            case 4: take_levels_apart<Dot, 4, 0>(levels, block_inputs, words); break;
            case 5: take_levels_apart<Dot, 4, 1>(levels, block_inputs, words); break;
            case 6: take_levels_apart<Dot, 4, 2>(levels, block_inputs, words); break;
        }
        if constexpr (std::is_same_v<Dot, DotBytes>)
            if (layout.bits == 8) take_levels_apart<Dot, 8, 0>(levels, block_inputs, words);
        float(*to)[COLUMNS] = chunk.scales + i / GROUP;
        float(*minimums)[COLUMNS] = chunk.minimums + i / GROUP;
        const auto run = [&](auto function) { function(scales, groups, middle, to, minimums); };
        switch (layout.scale * 3 + layout.second) {
            case HALF * 3 + NOTHING: run(take_scales_apart<Half, NOTHING>); break;
            case HALF * 3 + MINIMUMS: run(take_scales_apart<Half, MINIMUMS>); break;
            case HALF * 3 + ZEROS: run(take_scales_apart<Half, ZEROS>); break;
            case BFLOAT16 * 3 + NOTHING: run(take_scales_apart<BFloat16, NOTHING>); break;
            case BFLOAT16 * 3 + MINIMUMS: run(take_scales_apart<BFloat16, MINIMUMS>); break;
            case BFLOAT16 * 3 + ZEROS: run(take_scales_apart<BFloat16, ZEROS>); break;
            case BYTE * 3 + NOTHING: run(take_super_apart<false>); break;
            case BYTE * 3 + MINIMUMS: run(take_super_apart<true>); break;
        }
    }
    return from;
}

// ---- packing ----

// A plane of `bits` of 32 levels in a column, from bit `shift` on.
inline void pack_plane(const uint32_t* levels, int bits, int shift, int32_t* to) {
    const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
    for (int j = 0; j < bits; ++j) {
        uint32_t word = 0;
        for (int t = 0; j + bits * t < 8; ++t)
            word |= (levels[j + bits * t] >> shift & mask) << (t * bits);
        to[j * COLUMNS] = static_cast<int32_t>(word);
    }
}

// Outputs [begin, end) of a panel at `to`, of levels [end - begin, inputs].
inline void pack_levels(const Layout& layout, const uint8_t* levels, int64_t begin, int64_t end,
                        int64_t inputs, char* to) {
    const int low = layout.bits == 8 ? 8 : layout.bits < 4 ? 2 : 4, high = layout.bits - low;
    const uint32_t flip = layout.bits == 8 && layout.excess() == 0 ? 0x80808080u : 0;
    for (int64_t i = 0; i < inputs; i += 32) {
        const int64_t block = i / layout.block_inputs(), within = i % layout.block_inputs();
        auto* words = reinterpret_cast<int32_t*>(to + block * layout.block_bytes() +
                                                 within * layout.bits / 8 * COLUMNS);
        for (int64_t c = begin; c < end; ++c) {
            uint32_t own[8];
            std::memcpy(own, levels + (c - begin) * inputs + i, sizeof own);
            for (auto& four : own) four ^= flip;
            pack_plane(own, low, 0, words + c);
            if (high) pack_plane(own, high, low, words + low * COLUMNS + c);
        }
    }
}

}  // namespace manta
