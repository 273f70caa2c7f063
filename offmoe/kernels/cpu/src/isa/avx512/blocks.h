// GGUF's blocks x bfloat16 for AVX-512.
//
// A step is one block of 256 columns or two blocks of 32. Each 64 columns of it are a part: two vectors of 32 bfloat16
// numbers, in whatever order is cheap, so that lane j of their products' 16 sums holds columns that share a scale.
#pragma once
#include "isa/avx512/coded.h"

namespace offmoe {
namespace {

// bfloat16 of the codes 0 to 31, of which `value` knows the lowest bits that it looks at.
template <class Value>
inline __m512i table_of_32(Value value) {
    alignas(64) uint16_t values[32];
    for (int code = 0; code < 32; ++code)
        values[code] = static_cast<uint16_t>(bits<uint32_t>(static_cast<float>(value(code))) >> 16);
    return load_512(values);
}

inline __m512 two_halves(const uint8_t* first, const uint8_t* second) {
    const __m256i low = _mm256_set1_epi16(load<int16_t>(first));
    return _mm512_cvtph_ps(_mm256_mask_set1_epi16(low, 0xff00, load<int16_t>(second)));
}

// Two blocks of 32 columns. Lanes 0 to 7 are the first one's.
template <int32_t KIND>
struct Pair {
    static constexpr int64_t kColumns = 64, kBytes = 2 * block_bytes(KIND);
    static constexpr int kParts = 1;
    static constexpr bool kMinima = false;

    static OFFMOE_INLINE __m512 scales(const uint8_t* step) {
        const uint8_t* second = step + block_bytes(KIND);
        if constexpr (KIND != MXFP4_BLOCKS) return two_halves(step, second);
        return _mm512_insertf32x8(_mm512_set1_ps(half_of_power(step[0])), _mm256_set1_ps(half_of_power(second[0])), 1);
    }

    OFFMOE_INLINE __m512 spread(int, __m512 scales) const { return scales; }
};

struct PairQ8 : Pair<Q8_0>, ByteTables {
    static constexpr int64_t kColumns = Pair::kColumns;

    explicit PairQ8() : ByteTables([](int code) { return static_cast<float>(code); }) {}

    OFFMOE_INLINE void unpack(const uint8_t* step, int, __m512i* w) const {
        const __m256i* first = reinterpret_cast<const __m256i*>(step + 2);
        const __m256i* second = reinterpret_cast<const __m256i*>(step + 36);
        const __m512i number =
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(first)), _mm256_loadu_si256(second), 1);
        signed_bytes(number, w);
    }
};

// A byte holds columns i and 16 + i.
template <int32_t KIND>
struct PairNibbles : Pair<KIND> {
    PairNibbles() : table(table_of_32([](int code) { return value_of(code & 15); })) {}

    static float value_of(int code) {
        if (KIND == Q4_0) return static_cast<float>(code - 8);
        if (is_iq4(KIND)) return kIq4[code];
        U32x16 nibble = {};
        nibble[0] = static_cast<uint32_t>(code);
        return 2.0f * e2m1(nibble)[0];
    }

    OFFMOE_INLINE void unpack(const uint8_t* step, int, __m512i* w) const {
        constexpr int64_t at = KIND == MXFP4_BLOCKS ? 1 : 2;
        const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(step + at));
        const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(step + block_bytes(KIND) + at));
        const __m512i word = _mm512_cvtepu8_epi16(_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1));
        w[0] = _mm512_permutexvar_epi16(word, table);
        w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), table);
    }

    static int64_t column_at(int64_t at) { return at / 64 * 64 + at % 32 / 16 * 32 + at % 64 / 32 * 16 + at % 16; }

    __m512i table;
};

// Eight groups of 32 columns with scale and minimum. 64 bytes hold four of them, parts 2 h and 2 h + 1: of each byte
// the first has the low nibble, the second the high one. Word e of a part's vector v is byte 2 e + v.
template <int32_t KIND>
struct GroupsOf32 {
    static constexpr int64_t kColumns = 256, kBytes = block_bytes(KIND);
    static constexpr int kParts = 4;
    static constexpr bool kMinima = true;

    GroupsOf32() : table(table_of_32([](int code) { return KIND == Q4_K ? code & 15 : code; })) {
        for (int part = 0; part < kParts; ++part) {
            alignas(64) int32_t group_of_lane[kLanes];
            alignas(64) uint16_t bit_of_word[32];
            for (int lane = 0; lane < kLanes; ++lane) group_of_lane[lane] = group_at(part, 2 * lane);
            for (int word = 0; word < 32; ++word) bit_of_word[word] = static_cast<uint16_t>(group_at(part, word));
            lanes[part] = load_512(group_of_lane);
            shifts[part] = load_512(bit_of_word);
        }
    }

    static int group_at(int part, int word) { return part / 2 * 4 + word / 16 * 2 + part % 2; }

    // Lanes 0 to 7 scales, 8 to 15 minima.
    static OFFMOE_INLINE __m512 scales(const uint8_t* block) {
        uint32_t packed[4];
        six_bits(block + 4, packed);
        const __m128i bytes = _mm_set_epi32(static_cast<int>(packed[3]), static_cast<int>(packed[2]),
                                            static_cast<int>(packed[1]), static_cast<int>(packed[0]));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), two_halves(block, block + 2));
    }

    OFFMOE_INLINE __m512 spread(int part, __m512 scales) const { return _mm512_permutexvar_ps(lanes[part], scales); }

    OFFMOE_INLINE void unpack(const uint8_t* block, int part, __m512i* w) const {
        const __m512i code = load_512(block + (KIND == Q5_K ? 48 : 16) + part / 2 * 64);
        const __m512i word = part % 2 ? _mm512_srli_epi16(code, 4) : code;
        w[0] = word;
        w[1] = _mm512_srli_epi16(word, 8);
        if constexpr (KIND == Q5_K) {
            const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 16));
            const __m512i high = _mm512_srlv_epi16(_mm512_broadcast_i64x4(low), shifts[part]);
            w[0] = with_fifth(w[0], _mm512_slli_epi16(high, 4));
            w[1] = with_fifth(w[1], _mm512_srli_epi16(_mm512_srlv_epi16(_mm512_broadcast_i64x4(low), shifts[part]), 4));
        }
        w[0] = _mm512_permutexvar_epi16(w[0], table);
        w[1] = _mm512_permutexvar_epi16(w[1], table);
    }

    static OFFMOE_INLINE __m512i with_fifth(__m512i nibble, __m512i high) {  // of `high` bit 4, of `nibble` the rest
        return _mm512_ternarylogic_epi32(nibble, high, _mm512_set1_epi16(16), 0xd8);
    }

    static int64_t column_at(int64_t at) {
        const int64_t word = at % 32, part = at % 256 / 64, byte = 2 * word + at % 64 / 32;
        return at / 256 * 256 + 32 * group_at(static_cast<int>(part), static_cast<int>(word)) + byte % 32;
    }

    __m512i table, lanes[kParts], shifts[kParts];
};

// Eight groups of 32 columns with scales alone: a part is two of them, as a pair of IQ4_NL's blocks has them.
struct GroupsOfIq4 : PairNibbles<IQ4_NL> {
    static constexpr int64_t kColumns = 256, kBytes = block_bytes(IQ4_XS);
    static constexpr int kParts = 4;

    GroupsOfIq4() {
        for (int part = 0; part < kParts; ++part) {
            alignas(64) int32_t group_of_lane[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) group_of_lane[lane] = 2 * part + lane / 8;
            lanes[part] = load_512(group_of_lane);
        }
    }

    // In lanes 0 to 7.
    static OFFMOE_INLINE __m512 scales(const uint8_t* block) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(iq4_scales(block))));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(bytes, _mm512_set1_epi32(32))), two_halves(block, block));
    }

    OFFMOE_INLINE __m512 spread(int part, __m512 scales) const { return _mm512_permutexvar_ps(lanes[part], scales); }

    OFFMOE_INLINE void unpack(const uint8_t* block, int part, __m512i* w) const {
        const __m512i word = _mm512_cvtepu8_epi16(load<__m256i>(block + 8 + 32 * part));
        w[0] = _mm512_permutexvar_epi16(word, table);
        w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), table);
    }

    __m512i lanes[kParts];
};

// Sixteen groups of 16 columns. A part is 64 bytes of six bits: parts 2 h and 2 h + 1 share their 64 bytes of nibbles.
struct GroupsOf16 : ByteTables {
    static constexpr int64_t kColumns = 256, kBytes = block_bytes(Q6_K);
    static constexpr int kParts = 4;
    static constexpr bool kMinima = false;

    GroupsOf16() : ByteTables([](int code) { return static_cast<float>(code % 64 - 32); }) {
        alignas(64) int32_t group_of_lane[kLanes];
        for (int part = 0; part < kParts; ++part) {
            for (int lane = 0; lane < kLanes; ++lane) group_of_lane[lane] = 4 * part + lane / 4;
            lanes[part] = load_512(group_of_lane);
        }
    }

    static OFFMOE_INLINE __m512 scales(const uint8_t* block) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 192));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), two_halves(block + 208, block + 208));
    }

    OFFMOE_INLINE __m512 spread(int part, __m512 scales) const { return _mm512_permutexvar_ps(lanes[part], scales); }

    OFFMOE_INLINE void unpack(const uint8_t* block, int part, __m512i* w) const {
        const __m512i codes = load_512(block + part / 2 * 64);
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 128 + part / 2 * 32));
        const __m512i low = part % 2 ? _mm512_srli_epi16(codes, 4) : codes;
        const __m256i first = part % 2 ? pairs : _mm256_slli_epi16(pairs, 4);
        const __m256i second = part % 2 ? _mm256_srli_epi16(pairs, 2) : _mm256_slli_epi16(pairs, 2);
        const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        // Of `low` four bits, of `high` the next two; the look-up takes no more than these six.
        const __m512i code = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(15), 0xe4);
        const __m512i low_byte = _mm512_permutexvar_epi8(code, lows[0]);
        const __m512i high_byte = _mm512_permutexvar_epi8(code, highs[0]);
        w[0] = _mm512_unpacklo_epi8(low_byte, high_byte);
        w[1] = _mm512_unpackhi_epi8(low_byte, high_byte);
    }

    __m512i lanes[kParts];
};

template <class Format>
struct Blocks {
    static constexpr int kRowsForOne = 2;
    static constexpr int kRowsForFew = 2;
    static constexpr int64_t kStep = Format::kColumns > kChunk ? Format::kColumns : kChunk;

    explicit Blocks(const Matrix& matrix) : matrix(matrix), sums_at(2 * padded(matrix.columns)) {}

    void start(int64_t row, int, bool) { codes_of_first = matrix.codes + row * matrix.row_bytes; }

    // Adds columns [first, last) of rows [r, r + R) of those that were started; `sums`: T a row. `first` is a multiple of
    // the step's columns.
    template <int R, int T>
    void block(int r, const void* const* x, int64_t first, int64_t last, __m512* sums_of_rows) const {
        const uint8_t* codes[R];
        const uint8_t* xs[T];
        __m512 sums[R][T];
        begin_block(codes_of_first + r * matrix.row_bytes, matrix.row_bytes, x, sums_of_rows, codes, xs, sums);
        const Format here = format;  // in registers
        const int64_t ahead = ahead_bytes(matrix, R, T);
        int64_t column = first, at = first / Format::kColumns * Format::kBytes;
        for (; column + Format::kColumns <= last; column += Format::kColumns, at += Format::kBytes) {
            const uint8_t* steps[R];
            OFFMOE_UNROLL
            for (int i = 0; i < R; ++i) {
                steps[i] = codes[i] + at;
                for (int64_t line = 0; line < Format::kBytes; line += 64) {
                    if constexpr (!in_blocks(T)) prefetch_far(steps[i] + line + kFarBytes);
                    prefetch(steps[i] + line + ahead);
                }
            }
            add<R, T>(here, sums, steps, xs, column);
        }
        if (column < last) {  // one block of two
            uint8_t rest[R][Format::kBytes] = {};
            const uint8_t* steps[R];
            for (int i = 0; i < R; ++i)
                steps[i] = static_cast<uint8_t*>(std::memcpy(rest[i], codes[i] + at, Format::kBytes / 2));
            add<R, T>(here, sums, steps, xs, column);
        }
        end_block(sums, sums_of_rows);
    }

private:
    template <int R, int T>
    OFFMOE_INLINE void add(const Format& here, __m512 (&sums)[R][T], const uint8_t* const* steps, const uint8_t* const* x,
                    int64_t column) const {
        __m512 scales[R];
        OFFMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            scales[r] = Format::scales(steps[r]);
            if constexpr (Format::kMinima) {
                OFFMOE_UNROLL
                for (int t = 0; t < T; ++t)
                    sums[r][t] = _mm512_fnmadd_ps(scales[r], load_floats(x[t] + sums_at + column / Format::kColumns * 64), sums[r][t]);
            }
        }
        OFFMOE_UNROLL
        for (int part = 0; part < Format::kParts; ++part) {
            __m512i w[R][2];
            __m512 scale[R];
            OFFMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                here.unpack(steps[r], part, w[r]);
                scale[r] = here.spread(part, scales[r]);
            }
            OFFMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const __m512i first = load_512(x[t] + 2 * column + 128 * part);
                const __m512i second = load_512(x[t] + 2 * column + 128 * part + 64);
                OFFMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    const __m512 products = dot(dot(_mm512_setzero_ps(), w[r][0], first), w[r][1], second);
                    sums[r][t] = _mm512_fmadd_ps(products, scale[r], sums[r][t]);
                }
            }
        }
    }

    const Matrix& matrix;
    const Format format;
    const int64_t sums_at;
    const uint8_t* codes_of_first = nullptr;
};

}  // namespace
}  // namespace offmoe
