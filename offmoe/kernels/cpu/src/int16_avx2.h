// Rows of codes x activations rounded to 16-bit integers, for AVX2: `vpmaddwd` multiplies sixteen pairs exactly.
//
// 32 activations share a unit, a power of two of which the largest of them is at least 2^14 and less than 2^15. Rounded to
// whole units, each is off by at most half a unit, which is at most 2^-15 of that largest one; a bfloat16 number is
// exact unless it is below 2^-7 of it, a float16 number unless it is below 2^-4. Codes times these integers are added up
// in 32 bits without a further error; one product with the unit and the weights' scale a group makes a float of them.
//
// A row whose numbers are infinite or NaN, or in which some group's largest one is not zero and outside 2^-64 to 2^65, is
// kept in floats and multiplied as coded.h does. That depends on the row alone.
#pragma once
#include "coded_avx2.h"

namespace offmoe {
namespace {

// Eight pieces of 32 columns; rows are filled up with zeros to whole ones.
constexpr int64_t kChunkPieces = 8, kChunkColumns = kChunkPieces * kPiece;

// Integers are multiplied with codes of at most 8 bits.
constexpr bool is_int16_kind(int32_t kind) { return !is_dense(kind) && kind != FP8; }

// Nibbles that lie in the order of 16-bit words: a vector has parts of two pieces, each in one half of its lanes.
constexpr bool is_paired(int32_t kind) { return is_nibbles(kind) && kind != Q4_K; }
constexpr bool is_tabled(int32_t kind) { return kind == MXFP4 || kind == MXFP4_BLOCKS || is_iq4(kind); }
constexpr bool in_halves(int32_t kind) { return kind == Q6_K; }  // with a scale for 16 columns

inline bool in_int16(const Matrix& matrix, int32_t type) {
    return type != F32 && is_int16_kind(matrix.kind) && takes_codes(matrix);
}

constexpr bool has_minima(int32_t kind) { return kind == Q4_K || kind == Q5_K; }

// Floats of a chunk: units, and the sums that zero points and minima are multiplied with.
constexpr int64_t chunk_floats(int32_t kind) { return in_halves(kind) ? 32 : 16; }

// Where the unit of a piece (or half) lies among them, in the order in which its scales come, and how far behind it the sum.
constexpr int64_t unit_place(int32_t kind, int64_t at) {
    if (has_minima(kind)) return at % 4 + at / 4 * 8;
    return in_halves(kind) ? at / 8 * 8 + at % 2 * 4 + at % 8 / 2 : at;
}
constexpr int64_t sum_behind(int32_t kind) { return has_minima(kind) ? 4 : chunk_floats(kind) / 2; }

// A prepared row: whether it is in floats, which then follow; else its integers, and the floats of its chunks.
struct Int16Row {
    static constexpr int64_t kHeader = 64;

    explicit Int16Row(const Matrix& matrix)
        : chunks((num_pieces(matrix) + kChunkPieces - 1) / kChunkPieces), floats_at(kHeader + 2 * chunks * kChunkColumns),
          num_bytes(floats_at + 4 * chunks * chunk_floats(matrix.kind)) {}

    static bool is_floats(const void* prepared) { return load<int32_t>(prepared) != 0; }

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
    if (largest != 0 && (exponent < 127 - 64 || exponent > 127 + 64)) return false;
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
    int16_t* out = reinterpret_cast<int16_t*>(prepared + Int16Row::kHeader);
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

// 64 codes of pieces 2 * pair and 2 * pair + 1, in the order of `int16_column`: not negative where `int16_zero` or zero
// points are taken away, and times what `int16_factor` says.
template <int32_t KIND>
OFFMOE_INLINE void unpack_64(const uint8_t* from, int pair, uint8_t flip, __m256i* w) {
    const __m256i nibble = _mm256_set1_epi16(15), low_nibbles = _mm256_set1_epi8(15), low_bytes = _mm256_set1_epi16(255);
    if constexpr (is_paired(KIND)) {
        __m256i all;
        if constexpr (KIND == INT4 || KIND == MXFP4) {
            all = load<__m256i>(from + 32 * pair);
        } else if constexpr (KIND == IQ4_XS) {
            all = load<__m256i>(from + 8 + 32 * pair);
        } else {
            constexpr int64_t size = block_bytes(KIND);
            const uint8_t* codes = from + 2 * pair * size + size - 16;
            all = _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(codes)), load<__m128i>(codes + size), 1);
        }
        if constexpr (is_tabled(KIND)) {
            const __m256i table = is_iq4(KIND) ? Avx2Vectors::twice(reinterpret_cast<const uint8_t*>(kIq4))
                                               : Avx2Vectors::twice(reinterpret_cast<const uint8_t*>(kE2m1Twice));
            const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(all, low_nibbles));
            const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(all, 4), low_nibbles));
            w[0] = _mm256_slli_epi16(low, 8);
            w[1] = _mm256_slli_epi16(high, 8);
            if constexpr (is_iq4(KIND)) {
                w[0] = _mm256_srai_epi16(w[0], 8);
                w[1] = _mm256_srai_epi16(w[1], 8);
                w[2] = _mm256_srai_epi16(low, 8);
                w[3] = _mm256_srai_epi16(high, 8);
            } else {  // 256 times as large
                w[2] = _mm256_andnot_si256(low_bytes, low);
                w[3] = _mm256_andnot_si256(low_bytes, high);
            }
        } else {
            w[0] = _mm256_and_si256(all, nibble);
            w[1] = _mm256_and_si256(_mm256_srli_epi16(all, 4), nibble);
            w[2] = _mm256_and_si256(_mm256_srli_epi16(all, 8), nibble);
            w[3] = _mm256_srli_epi16(all, 12);
        }
    } else if constexpr (KIND == Q4_K) {
        const __m256i all = load<__m256i>(from + 16 + 32 * pair), above = _mm256_srli_epi16(all, 8);
        w[0] = _mm256_and_si256(all, nibble);
        w[1] = _mm256_and_si256(above, nibble);
        w[2] = _mm256_and_si256(all, _mm256_set1_epi16(0xf0));  // sixteen times as large
        w[3] = _mm256_and_si256(above, _mm256_set1_epi16(0xf0));
    } else {
        OFFMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int part = 2 * pair + i;
            __m256i bytes;
            if constexpr (KIND == INT8 || KIND == Q8_0) {
                bytes = load<__m256i>(KIND == INT8 ? from + 32 * part : from + part * block_bytes(Q8_0) + 2);
                if constexpr (KIND == INT8) bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(flip)));
                w[2 * i] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
                w[2 * i + 1] = _mm256_srai_epi16(bytes, 8);
                continue;
            }
            if constexpr (KIND == Q5_K) {
                const __m256i low = load<__m256i>(from + 48 + 32 * pair), high = load<__m256i>(from + 16);
                const __m256i fifth = part < 4 ? _mm256_slli_epi16(high, 4 - part) : _mm256_srli_epi16(high, part - 4);
                bytes = _mm256_and_si256(i == 0 ? low : _mm256_srli_epi16(low, 4), low_nibbles);
                bytes = _mm256_or_si256(bytes, _mm256_and_si256(fifth, _mm256_set1_epi8(0x10)));
            } else {
                const int quarter = part % 4;
                const __m256i low = load<__m256i>(from + 64 * (part / 4) + 32 * i), high = load<__m256i>(from + 128 + 32 * (part / 4));
                const __m256i upper = quarter < 2 ? _mm256_slli_epi16(high, 4 - 2 * quarter) : _mm256_srli_epi16(high, 2 * quarter - 4);
                bytes = _mm256_and_si256(quarter < 2 ? low : _mm256_srli_epi16(low, 4), low_nibbles);
                bytes = _mm256_or_si256(bytes, _mm256_and_si256(upper, _mm256_set1_epi8(0x30)));
            }
            w[2 * i] = _mm256_and_si256(bytes, low_bytes);
            w[2 * i + 1] = _mm256_srli_epi16(bytes, 8);
        }
    }
}

// One scale in each half of the lanes: of `ordered`, the pair-th of both halves.
OFFMOE_INLINE __m256 pair_of(__m256 ordered, int pair) {
    switch (pair) {
        case 0: return _mm256_permute_ps(ordered, 0x00);
        case 1: return _mm256_permute_ps(ordered, 0x55);
        case 2: return _mm256_permute_ps(ordered, 0xaa);
        default: return _mm256_permute_ps(ordered, 0xff);
    }
}

// Even ones in the lower half, odd ones in the upper, for `pair_of`.
OFFMOE_INLINE __m256 in_order(__m256 scales) {
    return _mm256_permutevar8x32_ps(scales, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

// T rows of x and what they come to with one row of weights, 256 columns after 256 columns.
template <int32_t KIND, int T>
struct Int16Sums {
    Int16Sums(const Int16Row& row, const void* const* x) {
        for (int t = 0; t < T; ++t) {
            numbers[t] = static_cast<const uint8_t*>(x[t]) + Int16Row::kHeader;
            floats[t] = static_cast<const uint8_t*>(x[t]) + row.floats_at;
        }
    }

    // Codes whose scales are `scales`, and what is taken away for zero points `less`.
    OFFMOE_INLINE void add(const uint8_t* codes, uint8_t flip, const float* scales, const float* less) {
        const __m256 of_codes = _mm256_loadu_ps(scales);
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            const __m256 some = _mm256_mul_ps(of_codes, load<__m256>(floats[t]));
            if constexpr (is_paired(KIND)) ordered[t][0] = in_order(some);
            else _mm256_store_ps(stored[t], some);
            if (less != nullptr) taken[t] = _mm256_fmadd_ps(_mm256_loadu_ps(less), load<__m256>(floats[t] + 32), taken[t]);
        }
        multiply(codes, flip);
    }

    // A block of Q4_K or Q5_K: four scales and four minima, twice.
    OFFMOE_INLINE void add_with_minima(const uint8_t* block) {
        const uint64_t both = load<uint64_t>(block + 4), third = load<uint32_t>(block + 12);
        const uint64_t first = both & 0x3f3f3f3f3f3f3f3fu;
        const uint64_t second = ((third | third << 28) & 0x0f0f0f0f0f0f0f0fu) | (both >> 2 & 0x3030303030303030u);
        const __m128i halves = _mm_set1_epi32(load<int32_t>(block));
        const __m256 unit = _mm256_permutevar_ps(_mm256_cvtph_ps(halves), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
        const __m256 scale[2] = {_mm256_mul_ps(eight_floats(first), unit), _mm256_mul_ps(eight_floats(second), unit)};
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            OFFMOE_UNROLL
            for (int i = 0; i < 2; ++i) {
                const __m256 some = _mm256_mul_ps(scale[i], load<__m256>(floats[t] + 32 * i));
                _mm256_store_ps(stored[t] + 8 * i, some);
                taken[t] = _mm256_add_ps(taken[t], some);  // its upper half counts
            }
        }
        multiply(block, 0);
    }

    // A block of Q6_K: sixteen scales.
    OFFMOE_INLINE void add_halves(const uint8_t* block) {
        const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        const __m128i scales = _mm_shuffle_epi8(load<__m128i>(block + 192), order);
        const __m256 unit = _mm256_set1_ps(f16_at(block + 208));
        const __m256 scale[2] = {
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales)), unit),
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(scales, 8))), unit)};
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            OFFMOE_UNROLL
            for (int i = 0; i < 2; ++i) {
                ordered[t][i] = _mm256_mul_ps(scale[i], load<__m256>(floats[t] + 32 * i));
                taken[t] = _mm256_fmadd_ps(scale[i], load<__m256>(floats[t] + 64 + 32 * i), taken[t]);
            }
        }
        multiply(block, 0);
    }

    inline void store(float* out, int64_t stride) const {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            __m256 less = taken[t];
            if constexpr (has_minima(KIND)) less = _mm256_blend_ps(less, _mm256_setzero_ps(), 15);
            out[t * stride] = Avx2Vectors::total(_mm256_sub_ps(_mm256_add_ps(sums[0][t], sums[1][t]), less));
        }
    }

private:
    // 256 columns, whose scales times units are in `ordered` or `stored`; on to the next.
    OFFMOE_INLINE void multiply(const uint8_t* codes, uint8_t flip) {
        OFFMOE_UNROLL
        for (int pair = 0; pair < 4; ++pair) {
            __m256i w[4];
            unpack_64<KIND>(codes, pair, flip, w);
            OFFMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const uint8_t* from = numbers[t] + 128 * pair;
                const __m256i first = _mm256_add_epi32(product(w[0], from), product(w[1], from + 32));
                const __m256i second = _mm256_add_epi32(product(w[2], from + 64), product(w[3], from + 96));
                if constexpr (is_paired(KIND)) {
                    add_to(sums[pair % 2][t], _mm256_add_epi32(first, second), pair_of(ordered[t][0], pair));
                } else if constexpr (in_halves(KIND)) {
                    add_to(sums[0][t], first, pair_of(ordered[t][pair / 2], pair % 2 * 2));
                    add_to(sums[1][t], second, pair_of(ordered[t][pair / 2], pair % 2 * 2 + 1));
                } else {
                    const int at = has_minima(KIND) ? 2 * pair + pair / 2 * 4 : 2 * pair;
                    add_to(sums[0][t], first, _mm256_set1_ps(stored[t][at]));
                    add_to(sums[1][t], second, _mm256_set1_ps(stored[t][at + 1]));
                }
            }
        }
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            numbers[t] += 2 * kChunkColumns;
            floats[t] += 4 * chunk_floats(KIND);
        }
    }

    static OFFMOE_INLINE __m256 eight_floats(uint64_t bytes) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes))));
    }

    static OFFMOE_INLINE __m256i product(__m256i w, const uint8_t* from) { return _mm256_madd_epi16(w, load<__m256i>(from)); }

    static OFFMOE_INLINE void add_to(__m256& sum, __m256i products, __m256 scale) {
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scale, sum);
    }

    const uint8_t *numbers[T], *floats[T];
    __m256 sums[2][T] = {}, taken[T] = {};
    __m256 ordered[T][2];
    alignas(32) float stored[T][16];
};

template <int32_t KIND, int T>
void int16_blocks(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr bool kSmall = block_columns(KIND) == kPiece;
    constexpr int64_t kBytes = block_bytes(KIND) * (kSmall ? kChunkPieces : 1);
    Int16Sums<KIND, T> sums(Int16Row(matrix), x);
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    const int64_t whole = matrix.columns / kChunkColumns, rest = matrix.columns % kChunkColumns / kPiece;
    const auto add = [&](const uint8_t* codes) {
        if constexpr (has_minima(KIND)) return sums.add_with_minima(codes);
        else if constexpr (in_halves(KIND)) return sums.add_halves(codes);
        else {
            const BlockScales<KIND> scales(codes, kChunkPieces);
            sums.add(codes, 0, scales.scale, KIND == Q4_0 ? scales.scale : nullptr);
        }
    };
    for (const uint8_t* end = from + whole * kBytes; from < end; from += kBytes) {
        OFFMOE_UNROLL
        for (int64_t line = 0; line < kBytes; line += 64) prefetch_codes<KIND>(from + line);
        add(from);
    }
    if (kSmall && rest != 0) {
        alignas(32) uint8_t last[kBytes] = {};
        add(static_cast<uint8_t*>(std::memcpy(last, from, rest * block_bytes(KIND))));
    }
    sums.store(out, stride);
}

template <int32_t KIND, bool LESS, int T>
void int16_groups(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
    constexpr int64_t kBytes = KIND == INT8 ? kChunkColumns : kChunkColumns / 2;
    const uint8_t flip = matrix.code_signed ? 0 : 128;
    const int64_t count = num_pieces(matrix);
    const uint8_t* from = matrix.codes + row * matrix.row_bytes;
    const uint8_t* end = from + row_code_bytes(matrix);
    Int16Sums<KIND, T> sums(Int16Row(matrix), x);
    PieceScales scales(matrix, row);
    if constexpr (T == 1) scales.prefetch(row + kRowsAhead);
    for (int64_t first = 0; first < count; first += PieceScales::kAtOnce) {
        const int64_t some = count - first < PieceScales::kAtOnce ? count - first : PieceScales::kAtOnce;
        scales.template load_from<LESS>(first, some, KIND == INT4 ? 0 : flip);
        const auto add = [&](const uint8_t* codes, int64_t at) {
            sums.add(codes, flip, scales.scale + at, LESS ? scales.less + at : KIND == INT4 ? scales.scale + at : nullptr);
        };
        int64_t at = 0;
        for (; at < some && end - from >= kBytes; at += kChunkPieces, from += kBytes) {
            OFFMOE_UNROLL
            for (int64_t line = 0; line < kBytes; line += 64) prefetch_codes<KIND>(from + line);
            add(from, at);
        }
        if (at >= some) continue;
        alignas(32) uint8_t last[kBytes] = {};
        add(static_cast<uint8_t*>(std::memcpy(last, from, end - from)), at);
    }
    sums.store(out, stride);
}

template <int32_t KIND, bool LESS, int T>
void int16_rows(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, float* out, int64_t stride) {
    for (int64_t row = begin; row < end; ++row, ++out) {
        if constexpr (is_blocks(KIND)) int16_blocks<KIND, T>(matrix, row, x, out, stride);
        else int16_groups<KIND, LESS, T>(matrix, row, x, out, stride);
    }
}

template <int32_t KIND, bool LESS>
void int16_kind(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                int64_t stride) {
    for (; begin < end; begin += 8, out += 8) {  // a second pass finds the rows in the cache
        const int64_t stop = begin + 8 < end ? begin + 8 : end;
        int32_t t = 0;
        for (; t + 4 <= num_x; t += 4) int16_rows<KIND, LESS, 4>(matrix, begin, stop, x + t, out + t * stride, stride);
        for (; t < num_x; ++t) int16_rows<KIND, LESS, 1>(matrix, begin, stop, x + t, out + t * stride, stride);
    }
}

// Rows of x that are all in integers.
inline void int16_products(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x,
                           float* out, int64_t stride) {
    const bool zeros = matrix.zeros != nullptr;
    switch (matrix.kind) {
        case INT8:
            if (zeros || matrix.zero != (matrix.code_signed ? 0 : 128))
                return int16_kind<INT8, true>(matrix, begin, end, x, num_x, out, stride);
            return int16_kind<INT8, false>(matrix, begin, end, x, num_x, out, stride);
        case INT4:
            if (zeros) return int16_kind<INT4, true>(matrix, begin, end, x, num_x, out, stride);
            return int16_kind<INT4, false>(matrix, begin, end, x, num_x, out, stride);
        case MXFP4: return int16_kind<MXFP4, false>(matrix, begin, end, x, num_x, out, stride);
        case Q4_0: return int16_kind<Q4_0, false>(matrix, begin, end, x, num_x, out, stride);
        case Q8_0: return int16_kind<Q8_0, false>(matrix, begin, end, x, num_x, out, stride);
        case Q4_K: return int16_kind<Q4_K, false>(matrix, begin, end, x, num_x, out, stride);
        case Q5_K: return int16_kind<Q5_K, false>(matrix, begin, end, x, num_x, out, stride);
        case Q6_K: return int16_kind<Q6_K, false>(matrix, begin, end, x, num_x, out, stride);
        case IQ4_NL: return int16_kind<IQ4_NL, false>(matrix, begin, end, x, num_x, out, stride);
        case IQ4_XS: return int16_kind<IQ4_XS, false>(matrix, begin, end, x, num_x, out, stride);
        default: return int16_kind<MXFP4_BLOCKS, false>(matrix, begin, end, x, num_x, out, stride);
    }
}

}  // namespace
}  // namespace offmoe
