// GGUF's blocks: codes and scales of 32 or 256 columns lie together. Unpacked to floats as ggml's own
// `dequantize_row_*` has them: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
#pragma once
#include "vectors.h"

namespace offmoe {
namespace {

// What the general kernels unpack at a time.
constexpr int64_t kChunk = 128;
constexpr int64_t kVectors = kChunk / kLanes;

constexpr bool is_blocks(int32_t kind) { return kind >= Q4_0; }

constexpr int64_t block_columns(int32_t kind) { return kind == Q4_K || kind == Q5_K || kind == Q6_K ? 256 : 32; }

constexpr int64_t block_bytes(int32_t kind) {
    switch (kind) {
        case Q4_0: return 18;
        case Q8_0: return 34;
        case Q4_K: return 144;
        case Q5_K: return 176;
        case Q6_K: return 210;
        default: return 17;
    }
}

// Eight scales and then eight minima of six bits each, in twelve bytes: (scales, minima) as sixteen bytes.
inline void six_bits(const uint8_t* packed, uint32_t* scales_minima) {
    const uint32_t first = load<uint32_t>(packed), second = load<uint32_t>(packed + 4), third = load<uint32_t>(packed + 8);
    scales_minima[0] = first & 0x3f3f3f3fu;
    scales_minima[1] = (third & 0x0f0f0f0fu) | ((first >> 2) & 0x30303030u);
    scales_minima[2] = second & 0x3f3f3f3fu;
    scales_minima[3] = ((third >> 4) & 0x0f0f0f0fu) | ((second >> 2) & 0x30303030u);
}

// Half of 2^(exponent - 127), which is finite for all 256 exponents.
inline float half_of_power(uint8_t exponent) {
    return bits<float>(exponent < 2 ? 0x00200000u << exponent : (uint32_t{exponent} - 1u) << 23);
}

inline float f16_at(const uint8_t* address) {
    U16x16 half = {};
    half[0] = load<uint16_t>(address);
    return from_f16(half)[0];
}

inline U32x16 wide_bytes(const uint8_t* address) { return __builtin_convertvector(load<U8x16>(address), U32x16); }

inline F32x16 to_floats(U32x16 codes) { return __builtin_convertvector(bits<I32x16>(codes), F32x16); }

// Sixteen columns of a block of 32.
template <int32_t KIND>
inline F32x16 half_block(const uint8_t* block, uint32_t half) {
    if constexpr (KIND == Q8_0)
        return __builtin_convertvector(load<I8x16>(block + 2 + 16 * half), F32x16) * f16_at(block);
    if constexpr (KIND == Q4_0)
        return (to_floats((wide_bytes(block + 2) >> (4 * half)) & 15u) - 8.0f) * f16_at(block);
    return e2m1((wide_bytes(block + 1) >> (4 * half)) & 15u) * 2.0f * half_of_power(block[0]);
}

// The first 128 columns of a block of 256, or the last.
template <int32_t KIND>
inline void half_of_256(const uint8_t* block, uint32_t half, F32x16* out) {
    if constexpr (KIND == Q6_K) {
        const float scale = f16_at(block + 208);
        OFFMOE_UNROLL
        for (uint32_t i = 0; i < kVectors; ++i) {
            const U32x16 low = (wide_bytes(block + 64 * half + 16 * (i & 3)) >> (i / 4 * 4)) & 15u;
            const U32x16 high = (wide_bytes(block + 128 + 32 * half + 16 * (i & 1)) >> (i / 2 * 2)) & 3u;
            const float group_scale = scale * static_cast<float>(static_cast<int8_t>(block[192 + 8 * half + i]));
            out[i] = (to_floats(low | (high << 4)) - 32.0f) * group_scale;
        }
        return;
    }
    uint32_t packed[4];
    six_bits(block + 4, packed);
    const uint8_t* scales = reinterpret_cast<const uint8_t*>(packed) + 4 * half;
    const uint8_t* codes = block + (KIND == Q5_K ? 48 : 16) + 64 * half;
    const float scale = f16_at(block), least = f16_at(block + 2);
    OFFMOE_UNROLL
    for (uint32_t i = 0; i < kVectors; ++i) {
        U32x16 code = (wide_bytes(codes + 32 * (i / 4) + 16 * (i & 1)) >> (4 * (i / 2 & 1))) & 15u;
        if (KIND == Q5_K) code |= ((wide_bytes(block + 16 + 16 * (i & 1)) >> (4 * half + i / 2)) & 1u) << 4;
        out[i] = to_floats(code) * (scale * scales[i / 2]) - least * scales[8 + i / 2];
    }
}

// 128 columns from `column` on, of blocks that begin at `blocks`.
template <int32_t KIND>
inline void unpack_blocks(const uint8_t* blocks, int64_t column, F32x16* out) {
    if constexpr (block_columns(KIND) == 256) {
        half_of_256<KIND>(blocks, column / kChunk & 1, out);
    } else {
        OFFMOE_UNROLL
        for (uint32_t i = 0; i < kVectors; ++i) out[i] = half_block<KIND>(blocks + i / 2 * block_bytes(KIND), i & 1);
    }
}

}  // namespace
}  // namespace offmoe
