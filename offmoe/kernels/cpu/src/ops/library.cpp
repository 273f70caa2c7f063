// The library's face: what Python calls. One handle is one set of threads and one instruction set. No exception leaves it:
// functions that can fail return 0, or a code (../kernels.py).
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#include <mutex>
#include <new>
#include <stdexcept>

#include "ops/jobs.h"
#include "threads/pool.h"

namespace {

const offmoe::Isa* const kIsas[] = {  // best first
#ifdef OFFMOE_HAS_AVX512
    &offmoe::kAvx512,
#endif
#ifdef OFFMOE_HAS_AVX2
    &offmoe::kAvx2,
#endif
#ifdef OFFMOE_HAS_NEON_DOT
    &offmoe::kNeonDot,
#endif
#ifdef OFFMOE_HAS_NEON
    &offmoe::kNeon,
#endif
    &offmoe::kPortable,
};

struct Kernels {
    Kernels(int32_t isa_idx, int32_t num_threads, int32_t spin_us)
        : isa(*kIsas[isa_idx]), pool(num_threads, spin_us) {}

    const offmoe::Isa& isa;
    offmoe::Pool pool;
    offmoe::Workspace space;
};

#if defined(__x86_64__)
// Asked of the processor itself, and of the system, which must save the registers: `__builtin_cpu_supports` needs a part of
// the compiler's library that not every compiler has. Bits: Intel's manual, volume 2A, CPUID, and volume 1, 13.2.
struct Features {
    Features() {
        uint32_t a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // no xgetbv
        uint32_t low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        const bool fma = c >> 12 & 1, f16c = c >> 29 & 1;
        if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = (b >> 5 & 1) && fma && f16c;
        // f, dq, bw, vl; vbmi, vnni
        const bool most = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 1 & 1) && (c >> 11 & 1);
        if (!avx2 || !most || (low & 0xe6) != 0xe6 || a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
        avx512 = a >> 5 & 1;  // bf16
    }

    bool avx2 = false, avx512 = false;
};
#endif

#if defined(__aarch64__)
// FEAT_DotProd. https://docs.kernel.org/arch/arm64/elf_hwcaps.html and, of macOS,
// https://developer.apple.com/documentation/kernel/1387446-sysctlbyname/determining_instruction_set_characteristics
bool has_dot_product() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int32_t has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has == 1;
#else
    return false;
#endif
}
#endif

bool has_instructions(const char* isa) {
#if defined(__x86_64__)
    static const Features features;
    if (std::strcmp(isa, "avx512") == 0) return features.avx512;
    if (std::strcmp(isa, "avx2") == 0) return features.avx2;
#elif defined(__aarch64__)
    if (std::strcmp(isa, "neon") == 0) return true;  // in the architecture's base: Arm's manual DDI 0487, A1.5
    if (std::strcmp(isa, "neon_dot") == 0) return has_dot_product();
#endif
    return std::strcmp(isa, "portable") == 0;
}

// What `run` returns, or the code of what it throws: Python's frames, and ctypes, know nothing of C++ exceptions.
constexpr int32_t kNoMemory = 1, kRefused = 2;

template <class Run>
int32_t guarded(Run run) noexcept {
    try {
        return run();
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    } catch (const std::length_error&) {  // as much memory as no vector can have
        return kNoMemory;
    } catch (...) {  // a lock, a thread
        return kRefused;
    }
}

// The same for a call that has the handle's threads to itself.
template <class Run>
int32_t alone(void* handle, Run run) noexcept {
    return guarded([&] {
        Kernels& kernels = *static_cast<Kernels*>(handle);
        std::lock_guard<std::mutex> lock(kernels.pool.calls());
        return run(kernels);
    });
}

}  // namespace

extern "C" {

// Changes with the functions below, and with what a field of abi.h means; where fields lie is in layout.cpp.
int32_t offmoe_abi_version() { return 17; }

// The idx-th best instruction set that was compiled, or null; `usable`: this processor has it.
const char* offmoe_isa(int32_t idx, int32_t* usable) {
    const int32_t count = static_cast<int32_t>(sizeof kIsas / sizeof *kIsas);
    if (idx < 0 || idx >= count) return nullptr;
    *usable = has_instructions(kIsas[idx]->name) ? 1 : 0;
    return kIsas[idx]->name;
}

// Null where there is no memory.
void* offmoe_open(int32_t isa_idx, int32_t num_threads, int32_t spin_us) {
    void* handle = nullptr;
    guarded([&] {
        handle = new Kernels(isa_idx, num_threads, spin_us);
        return 0;
    });
    return handle;
}

// Ends the threads. A forked child leaves its parent's state alone.
void offmoe_close(void* handle) {
    Kernels* kernels = static_cast<Kernels*>(handle);
    guarded([&] {
        kernels->pool.stop();
        return 0;
    });
    delete kernels;
}

int32_t offmoe_experts(void* handle, const offmoe::Call* call) {
    return alone(handle, [&](Kernels& kernels) {
        return offmoe::run_experts(kernels.pool, kernels.isa, kernels.space, *call);
    });
}

int32_t offmoe_linear(void* handle, const offmoe::Linear* call) {
    return alone(handle, [&](Kernels& kernels) {
        return offmoe::run_linear(kernels.pool, kernels.isa, kernels.space, *call);
    });
}

int32_t offmoe_norm(void* handle, const offmoe::Norm* call) {
    return alone(handle, [&](Kernels& kernels) {
        return offmoe::run_norm(kernels.isa, kernels.space, *call);
    });
}

int32_t offmoe_attend(void* handle, const offmoe::Attend* call) {
    return alone(handle, [&](Kernels& kernels) {
        return offmoe::run_attend(kernels.pool, kernels.isa, kernels.space, *call);
    });
}

int32_t offmoe_latent(void* handle, const offmoe::Latent* call) {
    return alone(handle, [&](Kernels& kernels) {
        return offmoe::run_latent(kernels.pool, kernels.isa, kernels.space, *call);
    });
}

int32_t offmoe_layer(void* handle, const offmoe::Layer* call) {
    return alone(handle, [&](Kernels& kernels) {
        return offmoe::run_layer(kernels.pool, kernels.isa, kernels.space, *call);
    });
}

int32_t offmoe_encode(void* handle, offmoe::Encode* call) {
    return alone(handle, [&](Kernels& kernels) { return offmoe::run_encode(kernels.pool, kernels.isa, *call); });
}

// By the calling thread alone, beside whatever the handle's threads do.
void offmoe_pack(void* handle, const offmoe::Pack* call) { static_cast<Kernels*>(handle)->isa.pack(*call); }

int32_t offmoe_unpack(void* handle, const offmoe::Unpack* call) {
    return alone(handle, [&](Kernels& kernels) { return offmoe::run_unpack(kernels.pool, kernels.isa, *call); });
}

// The step that it stopped at, or minus a code.
int64_t offmoe_program(void* handle, const offmoe::Program* call) {
    int64_t stop = 0;
    const int32_t code = alone(handle, [&](Kernels& kernels) {
        stop = offmoe::run_program(kernels.pool, kernels.isa, kernels.space, *call);
        return stop < 0 ? kNoMemory : 0;
    });
    return code == 0 ? stop : -code;
}

// One row of logits of the route's type, to try a rule out. `scores`: room for three numbers an expert.
int32_t offmoe_route(const offmoe::Route* route, const float* logits, float* scores) {
    return guarded([&] {
        offmoe::run_route(*route, logits, scores);
        return 0;
    });
}

}  // extern "C"
