// Curves of one number, as several kinds of step have them.
#pragma once
#include <cmath>

namespace offmoe {

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

// x itself above 20, as torch has it.
inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

}  // namespace offmoe
