// Size and place of every struct of abi.h and of its fields: ../structs.py is compared with them when the library is
// loaded. A field that is missing here is one that Python may not have either.
#include <cstddef>

#include "abi.h"

namespace {

struct Place {
    const char* name;
    int64_t offset, size;
};

#define SIZE(type) {#type, 0, sizeof(offmoe::type)}
#define FIELD(type, field) {#type "." #field, offsetof(offmoe::type, field), sizeof(offmoe::type::field)}

const Place kPlaces[] = {
    SIZE(Matrix), FIELD(Matrix, codes), FIELD(Matrix, scales), FIELD(Matrix, zeros), FIELD(Matrix, rows),
    FIELD(Matrix, columns), FIELD(Matrix, row_bytes), FIELD(Matrix, scale_row_bytes), FIELD(Matrix, zero_row_bytes),
    FIELD(Matrix, kind), FIELD(Matrix, scale_type), FIELD(Matrix, group), FIELD(Matrix, group_rows),
    FIELD(Matrix, zero), FIELD(Matrix, code_signed), FIELD(Matrix, zeros_packed), FIELD(Matrix, transposed),
    SIZE(Activation), FIELD(Activation, curve), FIELD(Activation, gated), FIELD(Activation, interleaved),
    FIELD(Activation, alpha), FIELD(Activation, gate_limit), FIELD(Activation, up_limit), FIELD(Activation, offset),
    SIZE(Expert), FIELD(Expert, up), FIELD(Expert, down), FIELD(Expert, up_bias), FIELD(Expert, down_bias),
    FIELD(Expert, num_up), FIELD(Expert, num_down),
    SIZE(Encode), FIELD(Encode, values), FIELD(Encode, codes), FIELD(Encode, scales), FIELD(Encode, divisors),
    FIELD(Encode, num_groups), FIELD(Encode, num_divisors), FIELD(Encode, group), FIELD(Encode, bits_a_code),
    FIELD(Encode, offset), FIELD(Encode, value_type), FIELD(Encode, scale_type), FIELD(Encode, is_finite),
    SIZE(Pack), FIELD(Pack, values), FIELD(Pack, codes), FIELD(Pack, heads), FIELD(Pack, escapes),
    FIELD(Pack, num_escapes), FIELD(Pack, rows), FIELD(Pack, columns), FIELD(Pack, row_bytes), FIELD(Pack, most_escapes),
    SIZE(Unpack), FIELD(Unpack, matrix), FIELD(Unpack, to), FIELD(Unpack, begin), FIELD(Unpack, end),
    FIELD(Unpack, to_row_bytes),
    SIZE(Call), FIELD(Call, activation), FIELD(Call, experts), FIELD(Call, begin), FIELD(Call, token),
    FIELD(Call, choice), FIELD(Call, x), FIELD(Call, y), FIELD(Call, weights), FIELD(Call, total),
    FIELD(Call, x_row_bytes), FIELD(Call, y_row_bytes), FIELD(Call, total_row_bytes), FIELD(Call, num_experts),
    FIELD(Call, num_tokens), FIELD(Call, top_k), FIELD(Call, type), FIELD(Call, x_type), FIELD(Call, weights_type),
    FIELD(Call, total_type), FIELD(Call, width), FIELD(Call, hidden),
    SIZE(Linear), FIELD(Linear, matrix), FIELD(Linear, bias), FIELD(Linear, x), FIELD(Linear, y),
    FIELD(Linear, x_row_bytes), FIELD(Linear, y_row_bytes), FIELD(Linear, num_x), FIELD(Linear, type),
    FIELD(Linear, x_type),
    SIZE(Norm), FIELD(Norm, x), FIELD(Norm, weight), FIELD(Norm, bias), FIELD(Norm, y), FIELD(Norm, rows), FIELD(Norm, width),
    FIELD(Norm, eps), FIELD(Norm, kind), FIELD(Norm, type),
    SIZE(Attend), FIELD(Attend, query), FIELD(Attend, key), FIELD(Attend, value), FIELD(Attend, query_norm),
    FIELD(Attend, key_norm), FIELD(Attend, cos), FIELD(Attend, sin), FIELD(Attend, sinks), FIELD(Attend, keys),
    FIELD(Attend, values), FIELD(Attend, output), FIELD(Attend, num_heads), FIELD(Attend, num_groups),
    FIELD(Attend, width), FIELD(Attend, value_width), FIELD(Attend, norm_width), FIELD(Attend, rotary),
    FIELD(Attend, num_angles), FIELD(Attend, key_group_bytes), FIELD(Attend, key_row_bytes),
    FIELD(Attend, value_group_bytes), FIELD(Attend, value_row_bytes), FIELD(Attend, num_rows), FIELD(Attend, eps),
    FIELD(Attend, scale), FIELD(Attend, norm_kind), FIELD(Attend, type), FIELD(Attend, angle_type),
    FIELD(Attend, neighbours), FIELD(Attend, norm_last), FIELD(Attend, cap),
    SIZE(Latent), FIELD(Latent, query), FIELD(Latent, compressed), FIELD(Latent, norm), FIELD(Latent, cos),
    FIELD(Latent, sin), FIELD(Latent, keys), FIELD(Latent, values), FIELD(Latent, cache), FIELD(Latent, output),
    FIELD(Latent, num_heads), FIELD(Latent, key_width), FIELD(Latent, rotated), FIELD(Latent, latent),
    FIELD(Latent, value_width), FIELD(Latent, row_bytes), FIELD(Latent, num_rows), FIELD(Latent, eps),
    FIELD(Latent, scale), FIELD(Latent, norm_kind), FIELD(Latent, rotation), FIELD(Latent, type),
    SIZE(Route), FIELD(Route, correction), FIELD(Route, expert_scale), FIELD(Route, ids), FIELD(Route, weights), FIELD(Route, scale),
    FIELD(Route, added), FIELD(Route, hidden_score), FIELD(Route, jitter), FIELD(Route, scoring), FIELD(Route, num_experts),
    FIELD(Route, top_k), FIELD(Route, num_groups), FIELD(Route, top_groups), FIELD(Route, best_of_group),
    FIELD(Route, normalised), FIELD(Route, sorted), FIELD(Route, logits_type), FIELD(Route, weights_type),
    FIELD(Route, rounded),
    SIZE(Layer), FIELD(Layer, attend), FIELD(Layer, x), FIELD(Layer, input_norm), FIELD(Layer, output_norm),
    FIELD(Layer, projections), FIELD(Layer, biases), FIELD(Layer, state), FIELD(Layer, normed), FIELD(Layer, router),
    FIELD(Layer, router_bias), FIELD(Layer, route), FIELD(Layer, width), FIELD(Layer, input_eps),
    FIELD(Layer, output_eps), FIELD(Layer, input_kind), FIELD(Layer, output_kind),
    SIZE(Lookup), FIELD(Lookup, experts), FIELD(Lookup, ids), FIELD(Lookup, table), FIELD(Lookup, chosen),
    SIZE(Choice), FIELD(Choice, route), FIELD(Choice, logits), FIELD(Choice, scores),
    SIZE(Copy), FIELD(Copy, x), FIELD(Copy, to), FIELD(Copy, rows), FIELD(Copy, row_bytes), FIELD(Copy, x_stride),
    SIZE(Delta), FIELD(Delta, query), FIELD(Delta, key), FIELD(Delta, value), FIELD(Delta, gate), FIELD(Delta, beta),
    FIELD(Delta, decay), FIELD(Delta, conv), FIELD(Delta, conv_state), FIELD(Delta, state), FIELD(Delta, rate),
    FIELD(Delta, decay_bias), FIELD(Delta, norm), FIELD(Delta, output), FIELD(Delta, query_stride),
    FIELD(Delta, key_stride), FIELD(Delta, value_stride), FIELD(Delta, gate_stride), FIELD(Delta, beta_stride),
    FIELD(Delta, decay_stride), FIELD(Delta, num_keys), FIELD(Delta, num_values), FIELD(Delta, key_width),
    FIELD(Delta, value_width), FIELD(Delta, taps), FIELD(Delta, eps), FIELD(Delta, type),
    SIZE(ShortConv), FIELD(ShortConv, input), FIELD(ShortConv, conv), FIELD(ShortConv, bias), FIELD(ShortConv, state),
    FIELD(ShortConv, output), FIELD(ShortConv, channels), FIELD(ShortConv, taps), FIELD(ShortConv, type),
    SIZE(Mamba), FIELD(Mamba, input), FIELD(Mamba, conv), FIELD(Mamba, conv_bias), FIELD(Mamba, conv_state),
    FIELD(Mamba, state), FIELD(Mamba, rate), FIELD(Mamba, time_bias), FIELD(Mamba, skip), FIELD(Mamba, norm),
    FIELD(Mamba, output), FIELD(Mamba, num_heads), FIELD(Mamba, num_groups), FIELD(Mamba, width), FIELD(Mamba, size),
    FIELD(Mamba, taps), FIELD(Mamba, eps), FIELD(Mamba, type),
    SIZE(Activate), FIELD(Activate, activation), FIELD(Activate, gate), FIELD(Activate, up), FIELD(Activate, to),
    FIELD(Activate, count), FIELD(Activate, type),
    SIZE(Numbers), FIELD(Numbers, x), FIELD(Numbers, y), FIELD(Numbers, to), FIELD(Numbers, count),
    FIELD(Numbers, y_count), FIELD(Numbers, scale), FIELD(Numbers, what), FIELD(Numbers, type),
    SIZE(Op), FIELD(Op, call), FIELD(Op, num_rows), FIELD(Op, ended_ns), FIELD(Op, kind),
    SIZE(Program), FIELD(Program, ops), FIELD(Program, begin), FIELD(Program, end),
};

}  // namespace

extern "C" {

// The name of the idx-th struct ("Matrix") or field ("Matrix.codes") and where it lies, in bytes; null after the last.
const char* offmoe_layout(int32_t idx, int64_t* offset, int64_t* size) {
    const int32_t count = static_cast<int32_t>(sizeof kPlaces / sizeof *kPlaces);
    if (idx < 0 || idx >= count) return nullptr;
    *offset = kPlaces[idx].offset;
    *size = kPlaces[idx].size;
    return kPlaces[idx].name;
}

}  // extern "C"
