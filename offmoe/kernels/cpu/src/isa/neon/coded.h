// Rows of codes x floats for NEON, which every aarch64 processor has, with fused sums and conversions from float16.
#pragma once
#include <arm_neon.h>

#include "isa/generic/coded.h"

namespace offmoe {
namespace {

// 32 bytes in two registers.
struct TwoBytes {
    int8x16_t first, second;
};

struct NeonVectors {
    typedef float Vec __attribute__((vector_size(16)));
    // e4m3 moved to the places of float16 is 2^-8 of what it means.
    static constexpr float kScale = 1.0f, kFp8Scale = 0x1p8f;
    static constexpr int kSums = 2, kMostRows = 4;  // what 32 registers hold
    static constexpr bool kTables = false;
    struct Weights {
        float32x4_t parts[8];
    };

    static OFFMOE_INLINE Weights widen(I8x32 bytes) {
        const TwoBytes both = offmoe::bits<TwoBytes>(bytes);
        const int16x8_t words[4] = {vmovl_s8(vget_low_s8(both.first)), vmovl_high_s8(both.first),
                                    vmovl_s8(vget_low_s8(both.second)), vmovl_high_s8(both.second)};
        Weights w;
        OFFMOE_UNROLL
        for (int i = 0; i < 4; ++i) {
            w.parts[2 * i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(words[i])));
            w.parts[2 * i + 1] = vcvtq_f32_s32(vmovl_high_s16(words[i]));
        }
        return w;
    }

    static OFFMOE_INLINE Weights widen_fp8(U8x32 codes) {
        const TwoBytes both = offmoe::bits<TwoBytes>(codes);
        const uint8x16_t all[2] = {vreinterpretq_u8_s8(both.first), vreinterpretq_u8_s8(both.second)};
        Weights w;
        OFFMOE_UNROLL
        for (int i = 0; i < 4; ++i) {
            const uint16x8_t above = i % 2 ? vshll_high_n_u8(all[i / 2], 8) : vshll_n_u8(vget_low_u8(all[i / 2]), 8);
            // The sign stays, magnitudes move one down; the sign's copy goes.
            const uint16x8_t moved = vandq_u16(vreinterpretq_u16_s16(vshrq_n_s16(vreinterpretq_s16_u16(above), 1)), vdupq_n_u16(0xbfff));
            const uint16x8_t is_nan = vceqq_u16(vandq_u16(moved, vdupq_n_u16(0x7fff)), vdupq_n_u16(0x3f80));
            put_halves(vorrq_u16(moved, is_nan), &w.parts[2 * i]);
        }
        return w;
    }

    template <int32_t KIND>
    static OFFMOE_INLINE Weights dense(const uint8_t* from) {
        Weights w;
        if constexpr (KIND == DENSE_F32) {
            OFFMOE_UNROLL
            for (int i = 0; i < 8; ++i) w.parts[i] = load<float32x4_t>(from + 16 * i);
        } else {
            OFFMOE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const uint16x8_t halves = load<uint16x8_t>(from + 16 * i);
                if constexpr (KIND == DENSE_F16) put_halves(halves, &w.parts[2 * i]);
                else put_tops(halves, &w.parts[2 * i]);
            }
        }
        return w;
    }

    // Of a piece of PACKED, by way of its words.
    using Exponents = ::offmoe::Exponents;
    static OFFMOE_INLINE Weights packed(const uint8_t* numbers, const uint8_t* indices, const Exponents& exponents) {
        alignas(64) uint16_t words[kPackedPiece];
        unpack_piece(numbers, indices, exponents, words);
        return dense<DENSE_BF16>(reinterpret_cast<const uint8_t*>(words));
    }

    static OFFMOE_INLINE Vec dot(const Weights& w, const float* x) {
        return vaddq_f32(dot_of_16(w.parts, x), dot_of_16(w.parts + 4, x + 16));
    }

    static OFFMOE_INLINE Vec dot_halves(const Weights& w, const float* x, float a, float b) {
        return vfmaq_n_f32(vmulq_n_f32(dot_of_16(w.parts, x), a), dot_of_16(w.parts + 4, x + 16), b);
    }

    static OFFMOE_INLINE U8x32 nibbles(const uint8_t* codes) {
        const uint8x16_t both = load<uint8x16_t>(codes);
        return offmoe::bits<U8x32>(TwoBytes{vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8(both, 4))});
    }

    static OFFMOE_INLINE I8x32 e2m1_twice(U8x32 nibbles) { return look_up(kE2m1Twice, nibbles); }
    static OFFMOE_INLINE I8x32 iq4(U8x32 nibbles) { return look_up(kIq4, nibbles); }

    static OFFMOE_INLINE Vec add_scaled(Vec sums, Vec dots, float scale) { return vfmaq_n_f32(sums, dots, scale); }
    static OFFMOE_INLINE float total(Vec sums) { return vaddvq_f32(sums); }

    static int64_t place(int32_t, int64_t at) { return at; }

    // Sixteen signed numbers that nibbles stand for.
    static OFFMOE_INLINE int8x16_t look_up(const int8_t* numbers, uint8x16_t nibbles) {
        return vqtbl1q_s8(load<int8x16_t>(numbers), nibbles);
    }

private:
    static OFFMOE_INLINE float32x4_t dot_of_16(const float32x4_t* w, const float* x) {
        float32x4_t sum = vmulq_f32(w[0], vld1q_f32(x));
        OFFMOE_UNROLL
        for (int i = 1; i < 4; ++i) sum = vfmaq_f32(sum, w[i], vld1q_f32(x + 4 * i));
        return sum;
    }

    static OFFMOE_INLINE I8x32 look_up(const int8_t* numbers, U8x32 nibbles) {
        const TwoBytes both = offmoe::bits<TwoBytes>(nibbles);
        return offmoe::bits<I8x32>(TwoBytes{look_up(numbers, vreinterpretq_u8_s8(both.first)), look_up(numbers, vreinterpretq_u8_s8(both.second))});
    }

    // Eight float16 numbers.
    static OFFMOE_INLINE void put_halves(uint16x8_t halves, float32x4_t* to) {
        to[0] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves)));
        to[1] = vcvt_high_f32_f16(vreinterpretq_f16_u16(halves));
    }

    // Eight bfloat16 numbers: the tops of floats.
    static OFFMOE_INLINE void put_tops(uint16x8_t halves, float32x4_t* to) {
        to[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16));
        to[1] = vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16));
    }
};

}  // namespace
}  // namespace offmoe
