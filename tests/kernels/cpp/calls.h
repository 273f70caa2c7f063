// The library's face, called through: one handle a number of threads, at one instruction set.
#pragma once
#include "made.h"

extern "C" {
int32_t offmoe_abi_version();
const char* offmoe_isa(int32_t idx, int32_t* usable);
void* offmoe_open(int32_t isa_idx, int32_t num_threads, int32_t spin_us);
void offmoe_close(void* handle);
int32_t offmoe_experts(void* handle, const offmoe::Call* call);
int32_t offmoe_linear(void* handle, const offmoe::Linear* call);
int32_t offmoe_norm(void* handle, const offmoe::Norm* call);
int32_t offmoe_attend(void* handle, const offmoe::Attend* call);
int32_t offmoe_latent(void* handle, const offmoe::Latent* call);
int32_t offmoe_layer(void* handle, const offmoe::Layer* call);
int32_t offmoe_encode(void* handle, offmoe::Encode* call);
void offmoe_pack(void* handle, const offmoe::Pack* call);
int32_t offmoe_unpack(void* handle, const offmoe::Unpack* call);
int64_t offmoe_program(void* handle, const offmoe::Program* call);
int32_t offmoe_route(const offmoe::Route* route, const float* logits, float* scores);
}

namespace made {

// Ends the program: a call failed, or its bits depend on threads or on company.
inline void require(bool holds, const char* what, const char* name, int64_t a, int64_t b, int64_t c) {
    if (holds) return;
    std::fprintf(stderr, "FAILED %s: %s (%lld, %lld, %lld)\n", what, name, static_cast<long long>(a), static_cast<long long>(b), static_cast<long long>(c));
    std::exit(1);
}

// Who wants to see what calls wrote: compare.cpp. `what`: the call; `name`: of the weights' format, or "".
using Watcher = void (*)(const char* what, const char* name, int32_t type, const Buffer& written);
inline Watcher watcher = nullptr;
constexpr int32_t kBytes = -1, kIds = -2;  // types of what is equal or not

inline void show(const char* what, const char* name, int32_t type, const Buffer& written) {
    if (watcher != nullptr) watcher(what, name, type, written);
}

struct Handles {
    explicit Handles(int32_t isa_idx) : alone(offmoe_open(isa_idx, 1, 0)), few(offmoe_open(isa_idx, 2, 20)), many(offmoe_open(isa_idx, 7, 0)) {}
    ~Handles() {
        for (void* handle : {alone, few, many}) offmoe_close(handle);
    }
    Handles(const Handles&) = delete;
    Handles& operator=(const Handles&) = delete;

    void* several(int64_t turn) const { return turn % 2 ? few : many; }

    void *alone, *few, *many;
};

// All calls of one kind of one instruction set; each returns how many were made. `share`: one case of so many is taken.
int64_t try_linears(const Handles& handles, int64_t share);
int64_t try_experts(const Handles& handles, int64_t share);
int64_t try_norms(const Handles& handles);
int64_t try_attention(const Handles& handles, int64_t share);
int64_t try_latent(const Handles& handles, int64_t share);
int64_t try_routes();
int64_t try_layers(const Handles& handles);
int64_t try_encodes(const Handles& handles);
int64_t try_packing(const Handles& handles);
int64_t try_deltas(const Handles& handles);
int64_t try_threads(int32_t isa_idx);

}  // namespace made
