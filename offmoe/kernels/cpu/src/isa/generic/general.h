// What coded.h does not take, multiplied in float32: dense weights that are stored the other way round, and codes in groups
// of any size, of which 128 columns are unpacked at a time and then multiplied with every x.
#pragma once
#include "isa/generic/blocks.h"
#include "isa/isa.h"

namespace offmoe {
namespace {

inline bool in_nibbles(const Matrix& matrix) { return matrix.kind == INT4 || matrix.kind == MXFP4; }

constexpr int64_t code_bits(int32_t kind) {
    switch (kind) {
        case DENSE_F32: return 32;
        case DENSE_BF16: case DENSE_F16: return 16;
        case PACKED: return 12;
        case INT8: case FP8: return 8;
        default: return 4;
    }
}

inline int64_t row_code_bytes(const Matrix& matrix) {
    if (!is_blocks(matrix.kind)) return (matrix.columns * code_bits(matrix.kind) + 7) / 8;
    return matrix.columns / block_columns(matrix.kind) * block_bytes(matrix.kind);
}

inline float scale_at(const Matrix& matrix, const uint8_t* scales, int64_t group) {
    switch (matrix.scale_type) {
        case F32: return load<float>(scales + 4 * group);
        case BF16: return bits<float>(uint32_t{load<uint16_t>(scales + 2 * group)} << 16);
        case F16: return f16_at(scales + 2 * group);
        default: return scales[group] ? bits<float>(uint32_t{scales[group]} << 23) : 0x1p-127f;
    }
}

inline const uint8_t* scales_of(const Matrix& matrix, int64_t row) {
    // A division costs a row dearly, and GCC makes one of `== 1`.
    const int64_t scale_row = matrix.group_rows <= 1 ? row : row / matrix.group_rows;
    return matrix.scales + scale_row * matrix.scale_row_bytes;
}

// The stored code that means nothing: subtracted from every code of the group.
inline int32_t zero_at(const Matrix& matrix, int64_t row, int64_t group) {
    if (matrix.zeros == nullptr) return matrix.zero;
    const int64_t per_word = 32 / code_bits(matrix.kind);
    if (!matrix.zeros_packed) {
        const uint8_t code = matrix.zeros[row * matrix.zero_row_bytes + group];
        return matrix.code_signed ? static_cast<int8_t>(code) : code;
    }
    const uint32_t word = load<uint32_t>(matrix.zeros + row / per_word * matrix.zero_row_bytes + 4 * group);
    return (word >> (row % per_word * code_bits(matrix.kind))) & ((1u << code_bits(matrix.kind)) - 1u);
}

// Scale and zero of the eight columns of each lane (nibbles) or of sixteen neighbours (bytes, all lanes alike).
inline void group_lanes(const Matrix& matrix, int64_t row, int64_t column, int64_t step, F32x16& scale, F32x16& zero) {
    const uint8_t* scales = scales_of(matrix, row);
    float scale_lanes[kLanes], zero_lanes[kLanes];
    int64_t known = -1;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        int64_t group = (column + lane * step) / matrix.group;
        if (column + lane * step >= matrix.columns) group = known;
        if (group != known || lane == 0) {
            scale_lanes[lane] = scale_at(matrix, scales, group);
            zero_lanes[lane] = static_cast<float>(zero_at(matrix, row, group));
        } else {
            scale_lanes[lane] = scale_lanes[lane - 1];
            zero_lanes[lane] = zero_lanes[lane - 1];
        }
        known = group;
    }
    scale = load<F32x16>(scale_lanes);
    zero = load<F32x16>(zero_lanes);
}

// 128 columns of a row from `column` on; `codes` has that many, whatever the row has.
template <int32_t KIND>
inline void unpack(const Matrix& matrix, int64_t row, int64_t column, const uint8_t* codes, F32x16* out) {
    F32x16 scale, zero;
    if constexpr (KIND == INT4 || KIND == MXFP4) group_lanes(matrix, row, column, 8, scale, zero);
    OFFMOE_UNROLL
    for (int64_t i = 0; i < kVectors; ++i) {
        if constexpr (KIND == INT4 || KIND == MXFP4) {
            const U32x16 nibble = (load<U32x16>(codes) >> static_cast<uint32_t>(4 * i)) & 15u;
            const F32x16 value = KIND == MXFP4 ? e2m1(nibble) : __builtin_convertvector(bits<I32x16>(nibble), F32x16) - zero;
            out[i] = value * scale;
        }
        if constexpr (KIND == INT8 || KIND == FP8) {
            if (column + kLanes * i >= matrix.columns) {
                out[i] = F32x16{};
                continue;
            }
            const int64_t group = (column + kLanes * i) / matrix.group;
            const F32x16 group_scale = splat(scale_at(matrix, scales_of(matrix, row), group));
            if constexpr (KIND == FP8) {
                out[i] = from_fp8(load<U8x16>(codes + kLanes * i)) * group_scale;
            } else {
                const I32x16 code = matrix.code_signed
                    ? __builtin_convertvector(load<I8x16>(codes + kLanes * i), I32x16)
                    : __builtin_convertvector(load<U8x16>(codes + kLanes * i), I32x16);
                out[i] = __builtin_convertvector(code - zero_at(matrix, row, group), F32x16) * group_scale;
            }
        }
    }
}

template <int32_t KIND, int T>
void multiply_rows(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, float* out, int64_t stride) {
    const int64_t whole = matrix.columns / kChunk;
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* codes = matrix.codes + row * matrix.row_bytes;
        F32x16 sums[T][2] = {};
        F32x16 w[kVectors];
        alignas(64) uint8_t last[kChunk * 4];
        for (int64_t chunk = 0; chunk * kChunk < matrix.columns; ++chunk) {
            const uint8_t* from = codes + chunk * kChunk * code_bits(KIND) / 8;
            if (chunk == whole) {
                std::memset(last, 0, sizeof last);
                std::memcpy(last, from, row_code_bytes(matrix) - (from - codes));
                from = last;
            }
            __builtin_prefetch(from + 2048);
            unpack<KIND>(matrix, row, chunk * kChunk, from, w);
            OFFMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const float* xs = static_cast<const float*>(x[t]) + chunk * kChunk;
                OFFMOE_UNROLL
                for (int64_t i = 0; i < kVectors; ++i) sums[t][i & 1] += w[i] * load<F32x16>(xs + kLanes * i);
            }
        }
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) out[t * stride + row - begin] = sum(sums[t][0] + sums[t][1]);
    }
}

// Outputs that a pass over a matrix stored the other way round takes at once, and columns fetched ahead of it. No
// processor foresees steps as long as its rows: 16 outputs at a time were read at 7 GB/s, at 4 from files that do not
// begin with a cache line.
constexpr int64_t kBeside = 128, kColumnsAhead = 12;

// `V` vectors of neighbouring outputs, which lie side by side. Each output adds its columns in their order.
template <int32_t KIND, int T, int V>
inline void multiply_beside(const Matrix& matrix, int64_t row, int64_t count, const void* const* x, float* out,
                            int64_t stride) {
    constexpr int64_t size = KIND == DENSE_F32 ? 4 : 2;
    F32x16 sums[T][V] = {};
    for (int64_t column = 0; column < matrix.columns; ++column) {
        const uint8_t* from = matrix.codes + column * matrix.row_bytes + row * size;
        const uint8_t* ahead = from + kColumnsAhead * matrix.row_bytes;
        OFFMOE_UNROLL
        for (int64_t at = 0; at < V * kLanes * size; at += 64) __builtin_prefetch(ahead + at);
        uint8_t last[64] = {};
        if (count < V * kLanes) from = static_cast<uint8_t*>(std::memcpy(last, from, count * size));
        OFFMOE_UNROLL
        for (int64_t v = 0; v < V; ++v) {
            F32x16 w;
            if constexpr (KIND == DENSE_F32) w = load<F32x16>(from + 64 * v);
            if constexpr (KIND == DENSE_BF16) w = from_bf16(load<U16x16>(from + 32 * v));
            if constexpr (KIND == DENSE_F16) w = from_f16(load<U16x16>(from + 32 * v));
            OFFMOE_UNROLL
            for (int t = 0; t < T; ++t) sums[t][v] += w * static_cast<const float*>(x[t])[column];
        }
    }
    OFFMOE_UNROLL
    for (int t = 0; t < T; ++t)
        for (int64_t lane = 0; lane < count; ++lane) out[t * stride + lane] = sums[t][lane / kLanes][lane % kLanes];
}

template <int32_t KIND, int T>
void multiply_transposed(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, float* out,
                         int64_t stride) {
    constexpr int V = kBeside / kLanes / (T == 1 ? 1 : 4);
    int64_t row = begin;
    for (; row + V * kLanes <= end; row += V * kLanes) {
        multiply_beside<KIND, T, V>(matrix, row, V * kLanes, x, out + row - begin, stride);
    }
    for (; row < end; row += kLanes) {
        multiply_beside<KIND, T, 1>(matrix, row, end - row < kLanes ? end - row : kLanes, x, out + row - begin, stride);
    }
}

template <int32_t KIND, int T>
inline void multiply_part(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, float* out,
                          int64_t stride) {
    if constexpr (KIND <= DENSE_F16) multiply_transposed<KIND, T>(matrix, begin, end, x, out, stride);
    else multiply_rows<KIND, T>(matrix, begin, end, x, out, stride);
}

template <int32_t KIND>
void multiply_kind(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                   int64_t stride) {
    for (; num_x >= 4; num_x -= 4, x += 4, out += 4 * stride) multiply_part<KIND, 4>(matrix, begin, end, x, out, stride);
    if (num_x == 3) multiply_part<KIND, 3>(matrix, begin, end, x, out, stride);
    if (num_x == 2) multiply_part<KIND, 2>(matrix, begin, end, x, out, stride);
    if (num_x == 1) multiply_part<KIND, 1>(matrix, begin, end, x, out, stride);
}

inline void general_multiply(const Matrix& matrix, int32_t, int64_t begin, int64_t end, const void* const* x,
                             int32_t num_x, float* out, int64_t stride) {
    // Few rows at a time, so that a second pass finds them in the cache.
    const int64_t step = matrix.transposed ? kBeside : 8;
    for (; begin < end; begin += step, out += step) {
        const int64_t stop = begin + step < end ? begin + step : end;
        switch (matrix.kind) {
            case DENSE_F32: multiply_kind<DENSE_F32>(matrix, begin, stop, x, num_x, out, stride); break;
            case DENSE_BF16: multiply_kind<DENSE_BF16>(matrix, begin, stop, x, num_x, out, stride); break;
            case DENSE_F16: multiply_kind<DENSE_F16>(matrix, begin, stop, x, num_x, out, stride); break;
            case INT8: multiply_kind<INT8>(matrix, begin, stop, x, num_x, out, stride); break;
            case INT4: multiply_kind<INT4>(matrix, begin, stop, x, num_x, out, stride); break;
            case MXFP4: multiply_kind<MXFP4>(matrix, begin, stop, x, num_x, out, stride); break;
            case FP8: multiply_kind<FP8>(matrix, begin, stop, x, num_x, out, stride); break;
            default: break;
        }
    }
}

inline int64_t padded(int64_t columns) { return (columns + kChunk - 1) / kChunk * kChunk; }

inline int64_t general_prepared_bytes(const Matrix& matrix, int32_t) { return 4 * padded(matrix.columns); }

// Floats, zeros after the last; for nibbles, the i-th of sixteen vectors' lane j is column 8 j + i.
inline void general_prepare(const Matrix& matrix, int32_t, const float* x, void* prepared) {
    float* out = static_cast<float*>(prepared);
    const int64_t columns = matrix.columns, all = padded(columns);
    if (!in_nibbles(matrix)) {
        std::memcpy(out, x, columns * sizeof(float));
        std::memset(out + columns, 0, (all - columns) * sizeof(float));
        return;
    }
    for (int64_t chunk = 0; chunk < all; chunk += kChunk)
        for (int64_t i = 0; i < kVectors; ++i)
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                const int64_t column = chunk + 8 * lane + i;
                out[chunk + kLanes * i + lane] = column < columns ? x[column] : 0.0f;
            }
}

}  // namespace
}  // namespace offmoe
