// Inputs for the kernels, made at random: every buffer is as long as it is said to be and not a byte longer, so that
// AddressSanitizer sees each read and write beside it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "abi.h"
#include "isa/isa.h"

namespace made {

using namespace offmoe;

inline int64_t bytes_of(int32_t type) { return type == F32 ? 4 : 2; }

// The same numbers in every run.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    uint32_t next() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return static_cast<uint32_t>(state_ >> 32);
    }

    int64_t below(int64_t count) { return next() % count; }
    float number() { return (static_cast<float>(next() & 0xffffffu) - 8388608.0f) / 8388608.0f; }  // -1 to 1

private:
    uint64_t state_;
};

// Memory that begins `skew` bytes behind an aligned address, as tensors in files do, and ends where it ends.
class Buffer {
public:
    explicit Buffer(int64_t num_bytes, int64_t skew = 0)
        : whole_(static_cast<uint8_t*>(std::malloc(static_cast<size_t>(num_bytes + skew)))), num_bytes_(num_bytes), skew_(skew) {}
    Buffer(Buffer&& other) noexcept : whole_(other.whole_), num_bytes_(other.num_bytes_), skew_(other.skew_) { other.whole_ = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(whole_); }

    uint8_t* at() const { return whole_ + skew_; }
    int64_t size() const { return num_bytes_; }

private:
    uint8_t* whole_;
    int64_t num_bytes_, skew_;
};

inline Buffer random_bytes(Random& random, int64_t count, int64_t skew = 0) {
    Buffer made(count, skew);
    for (int64_t i = 0; i < count; ++i) made.at()[i] = static_cast<uint8_t>(random.next());
    return made;
}

inline void put_number(int32_t type, float value, uint8_t* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == F32) {
        std::memcpy(to, &bits, 4);
        return;
    }
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const bool tiny = magnitude < (113u << 23);  // of float16
    const uint16_t half = static_cast<uint16_t>(type == BF16 ? bits >> 16 : sign | (tiny ? 0 : (magnitude - (112u << 23)) >> 13));
    std::memcpy(to, &half, 2);
}

inline double number_at(int32_t type, const uint8_t* from) {
    uint32_t bits = 0;
    std::memcpy(&bits, from, static_cast<size_t>(bytes_of(type)));
    if (type == BF16) bits <<= 16;
    if (type == F16) {
        const double magnitude = (bits & 0x7c00u) == 0x7c00u ? (bits & 0x3ffu ? NAN : INFINITY)
                               : bits & 0x7c00u ? std::ldexp(1024.0 + (bits & 0x3ffu), static_cast<int>(bits >> 10 & 31) - 25) : std::ldexp(bits & 0x3ffu, -24);
        return bits & 0x8000u ? -magnitude : magnitude;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline Buffer random_numbers(Random& random, int32_t type, int64_t count, float scale = 1.0f) {
    Buffer made(count * bytes_of(type));
    for (int64_t i = 0; i < count; ++i) put_number(type, random.number() * scale, made.at() + i * bytes_of(type));
    return made;
}

// A way to store weights. `multiple`: of which the columns are one. Of blocks: their bytes, and where a block has scales in
// float16, -1 for none; all else in a block may be any byte.
struct Format {
    const char* name;
    int32_t kind;
    int64_t multiple;
    int64_t block_bytes;
    int64_t half_at, second_half_at;
};

// One line a kind. A kind that the library gains is added here.
constexpr Format kFormats[] = {
    {"f32", DENSE_F32, 1, 0, -1, -1},
    {"bf16", DENSE_BF16, 1, 0, -1, -1},
    {"f16", DENSE_F16, 1, 0, -1, -1},
    {"int8", INT8, 4, 0, -1, -1},
    {"int4", INT4, 8, 0, -1, -1},
    {"mxfp4", MXFP4, 32, 0, -1, -1},
    {"fp8", FP8, 1, 0, -1, -1},
    {"q4_0", Q4_0, 32, 18, 0, -1},
    {"q8_0", Q8_0, 32, 34, 0, -1},
    {"q4_k", Q4_K, 256, 144, 0, 2},
    {"q5_k", Q5_K, 256, 176, 0, 2},
    {"q6_k", Q6_K, 256, 210, 208, -1},
    {"mxfp4_gguf", MXFP4_BLOCKS, 32, 17, -1, -1},
    {"iq4_nl", IQ4_NL, 32, 18, 0, -1},
    {"iq4_xs", IQ4_XS, 256, 136, 0, -1},
    {"packed", PACKED, 1, 0, -1, -1},
};

inline bool is_dense(const Format& format) { return format.kind <= DENSE_F16; }

// What a matrix of codes may have besides its kind.
struct Variant {
    int64_t group = 0;  // columns of a scale; 0: the whole row
    int32_t scale_type = BF16;
    int32_t zeros = 0;  // 0: none, 1: a byte each, 2: packed in words
    int32_t group_rows = 1;
    bool is_signed = false, transposed = false;
    int64_t skew = 0;
};

class Weights {
public:
    Weights(Random& random, const Format& format, const Variant& variant, int64_t rows, int64_t columns) {
        matrix.rows = rows;
        matrix.columns = columns;
        matrix.kind = format.kind;
        matrix.group_rows = 1;
        matrix.group = static_cast<int32_t>(columns);
        if (is_dense(format)) dense(random, variant);
        else if (format.block_bytes) blocks(random, format, variant);
        else if (format.kind == PACKED) packed(random, variant);
        else codes(random, variant);
    }

    Matrix matrix = {};

private:
    const uint8_t* keep(Buffer&& buffer) {
        kept_.push_back(std::move(buffer));
        return kept_.back().at();
    }

    void dense(Random& random, const Variant& variant) {
        const int32_t type = matrix.kind == DENSE_F32 ? F32 : matrix.kind == DENSE_BF16 ? BF16 : F16;
        const int64_t size = bytes_of(type);
        Buffer numbers = random_numbers(random, type, matrix.rows * matrix.columns);
        Buffer moved(numbers.size(), variant.skew);
        std::memcpy(moved.at(), numbers.at(), static_cast<size_t>(numbers.size()));
        matrix.codes = keep(std::move(moved));
        matrix.transposed = variant.transposed && matrix.columns > 1;
        matrix.row_bytes = (matrix.transposed ? matrix.rows : matrix.columns) * size;
    }

    void blocks(Random& random, const Format& format, const Variant& variant) {
        matrix.row_bytes = matrix.columns / format.multiple * format.block_bytes;
        Buffer made = random_bytes(random, matrix.rows * matrix.row_bytes, variant.skew);
        for (int64_t at = 0; at < made.size(); at += format.block_bytes) {
            for (int64_t half : {format.half_at, format.second_half_at})
                if (half >= 0) put_number(F16, random.number(), made.at() + at + half);
            if (format.half_at < 0) made.at()[at] = static_cast<uint8_t>(120 + random.below(8));  // an exponent
        }
        matrix.codes = keep(std::move(made));
    }

    // Numbers of many sizes, and zeros: with escapes in most rows.
    void packed(Random& random, const Variant& variant) {
        const int64_t count = matrix.rows * matrix.columns;
        Buffer numbers = random_numbers(random, BF16, count);
        for (int64_t i = 0; i < count; ++i) {
            if (random.below(40) == 0) put_number(BF16, std::ldexp(random.number(), static_cast<int>(random.below(60)) - 30), numbers.at() + 2 * i);
            if (random.below(50) == 0) put_number(BF16, 0.0f, numbers.at() + 2 * i);
        }
        matrix.row_bytes = (matrix.columns + 31) / 32 * 48;
        Buffer made(matrix.rows * matrix.row_bytes, variant.skew), heads(8 * matrix.rows), all(4 * count);
        uint32_t num_escapes = 0;
        const Pack call = {numbers.at(), made.at(), heads.at(), reinterpret_cast<uint32_t*>(all.at()), &num_escapes, matrix.rows, matrix.columns, matrix.row_bytes, count};
        kPortable.pack(call);
        Buffer escapes(4 * int64_t{num_escapes});
        std::memcpy(escapes.at(), all.at(), static_cast<size_t>(escapes.size()));
        matrix.codes = keep(std::move(made));
        matrix.scales = keep(std::move(heads));
        matrix.scale_row_bytes = 8;
        matrix.zeros = keep(std::move(escapes));
    }

    void codes(Random& random, const Variant& variant) {
        const int64_t bits = matrix.kind == INT8 || matrix.kind == FP8 ? 8 : 4;
        const int64_t group = variant.group ? variant.group : matrix.columns, groups = (matrix.columns + group - 1) / group;
        const int64_t scale_bytes = variant.scale_type == E8M0 ? 1 : bytes_of(variant.scale_type);
        const int64_t scale_rows = (matrix.rows + variant.group_rows - 1) / variant.group_rows;
        matrix.row_bytes = matrix.columns * bits / 8;
        Buffer made = random_bytes(random, matrix.rows * matrix.row_bytes, variant.skew);
        if (matrix.kind == FP8)
            for (int64_t i = 0; i < made.size(); ++i)
                if ((made.at()[i] & 0x7f) == 0x7f) made.at()[i] = 0;  // no NaN: bits are compared
        matrix.codes = keep(std::move(made));
        matrix.group = static_cast<int32_t>(group);
        matrix.group_rows = variant.group_rows;
        matrix.scale_type = variant.scale_type;
        matrix.scale_row_bytes = groups * scale_bytes;
        if (variant.scale_type == E8M0) {
            Buffer scales(scale_rows * groups, variant.skew);
            for (int64_t i = 0; i < scales.size(); ++i) scales.at()[i] = static_cast<uint8_t>(120 + random.below(8));
            matrix.scales = keep(std::move(scales));
        } else {
            matrix.scales = keep(random_numbers(random, variant.scale_type, scale_rows * groups));
        }
        matrix.code_signed = variant.is_signed;
        matrix.zero = matrix.kind == MXFP4 || matrix.kind == FP8 || variant.is_signed ? 0 : bits == 4 ? 8 : 128;
        if (variant.zeros == 0) return;
        const int64_t per_word = 32 / bits;
        matrix.zeros_packed = variant.zeros == 2;
        matrix.zero_row_bytes = groups * (variant.zeros == 2 ? 4 : 1);
        const int64_t zero_rows = variant.zeros == 2 ? (matrix.rows + per_word - 1) / per_word : matrix.rows;
        matrix.zeros = keep(random_bytes(random, zero_rows * matrix.zero_row_bytes));
    }

    std::vector<Buffer> kept_;
};

// The variants that a kind occurs in.
inline std::vector<Variant> variants_of(const Format& format) {
    std::vector<Variant> found;
    for (int64_t skew : {0, 1}) {
        Variant variant;
        variant.skew = skew;
        if (is_dense(format)) {
            found.push_back(variant);
            variant.transposed = true;
            found.push_back(variant);
        } else if (format.block_bytes || format.kind == PACKED) {
            found.push_back(variant);
        } else {
            for (int64_t group : {0, 32, 64, 128})
                for (int32_t scale_type : {F32, BF16, F16}) {
                    variant.group = format.kind == MXFP4 ? 32 : group;
                    variant.scale_type = format.kind == MXFP4 ? E8M0 : scale_type;
                    variant.group_rows = format.kind == FP8 && group == 64 ? 16 : 1;
                    const bool integer = format.kind == INT8 || format.kind == INT4;
                    for (int32_t zeros = 0; zeros <= (integer ? 2 : 0); ++zeros) {
                        variant.zeros = zeros;
                        variant.is_signed = format.kind == INT8 && zeros != 2 && group != 32;
                        if (format.kind == INT4 && zeros == 1) continue;  // nibbles come with packed zeros alone
                        found.push_back(variant);
                    }
                    if (format.kind == MXFP4) break;
                }
        }
    }
    return found;
}

}  // namespace made
