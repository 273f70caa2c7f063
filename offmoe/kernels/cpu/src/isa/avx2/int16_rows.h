// Activations rounded to 16-bit integers, for AVX2.
//
// 32 activations share a unit, a power of two of which the largest of them is at least 2^14 and less than 2^15. Rounded to
// whole units, each is off by at most half a unit, which is at most 2^-15 of that largest one; a bfloat16 number is
// exact unless it is below 2^-7 of it, a float16 number unless it is below 2^-4. Codes times these integers are added up
// in 32 bits without a further error: at most 255 * 2^15 * 32 < 2^28, sixteen times that for Q4_K's upper nibbles (15 * 16 in
// the place of 255), 12 * 256 * 2^15 * 4 < 2^29 for the four products in a lane of mxfp4. One product with the unit and the
// weights' scale a group makes a float of them.
//
// A row whose numbers are infinite or NaN, or in which some group's largest one is not zero and outside 2^-64 to 2^65, is
// kept in floats and multiplied as coded.h does. That depends on the row alone.
#pragma once
#include "isa/avx2/coded.h"
#include "isa/generic/integers.h"

namespace offmoe {
namespace {

// Eight pieces of 32 columns; rows are filled up with zeros to whole ones.
constexpr int64_t kChunkPieces = 8, kChunkColumns = kChunkPieces * kPiece;

// Nibbles that lie in the order of 16-bit words: a vector has parts of two pieces, each in one half of its lanes.
constexpr bool is_paired(int32_t kind) { return is_nibbles(kind) && kind != Q4_K; }
constexpr bool is_tabled(int32_t kind) { return kind == MXFP4 || kind == MXFP4_BLOCKS || is_iq4(kind); }
constexpr bool in_halves(int32_t kind) { return kind == Q6_K; }  // with a scale for 16 columns

constexpr bool has_minima(int32_t kind) { return kind == Q4_K || kind == Q5_K; }

// Floats of a chunk: units, and the sums that zero points and minima are multiplied with.
constexpr int64_t chunk_floats(int32_t kind) { return in_halves(kind) ? 32 : 16; }

// Where the unit of a piece (or half) lies among them, in the order in which its scales come, and how far behind it the sum.
constexpr int64_t unit_place(int32_t kind, int64_t at) {
    if (has_minima(kind)) return at % 4 + at / 4 * 8;
    return in_halves(kind) ? at / 8 * 8 + at % 2 * 4 + at % 8 / 2 : at;
}
constexpr int64_t sum_behind(int32_t kind) { return has_minima(kind) ? 4 : chunk_floats(kind) / 2; }

// A prepared row in integers: these, and the floats of its chunks.
struct Int16Row {
    explicit Int16Row(const Matrix& matrix)
        : chunks((num_pieces(matrix) + kChunkPieces - 1) / kChunkPieces), floats_at(kFormBytes + 2 * chunks * kChunkColumns),
          num_bytes(floats_at + 4 * chunks * chunk_floats(matrix.kind)) {}

    const int64_t chunks, floats_at, num_bytes;
};

// The column of 64 that the at-th integer is.
inline int64_t int16_column(int32_t kind, int64_t at) {
    const int64_t vector = at / 16, lane = at % 16;
    if (!is_paired(kind)) return 32 * (vector / 2) + 2 * lane + vector % 2;
    const int64_t piece = lane / 8, byte = 2 * (lane % 8) + vector / 2, high = vector % 2;
    return 32 * piece + (kind == INT4 || kind == MXFP4 ? 2 * byte + high : byte + 16 * high);
}

// The number that a code means nothing at, where that is the same for all: sums are multiplied with it beforehand.
inline float int16_zero(const Matrix& matrix) {
    switch (matrix.kind) {
        case INT4: return matrix.zeros ? 1.0f : static_cast<float>(matrix.zero);
        case Q4_0: return 8.0f;
        case Q6_K: return 32.0f;
        default: return 1.0f;
    }
}

// What a unit is divided by, since codes come out that many times too large.
constexpr float int16_factor(int32_t kind, int64_t piece) {
    if (kind == MXFP4) return 0x1p-9f;
    if (kind == MXFP4_BLOCKS) return 0x1p-8f;
    return kind == Q4_K && piece % 2 ? 0x1p-4f : 1.0f;
}

// 32 floats as integers. False where they have no unit.
OFFMOE_INLINE bool round_piece(const float* x, int16_t* out, float* unit) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) most = _mm256_max_epi32(most, _mm256_and_si256(load<__m256i>(x + 8 * i), magnitude));
    const I32x8 lanes = bits<I32x8>(most);
    int32_t largest = 0;
    for (int i = 0; i < 8; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    const uint32_t exponent = static_cast<uint32_t>(largest) >> 23;
    if (largest != 0 && (exponent < kLeastExponent || exponent > kMostExponent)) return false;
    *unit = largest == 0 ? 0.0f : bits<float>((exponent - 14) << 23);
    const __m256 inverse = _mm256_set1_ps(largest == 0 ? 0.0f : bits<float>((268 - exponent) << 23));
    for (int i = 0; i < 4; i += 2) {
        const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(load<__m256>(x + 8 * i), inverse));
        const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(load<__m256>(x + 8 * i + 8), inverse));
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        std::memcpy(out + 8 * i, &both, sizeof both);
    }
    return true;
}

inline float sum_of(const int16_t* numbers, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += numbers[i];
    return static_cast<float>(sum);
}

// False where some piece has no unit.
inline bool round_row16(const Matrix& matrix, const float* x, uint8_t* prepared) {
    const Int16Row row(matrix);
    int16_t* out = reinterpret_cast<int16_t*>(prepared + kFormBytes);
    float* floats = reinterpret_cast<float*>(prepared + row.floats_at);
    uint8_t column_at[2 * kPiece];
    for (int64_t at = 0; at < 2 * kPiece; ++at) column_at[at] = static_cast<uint8_t>(int16_column(matrix.kind, at));
    const float zero = int16_zero(matrix);
    const int64_t halves = in_halves(matrix.kind) ? 2 : 1, width = kPiece / halves;
    for (int64_t piece = 0; piece < row.chunks * kChunkPieces; piece += 2, out += 2 * kPiece) {
        alignas(32) int16_t both[2 * kPiece];
        for (int64_t i = 0; i < 2; ++i) {
            const int64_t begin = (piece + i) * kPiece, left = matrix.columns - begin;
            float unit, last[kPiece] = {};
            const float* from = x + begin;
            if (left < kPiece) {
                if (left > 0) std::memcpy(last, from, left * sizeof(float));
                from = last;
            }
            if (!round_piece(from, both + kPiece * i, &unit)) return false;
            for (int64_t half = 0; half < halves; ++half) {
                const int64_t at = (piece + i) % kChunkPieces * halves + half, place = unit_place(matrix.kind, at);
                floats[place] = unit * int16_factor(matrix.kind, piece + i);
                floats[place + sum_behind(matrix.kind)] = sum_of(both + kPiece * i + width * half, width) * unit * zero;
            }
        }
        for (int64_t at = 0; at < 2 * kPiece; ++at) out[at] = both[column_at[at]];
        if ((piece + 2) % kChunkPieces == 0) floats += chunk_floats(matrix.kind);
    }
    return true;
}

}  // namespace
}  // namespace offmoe
