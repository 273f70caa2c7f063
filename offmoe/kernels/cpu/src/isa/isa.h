// One instruction set's arithmetic. A row of x is prepared once (converted, padded, put in the order in which the
// weights are unpacked) and then multiplied with many rows of weights.
#pragma once
#include "abi.h"

namespace offmoe {

// Outputs of one row of weights are added up in the same order whatever T, so no result depends on its neighbours.
struct Isa {
    const char* name;
    // Bytes of a prepared row, a multiple of 64.
    int64_t (*prepared_bytes)(const Matrix& matrix, int32_t type);
    // `x`: as many floats as the matrix has columns, each a value of `type`.
    void (*prepare)(const Matrix& matrix, int32_t type, const float* x, void* prepared);
    // out[t * out_stride + n - begin] = dot(row n, x[t]) for n in [begin, end), not rounded.
    void (*multiply)(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x,
                     int32_t num_x, float* out, int64_t out_stride);
    // out[i] = f(gate[i]) * (up[i] + offset), or f(up[i]); every step rounded to `type` where torch rounds it.
    void (*activate)(const Activation& activation, int32_t type, const float* gate, const float* up, int64_t count,
                     float* out);
    // decode.h: one row's norm, a head's rotation.
    void (*norm_row)(const float* x, const float* weight, int32_t type, int64_t width, float eps, int32_t kind,
                     float* out);
    void (*rotate)(float* head, const float* cos, const float* sin, int64_t rotary, int64_t num_angles, int32_t type);
    // attend.h: the heads that share the keys and values of `group`, and chunk number `chunk` of those. `query`: of all
    // heads, padded; `parts`: of all chunks and heads; `scores`: score_floats.
    void (*attend)(const Attend& attend, int64_t group, int64_t chunk, const float* query, float* parts, float* scores);
    // decode.h: the delta rule on one head's state, (key_width, value_width).
    void (*delta_rule)(float* state, const float* query, const float* key, const float* value, float decay, float beta,
                       int64_t key_width, int64_t value_width, float* out);
    // decode.h: a token's part in one head's state, (width, size).
    void (*mamba_rule)(float* state, const float* value, const float* key, const float* query, float decay, int64_t width,
                       int64_t size, int32_t type, float* out);
    // quantise.h: groups [begin, end); false where one of their numbers is not finite.
    bool (*encode)(const Encode& call, int64_t begin, int64_t end);
    // pack.h: bfloat16 numbers to PACKED ones, and back.
    void (*pack)(const Pack& call);
    void (*unpack)(const Unpack& call, int64_t begin, int64_t end);
};

// All but the first where they were compiled.
extern const Isa kPortable, kAvx2, kAvx512, kNeon, kNeonDot;

// isa/*/quantise.cpp, whose flags are their own.
bool encode_portable(const Encode& call, int64_t begin, int64_t end);
bool encode_avx2(const Encode& call, int64_t begin, int64_t end);
bool encode_avx512(const Encode& call, int64_t begin, int64_t end);
bool encode_neon(const Encode& call, int64_t begin, int64_t end);

// isa/*/packed.cpp.
void pack_portable(const Pack& call);
void pack_avx2(const Pack& call);
void pack_avx512(const Pack& call);
void pack_neon(const Pack& call);
void unpack_portable(const Unpack& call, int64_t begin, int64_t end);
void unpack_avx2(const Unpack& call, int64_t begin, int64_t end);
void unpack_avx512(const Unpack& call, int64_t begin, int64_t end);
void unpack_neon(const Unpack& call, int64_t begin, int64_t end);

}  // namespace offmoe
