// Numbers of any type as floats, and back.
#pragma once
#include <cstdint>

namespace offmoe {

void read_row(int32_t type, const void* from, int64_t count, float* to);
void round_row(int32_t type, float* values, int64_t count);
void write_row(int32_t type, const float* from, int64_t count, void* to);

}  // namespace offmoe
