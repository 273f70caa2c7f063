// Loaded before all other libraries: operator new of the whole process, of which the n-th call fails when that is asked.
// tests/faults/failing_new.py asks while a function of the CPU kernels runs.
#include <atomic>
#include <cstdlib>
#include <new>

static std::atomic<bool> watched{false};
static std::atomic<int64_t> calls{0}, failing{0};

extern "C" void watch(int on) { watched = on != 0; }
extern "C" void fail(int64_t nth) {
    calls = 0;
    failing = nth;
}
extern "C" int64_t count() { return calls; }

void* operator new(std::size_t size) {
    if (watched && ++calls == failing) throw std::bad_alloc();
    if (void* at = std::malloc(size ? size : 1)) return at;
    throw std::bad_alloc();
}
void* operator new[](std::size_t size) { return operator new(size); }
void operator delete(void* at) noexcept { std::free(at); }
void operator delete[](void* at) noexcept { std::free(at); }
void operator delete(void* at, std::size_t) noexcept { std::free(at); }
void operator delete[](void* at, std::size_t) noexcept { std::free(at); }
