// GGUF's blocks: codes and scales of 32 or 256 columns lie together. Unpacked to floats as ggml's own
// `dequantize_row_*` has them: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
#pragma once
#include "isa/generic/vectors.h"

namespace offmoe {
namespace {

// What the general kernels unpack at a time.
constexpr int64_t kChunk = 128;
constexpr int64_t kVectors = kChunk / kLanes;

constexpr bool is_blocks(int32_t kind) { return kind >= Q4_0 && kind != PACKED; }

constexpr int64_t block_columns(int32_t kind) {
    return kind == Q4_K || kind == Q5_K || kind == Q6_K || kind == IQ4_XS ? 256 : 32;
}

constexpr int64_t block_bytes(int32_t kind) {
    switch (kind) {
        case Q4_0: case IQ4_NL: return 18;
        case Q8_0: return 34;
        case Q4_K: return 144;
        case Q5_K: return 176;
        case Q6_K: return 210;
        case IQ4_XS: return 136;
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

// Twice the numbers of e2m1.
constexpr int8_t kE2m1Twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
// What the nibbles of IQ4_NL and IQ4_XS mean.
constexpr bool is_iq4(int32_t kind) { return kind == IQ4_NL || kind == IQ4_XS; }
constexpr int8_t kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Where the eight scales of IQ4_XS are six bits each, 32 added: the lower four in nibbles, the upper two in a word. As bytes.
inline uint64_t iq4_scales(const uint8_t* block) {
    uint64_t low = load<uint32_t>(block + 4), high = load<uint16_t>(block + 2);
    low = (low | low << 16) & 0x0000ffff0000ffffu;
    low = (low | low << 8) & 0x00ff00ff00ff00ffu;
    low = (low | low << 4) & 0x0f0f0f0f0f0f0f0fu;
    high = (high | high << 24) & 0x000000ff000000ffu;
    high = (high | high << 12) & 0x000f000f000f000fu;
    high = (high | high << 6) & 0x0303030303030303u;
    return low | high << 4;
}

// Half of 2^(exponent - 127), which is finite for all 256 exponents.
inline float half_of_power(uint8_t exponent) {
    return bits<float>(exponent < 2 ? 0x00200000u << exponent : (uint32_t{exponent} - 1u) << 23);
}

inline float f16_at(const uint8_t* address) {
#if defined(__F16C__)
    return _cvtsh_ss(load<uint16_t>(address));
#elif defined(__aarch64__)
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(load<uint16_t>(address)))), 0);
#else
    U16x16 half = {};
    half[0] = load<uint16_t>(address);
    return from_f16(half)[0];
#endif
}

}  // namespace
}  // namespace offmoe
