// Calls everything that the library of CPU kernels exports, at every instruction set that this processor has, under a
// sanitizer: scripts/check --sanitize builds and runs it. Says what it did in one line an instruction set; an exit code of 1, or the
// sanitizer's own, means a fault.
//
//     driver [share]    one case of `share` is taken (default 1: all cases)
#include <atomic>
#include <chrono>
#include <thread>

#include "calls.h"

namespace made {

// Threads that share a handle, that use handles of their own, and that open and close them.
int64_t try_threads(int32_t isa_idx) {
    std::atomic<int64_t> made{0};
    void* shared = offmoe_open(isa_idx, 3, 10);
    const auto use = [&](uint64_t seed, bool own) {
        Random random(seed);
        Weights weights(random, kFormats[4], Variant{32, BF16, 0, 1, false, false, 0}, 64, 64);
        const Buffer x = random_numbers(random, F32, 64), y(4 * 64);
        for (int32_t turn = 0; turn < 40; ++turn, ++made) {
            void* handle = own ? offmoe_open(isa_idx, 1 + turn % 4, turn % 2 ? 0 : 50) : shared;
            Linear call = {&weights.matrix, nullptr, x.at(), y.at(), 4 * 64, 4 * 64, 1, F32, F32};
            require(offmoe_linear(handle, &call) == 0, "a linear of a thread", "", turn, own, 0);
            if (own) offmoe_close(handle);
        }
    };
    std::vector<std::thread> threads;
    for (uint64_t i = 0; i < 4; ++i) threads.emplace_back(use, i, i % 2 == 0);
    for (std::thread& thread : threads) thread.join();
    offmoe_close(shared);
    return made;
}

}  // namespace made

int main(int argc, char** argv) {
    using namespace made;
    const int64_t share = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
    std::printf("ABI %d, %lld routes\n", offmoe_abi_version(), static_cast<long long>(try_routes()));
    int32_t usable = 0;
    for (int32_t idx = 0; const char* isa = offmoe_isa(idx, &usable); ++idx) {
        if (!usable) {
            std::printf("%s: not on this processor\n", isa);
            continue;
        }
        const auto begin = std::chrono::steady_clock::now();
        const Handles handles(idx);
        int64_t made[10] = {};
        made[0] = try_linears(handles, share);
        made[1] = try_experts(handles, share);
        made[2] = try_norms(handles);
        made[3] = try_attention(handles, share);
        made[4] = try_latent(handles, share);
        made[5] = try_layers(handles);
        made[6] = try_threads(idx);
        made[7] = try_encodes(handles);
        made[8] = try_deltas(handles);
        made[9] = try_packing(handles);
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        std::printf("%s: %lld linears, %lld layers of experts, %lld norms, %lld attentions, %lld latent attentions, %lld layers and runs, %lld calls of several threads, %lld encodings, %lld delta nets, %lld packed matrices; %.1f s\n",
                    isa, (long long)made[0], (long long)made[1], (long long)made[2], (long long)made[3], (long long)made[4], (long long)made[5], (long long)made[6], (long long)made[7], (long long)made[8], (long long)made[9], seconds);
        std::fflush(stdout);
    }
    return 0;
}
