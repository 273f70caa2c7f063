// Integer weights x int8 activations for AVX-512 VNNI: `vpdpbusd` adds four products of unsigned with signed bytes to
// each of 16 integers, so a lane holds neighbouring columns that share both scales.
//
// A prepared row is made of chunks, one for 64 bytes of weights: the codes of x in the order in which those are unpacked,
// what the products start from (less the zero point times the codes' sum, lane by lane), and the scale of every lane.
// Where zero points differ from group to group the sums themselves lie there, and are multiplied as floats: exactly.
#pragma once
#include "groups_avx512.h"
#include "int8.h"

namespace offmoe {
namespace {

inline __m512i dot_bytes(__m512i sums, __m512i weights, __m512i x) { return _mm512_dpbusd_epi32(sums, weights, x); }

// int4, and e2m1 by a table: 128 columns, those with even numbers first.
template <bool E2M1>
struct NibbleBytes {
    static constexpr int kVectors = 2;
    static constexpr int64_t kColumns = 128, kLaneColumns = 8;

    explicit NibbleBytes(const Matrix&)
        : table(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kE2m1)))) {}

    inline void unpack(__m512i code, __m512i* w) const {
        const __m512i fifteen = _mm512_set1_epi8(15);
        w[0] = _mm512_and_si512(code, fifteen);
        w[1] = _mm512_and_si512(_mm512_srli_epi16(code, 4), fifteen);
        if constexpr (E2M1) {
            w[0] = _mm512_shuffle_epi8(table, w[0]);
            w[1] = _mm512_shuffle_epi8(table, w[1]);
        }
    }

    static int64_t zero_bias(const Matrix&) { return 0; }
    static int32_t zero(const Matrix& matrix) { return E2M1 ? 12 : matrix.zero; }

    __m512i table;
};

// int8: 64 columns. Signed bytes get 128 added.
struct PlainBytes {
    static constexpr int kVectors = 1;
    static constexpr int64_t kColumns = 64, kLaneColumns = 4;

    explicit PlainBytes(const Matrix& matrix) : flip(_mm512_set1_epi8(static_cast<char>(matrix.code_signed ? 0x80 : 0))) {}

    inline void unpack(__m512i code, __m512i* w) const { w[0] = _mm512_xor_si512(code, flip); }

    static int64_t zero_bias(const Matrix& matrix) { return matrix.code_signed ? -128 : 0; }
    static int32_t zero(const Matrix& matrix) { return matrix.code_signed ? 128 : matrix.zero; }

    __m512i flip;
};

template <class Unpacker>
constexpr int64_t chunk_bytes() { return 64 * (Unpacker::kVectors + 2); }

// The rest of the groups, of other sizes, is left to the code for any processor.
inline bool takes_vnni(const Matrix& matrix) {
    if (!takes_int8(matrix) || num_groups(matrix) > kMostGroups) return false;
    const int64_t columns = matrix.kind == INT8 ? PlainBytes::kColumns : NibbleBytes<false>::kColumns;
    return matrix.group >= matrix.columns || matrix.group % columns == 0 || matrix.group == 32 || matrix.group == 64;
}

// 16 numbers times `steps`, to nearest even, as bytes.
inline __m128i round_lanes(__m512 x, __m512 steps) {
    const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: rounds the exact product to an integer
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_sub_ps(_mm512_fmadd_ps(x, steps, magic), magic)));
}

// `at`: the chunk whose first column is x's first; `count` columns are left.
template <class Unpacker>
inline void prepare_chunk(const Matrix& matrix, const float* x, int64_t count, uint8_t* at) {
    constexpr int64_t columns = Unpacker::kColumns;
    alignas(64) int8_t codes[columns] = {};
    alignas(64) float scales[kLanes] = {};
    for (int64_t first = 0; first < columns && first < count; first += kXGroup) {
        const __mmask16 low = static_cast<__mmask16>(first_bytes(count - first));
        const __mmask16 high = static_cast<__mmask16>(first_bytes(std::max<int64_t>(count - first - kLanes, 0)));
        const __m512 values[2] = {_mm512_maskz_loadu_ps(low, x + first), _mm512_maskz_loadu_ps(high, x + first + kLanes)};
        const __m512 sizes[2] = {_mm512_abs_ps(values[0]), _mm512_abs_ps(values[1])};
        // Not finite: infinite or NaN.
        const __m512 most = _mm512_set1_ps(0x1.fffffep127f);
        const bool finite = _mm512_cmp_ps_mask(sizes[0], most, _CMP_NLE_UQ) == 0 &&
                            _mm512_cmp_ps_mask(sizes[1], most, _CMP_NLE_UQ) == 0;
        const float largest = finite ? _mm512_reduce_max_ps(_mm512_max_ps(sizes[0], sizes[1])) : NAN;
        float scale = largest / 127.0f;
        if (finite && largest >= kSmallest) {
            const __m512 steps = _mm512_set1_ps(127.0f / largest);
            _mm_store_si128(reinterpret_cast<__m128i*>(codes + first), round_lanes(values[0], steps));
            _mm_store_si128(reinterpret_cast<__m128i*>(codes + first + kLanes), round_lanes(values[1], steps));
        } else if (finite) {
            scale = 0.0f;
        }
        if (matrix.kind == MXFP4) scale *= 0.5f;  // weights are unpacked to twice their values
        for (int64_t lane = first / Unpacker::kLaneColumns; lane < (first + kXGroup) / Unpacker::kLaneColumns; ++lane)
            scales[lane] = scale;
    }
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums = _mm512_setzero_si512();
    if constexpr (Unpacker::kVectors == 2) {
        alignas(64) uint8_t even[64];
        for (int i = 0; i < 64; ++i) even[i] = static_cast<uint8_t>(2 * i);
        const __m512i first = load_512(codes), second = load_512(codes + 64), order = load_512(even);
        const __m512i evens = _mm512_permutex2var_epi8(first, order, second);
        const __m512i odds = _mm512_permutex2var_epi8(first, _mm512_or_si512(order, ones), second);
        _mm512_storeu_si512(at, evens);
        _mm512_storeu_si512(at + 64, odds);
        sums = dot_bytes(dot_bytes(sums, ones, evens), ones, odds);
    } else {
        _mm512_storeu_si512(at, load_512(codes));
        sums = dot_bytes(sums, ones, load_512(codes));
    }
    if (matrix.zeros) sums = _mm512_castps_si512(_mm512_cvtepi32_ps(sums));
    else sums = _mm512_mullo_epi32(sums, _mm512_set1_epi32(-Unpacker::zero(matrix)));
    _mm512_storeu_si512(at + 64 * Unpacker::kVectors, sums);
    _mm512_storeu_ps(at + 64 * (Unpacker::kVectors + 1), _mm512_load_ps(scales));
}

template <class Unpacker>
void prepare_vnni(const Matrix& matrix, const float* x, uint8_t* to) {
    for (int64_t column = 0; column < matrix.columns; column += Unpacker::kColumns, to += chunk_bytes<Unpacker>())
        prepare_chunk<Unpacker>(matrix, x + column, matrix.columns - column, to);
}

// Rows of weights x prepared rows; the loops over both are in level_avx512_int8.cpp.
template <class Unpacker, bool ZEROS>
struct Bytes {
    static constexpr int64_t kColumns = Unpacker::kColumns;

    explicit Bytes(const Matrix& matrix)
        : matrix(matrix), unpacker(matrix), chunks_a_group((matrix.group + kColumns - 1) / kColumns),
          groups_a_chunk(matrix.group < kColumns ? kColumns / matrix.group : 1) {
        alignas(64) int32_t group_of_lane[kLanes];
        alignas(64) int8_t place[4 * kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int group = static_cast<int>(matrix.group >= kColumns ? 0 : lane * Unpacker::kLaneColumns / matrix.group);
            const bool byte = matrix.scale_type == E8M0;
            group_of_lane[lane] = group;
            for (int i = 0; i < 2; ++i) place[4 * lane + i] = -1;  // a zero
            place[4 * lane + 2] = static_cast<int8_t>(byte ? -1 : 2 * group);
            place[4 * lane + 3] = static_cast<int8_t>(byte ? group : 2 * group + 1);
        }
        lanes = load_512(group_of_lane);
        places = load_512(place);
    }

    // `few`: one or two rows of x. Then scales are unpacked with the codes, eight bytes at a time, but for the last rows,
    // where these bytes could lie beside the matrix.
    void start(int64_t row, int count, bool few) {
        codes_of_first = matrix.codes + row * matrix.row_bytes;
        scales_of_first = scales_of(matrix, row);
        const int32_t type = matrix.scale_type;
        const bool inside = (matrix.rows - row - count) * matrix.scale_row_bytes >= 8 && matrix.group_rows == 1;
        stored = few && inside && (type == BF16 || type == E8M0) ? type : F32;
        const int64_t num = num_groups(matrix);
        for (int r = 0; r < count; ++r) {
            if (stored == F32) load_scales(matrix, row + r, num, groups[r]);
            if constexpr (ZEROS) load_zeros(matrix, row + r, num, Unpacker::zero_bias(matrix), groups[r]);
        }
    }

    // Adds columns [first, last) of rows [r, r + R) of those that were started; `kept`: T sums a row.
    template <int R, int T>
    void block(int r, const void* const* x, int64_t first, int64_t last, __m512* kept) const {
        if constexpr (!in_blocks(T)) {
            if (stored == BF16) return columns<R, T, BF16>(r, x, first, last, kept);
            if (stored == E8M0) return columns<R, T, E8M0>(r, x, first, last, kept);
        }
        columns<R, T, F32>(r, x, first, last, kept);
    }

private:
    // SCALES: how they are stored, or F32 where `start` has loaded them.
    template <int R, int T, int SCALES>
    void columns(int r, const void* const* x, int64_t first, int64_t last, __m512* kept) const {
        const uint8_t *codes[R], *scales[R], *xs[T];
        __m512 sums[R][T];
        begin_block(codes_of_first + r * matrix.row_bytes, matrix.row_bytes, x, kept, codes, xs, sums);
        const Unpacker here = unpacker;  // in registers
        const __m512i of_lanes = lanes, of_places = places;
        const int64_t ahead = ahead_bytes(matrix, R, T), chunk_of_first = first / kColumns;
        const int64_t rows_ahead = kFarBytes / matrix.row_bytes + 1;
        OFFMOE_UNROLL
        for (int i = 0; i < R && SCALES != F32; ++i) {
            scales[i] = scales_of_first + (r + i) * matrix.scale_row_bytes;
            const uint8_t* next = scales[i] + rows_ahead * matrix.scale_row_bytes;
            for (int64_t line = 0; line < matrix.scale_row_bytes; line += 64) prefetch_far(next + line);
        }
        int64_t at = chunk_of_first * 64, chunk_at = chunk_of_first * chunk_bytes<Unpacker>();
        int64_t group = first / matrix.group, left = chunks_a_group - chunk_of_first % chunks_a_group;
        for (int64_t column = first; column < last; column += kColumns) {
            const __mmask64 mask = first_bytes(((last - column) * 64 + kColumns - 1) / kColumns);
            __m512i w[R][Unpacker::kVectors];
            __m512 scale[R], zero[R];
            OFFMOE_UNROLL
            for (int i = 0; i < R; ++i) {
                const __m512i code = mask == ~0ull ? load_512(codes[i] + at) : _mm512_maskz_loadu_epi8(mask, codes[i] + at);
                if constexpr (!in_blocks(T)) prefetch_far(codes[i] + at + kFarBytes);
                prefetch(codes[i] + at + ahead);
                here.unpack(code, w[i]);
                if constexpr (SCALES == F32) scale[i] = spread(of_lanes, groups[r + i].scales + group);
                else scale[i] = spread_stored<SCALES>(of_places, scales[i] + group * (SCALES == BF16 ? 2 : 1));
                if constexpr (ZEROS) zero[i] = spread(of_lanes, groups[r + i].zeros + group);
            }
            OFFMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const uint8_t* of_x = xs[t] + chunk_at;
                __m512i part[R];
                const __m512i start = load_512(of_x + 64 * Unpacker::kVectors);
                OFFMOE_UNROLL
                for (int i = 0; i < R; ++i) part[i] = ZEROS ? _mm512_setzero_si512() : start;
                OFFMOE_UNROLL
                for (int v = 0; v < Unpacker::kVectors; ++v) {
                    const __m512i values = load_512(of_x + 64 * v);
                    OFFMOE_UNROLL
                    for (int i = 0; i < R; ++i) part[i] = dot_bytes(part[i], w[i][v], values);
                }
                const __m512 scale_of_x = load_floats(of_x + 64 * (Unpacker::kVectors + 1));
                OFFMOE_UNROLL
                for (int i = 0; i < R; ++i) {
                    __m512 product = _mm512_cvtepi32_ps(part[i]);
                    if constexpr (ZEROS) product = _mm512_fnmadd_ps(zero[i], _mm512_castsi512_ps(start), product);
                    sums[i][t] = _mm512_fmadd_ps(product, _mm512_mul_ps(scale[i], scale_of_x), sums[i][t]);
                }
            }
            at += 64;
            chunk_at += chunk_bytes<Unpacker>();
            if (--left == 0) {
                group += groups_a_chunk;
                left = chunks_a_group;
            }
        }
        end_block(sums, kept);
    }

    // At most four groups in a chunk, each in the lanes of its columns.
    static inline __m512 spread(__m512i lanes, const float* of_groups) {
        return _mm512_permutexvar_ps(lanes, _mm512_broadcast_f32x4(_mm_loadu_ps(of_groups)));
    }

    // The same from where they are stored, eight bytes of them: what `load_scales` makes.
    template <int TYPE>
    static inline __m512 spread_stored(__m512i places, const uint8_t* of_groups) {
        const __m512i found = _mm512_shuffle_epi8(_mm512_set1_epi64(load<int64_t>(of_groups)), places);
        if constexpr (TYPE == BF16) return _mm512_castsi512_ps(found);
        return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_srli_epi32(found, 1), _mm512_set1_epi32(0x00400000)));
    }

    const Matrix& matrix;
    const Unpacker unpacker;
    const int64_t chunks_a_group, groups_a_chunk;
    __m512i lanes, places;
    const uint8_t *codes_of_first = nullptr, *scales_of_first = nullptr;
    int32_t stored = F32;
    RowGroups groups[kBlockRows];
};

}  // namespace
}  // namespace offmoe
