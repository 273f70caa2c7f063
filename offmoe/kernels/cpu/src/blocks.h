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
#if defined(__F16C__)
    return _cvtsh_ss(load<uint16_t>(address));
#else
    U16x16 half = {};
    half[0] = load<uint16_t>(address);
    return from_f16(half)[0];
#endif
}

}  // namespace
}  // namespace offmoe
