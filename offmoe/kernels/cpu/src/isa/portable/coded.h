// Rows of codes x floats in the compiler's own vectors. Integers are moved by shifts of 32-bit numbers: some compilers take
// conversions of bytes apart, and comparisons of vectors larger than the processor's.
#pragma once
#include "isa/generic/coded.h"

namespace offmoe {
namespace {

struct AnyVectors {
    using Vec = F32x16;
    static constexpr float kScale = 1.0f, kFp8Scale = 1.0f;
#if defined(__x86_64__)  // all that have AVX2 use that; eight rows at once were more than half of what is compiled
    static constexpr int kSums = 1, kMostRows = 4;
#else
    static constexpr int kSums = 1, kMostRows = 8;  // of four vectors or two
#endif
    static constexpr bool kTables = false;
    struct Weights {
        F32x16 first, second;
    };
    template <class V>
    struct Two {
        V first, second;
    };

    static OFFMOE_INLINE Weights widen(I8x32 bytes) {
        const I32x8 all = bits<I32x8>(bytes);
        return {pair(__builtin_convertvector(all << 24 >> 24, F32x8), __builtin_convertvector(all << 16 >> 24, F32x8)),
                pair(__builtin_convertvector(all << 8 >> 24, F32x8), __builtin_convertvector(all >> 24, F32x8))};
    }

    static OFFMOE_INLINE Weights widen_fp8(U8x32 codes) {
        const I32x8 all = bits<I32x8>(codes);
        return {pair(top_fp8(all << 24), top_fp8(all << 16)), pair(top_fp8(all << 8), top_fp8(all))};
    }

    // The e4m3 in the top byte.
    static OFFMOE_INLINE F32x8 top_fp8(I32x8 code) {
        const I32x8 magnitude = code & 0x7f000000, sign = code & static_cast<int32_t>(0x80000000);
        const F32x8 normal = bits<F32x8>((magnitude >> 4) + (120 << 23)), small = normal * 2.0f - 0x1p-6f;
        const F32x8 value = choose((magnitude - 0x08000000) >> 31, small, normal);
        return bits<F32x8>(bits<I32x8>(value) | sign | (0x7effffff - magnitude) >> 31);  // all bits: NaN
    }

    template <int32_t KIND>
    static OFFMOE_INLINE Weights dense(const uint8_t* from) {
        if constexpr (KIND == DENSE_F32) return {load<F32x16>(from), load<F32x16>(from + 64)};
        else if constexpr (KIND == DENSE_F16) return {from_f16(load<U16x16>(from)), from_f16(load<U16x16>(from + 32))};
        else return {from_bf16(load<U16x16>(from)), from_bf16(load<U16x16>(from + 32))};
    }

    // Of a piece of PACKED, by way of its words.
    using Exponents = ::offmoe::Exponents;
    static OFFMOE_INLINE Weights packed(const uint8_t* numbers, const uint8_t* indices, const Exponents& exponents) {
        alignas(64) uint16_t words[kPackedPiece];
        unpack_piece(numbers, indices, exponents, words);
        return dense<DENSE_BF16>(reinterpret_cast<const uint8_t*>(words));
    }

    static OFFMOE_INLINE F32x16 dot(const Weights& w, const float* x) {
        return w.first * load<F32x16>(x) + w.second * load<F32x16>(x + kLanes);
    }

    static OFFMOE_INLINE F32x16 dot_halves(const Weights& w, const float* x, float a, float b) {
        return dot(w, x) * F32x16{a, a, a, a, b, b, b, b, a, a, a, a, b, b, b, b};
    }

    static OFFMOE_INLINE U8x32 nibbles(const uint8_t* codes) {
        const U8x16 both = load<U8x16>(codes), high = bits<U8x16>(bits<U16x8>(both) >> 4);
        return bits<U8x32>(Two<U8x16>{both, high}) & 15;
    }

    // 0 1 2 3 4 6 8 12 and their negatives.
    static OFFMOE_INLINE I8x32 e2m1_twice(U8x32 nibble) {
        const U8x32 large = 0 - (shifted(nibble, 2) & 1), minus = 0 - (shifted(nibble, 3) & 1);
        const U8x32 both = shifted(nibble, 1) & nibble & 1;
        const U8x32 magnitude = (nibble & 7) + (large & ((nibble & 3) + both + both));
        return bits<I8x32>((magnitude ^ minus) - minus);
    }

    static OFFMOE_INLINE I8x32 iq4(U8x32 nibbles) {
        int8_t numbers[32];
        for (int i = 0; i < 32; ++i) numbers[i] = kIq4[nibbles[i]];
        return load<I8x32>(numbers);
    }

    static OFFMOE_INLINE F32x16 add_scaled(F32x16 sums, F32x16 dots, float scale) { return sums + dots * splat(scale); }
    static OFFMOE_INLINE float total(F32x16 sums) { return sum(sums); }

    static int64_t place(int32_t kind, int64_t at) { return is_dense(kind) ? at : at % 8 * 4 + at / 8; }

private:
    static OFFMOE_INLINE F32x16 pair(F32x8 first, F32x8 second) { return bits<F32x16>(Two<F32x8>{first, second}); }
};

}  // namespace
}  // namespace offmoe
