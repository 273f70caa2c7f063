// The experts' activations, rounded after the steps after which torch rounds them.
#pragma once
#include "isa/generic/vectors.h"

namespace offmoe {
namespace {

inline F32x16 sigmoid(F32x16 x) { return 1.0f / (1.0f + exponential(-x)); }

inline F32x16 gelu(F32x16 x) {
    float lanes[kLanes];
    std::memcpy(lanes, &x, sizeof lanes);
    for (float& lane : lanes) lane = 0.5f * lane * (1.0f + erff(lane * 0.70710678118654752f));
    return load<F32x16>(lanes);
}

inline F32x16 gelu_tanh(F32x16 x) {
    const F32x16 inner = 0.79788456080286536f * (x + 0.044715f * (x * x * x));
    const F32x16 tanh = 1.0f - 2.0f / (exponential(2.0f * inner) + 1.0f);
    return 0.5f * x * (1.0f + tanh);
}

inline F32x16 curve_of(const Activation& activation, int32_t type, F32x16 x) {
    switch (activation.curve) {
        case SILU: {
            if (activation.alpha == 1.0f) return round_to(type, x / (1.0f + exponential(-x)));
            const F32x16 share = round_to(type, sigmoid(round_to(type, x * activation.alpha)));
            return round_to(type, x * share);
        }
        case GELU: return round_to(type, gelu(x));
        case GELU_TANH: return round_to(type, gelu_tanh(x));
        case RELU: return maximum(x, F32x16{});
        case RELU_SQUARED: {
            const F32x16 positive = maximum(x, F32x16{});
            return round_to(type, positive * positive);
        }
        default: return x;
    }
}

inline F32x16 activate_lanes(const Activation& activation, int32_t type, F32x16 gate, F32x16 up) {
    if (!activation.gated) return curve_of(activation, type, up);
    up = minimum(maximum(up, splat(-activation.up_limit)), splat(activation.up_limit));
    gate = minimum(gate, splat(activation.gate_limit));
    const F32x16 moved = activation.offset == 0.0f ? up : round_to(type, up + activation.offset);
    return round_to(type, curve_of(activation, type, gate) * moved);
}

// Whole vectors always, the last one padded: the same number wherever it stands.
inline void general_activate(const Activation& activation, int32_t type, const float* gate, const float* up,
                             int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t bytes = 4 * (count - i < kLanes ? count - i : kLanes);
        F32x16 gate_lanes = {}, up_lanes = {};
        if (activation.gated) std::memcpy(&gate_lanes, gate + i, bytes);
        std::memcpy(&up_lanes, up + i, bytes);
        const F32x16 value = activate_lanes(activation, type, gate_lanes, up_lanes);
        std::memcpy(out + i, &value, bytes);
    }
}

}  // namespace
}  // namespace offmoe
