#include <cstddef>
#include <new>

#include "isa/generic/vectors.h"
#include "ops/jobs.h"

namespace offmoe {

namespace {

// The C++ library's own: aligned_alloc and posix_memalign are not on every system.
uint8_t* reserved(int64_t num_bytes, size_t border) {
    return static_cast<uint8_t*>(::operator new(static_cast<size_t>(num_bytes), std::align_val_t{border}, std::nothrow));
}
void release(uint8_t* address, size_t border) { ::operator delete(address, std::align_val_t{border}); }

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kBorder = 64;
#else
constexpr size_t kBorder = 4096;
#endif

}  // namespace

Scratch::~Scratch() { release(address_, kBorder); }

uint8_t* Scratch::reserve(int64_t num_bytes) {
#if defined(__SANITIZE_ADDRESS__)  // just as much, so that a read behind it is seen
    release(address_, kBorder);
    return address_ = reserved(num_bytes, kBorder);
#else
    if (num_bytes > size_) {
        release(address_, kBorder);
        const int64_t rounded = (num_bytes + num_bytes / 4 + 4095) / 4096 * 4096;
        address_ = reserved(rounded, kBorder);
        size_ = address_ ? rounded : 0;
    }
    return address_;
#endif
}

namespace {

inline F32x16 load_values(int32_t type, const void* from) {
    if (type == F32) return load<F32x16>(from);
    return type == BF16 ? from_bf16(load<U16x16>(from)) : from_f16(load<U16x16>(from));
}

inline uint16_t to_half(int32_t type, float rounded) {
    const uint32_t u = bits<uint32_t>(rounded);
    if (type == BF16) return static_cast<uint16_t>((rounded != rounded ? u | 0x400000u : u) >> 16);
    const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude == 0x7f800000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 113u << 23) return static_cast<uint16_t>(sign | static_cast<uint32_t>(bits<float>(magnitude) * 0x1p24f));
    return static_cast<uint16_t>(sign | ((magnitude - (112u << 23)) >> 13));
}

}  // namespace

void read_row(int32_t type, const void* from, int64_t count, float* to) {
    const int64_t size = type == F32 ? 4 : 2;
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const F32x16 values = load_values(type, bytes + i * size);
        std::memcpy(to + i, &values, sizeof values);
    }
    if (i == count) return;
    uint8_t last[64] = {};
    std::memcpy(last, bytes + i * size, static_cast<size_t>((count - i) * size));
    const F32x16 values = load_values(type, last);
    std::memcpy(to + i, &values, static_cast<size_t>(4 * (count - i)));
}

void round_row(int32_t type, float* values, int64_t count) {
    if (type == F32) return;
    for (int64_t i = 0; i < count; i += kLanes) {
        const size_t num_bytes = static_cast<size_t>(4 * (count - i < kLanes ? count - i : kLanes));
        F32x16 lanes = {};
        std::memcpy(&lanes, values + i, num_bytes);
        lanes = round_to(type, lanes);
        std::memcpy(values + i, &lanes, num_bytes);
    }
}

void write_row(int32_t type, const float* from, int64_t count, void* to) {
    if (type == F32) {
        std::memcpy(to, from, static_cast<size_t>(4 * count));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t lanes = count - i < kLanes ? count - i : kLanes;
        F32x16 values = {};
        std::memcpy(&values, from + i, static_cast<size_t>(4 * lanes));
        values = round_to(type, values);
        for (int64_t lane = 0; lane < lanes; ++lane) out[i + lane] = to_half(type, values[lane]);
    }
}

}  // namespace offmoe
