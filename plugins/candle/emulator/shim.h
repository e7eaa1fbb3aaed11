// What the kernels need of CUDA, for the compiler of the host: the threads of a block are fibers that take turns at
// barriers and exchanges between lanes.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#ifndef __x86_64__
#error "fibers are switched for x86-64 only"
#endif

#define EMULATED
#define __device__
#define __shared__ static

struct Index {
    unsigned x;
};
extern Index threadIdx, blockIdx, gridDim;

namespace emulator {

constexpr unsigned THREADS = 256;

// Lets the other threads of the block run.
void yield();
// Waits for the threads of the block that have not ended, and for those of the warp.
void wait_for_block();
void wait_for_warp();

extern float* dynamic_shared;
extern uint64_t exchanged[THREADS];

// A kernel with its arguments, as a thread runs it; and what makes one of a launch's arguments, which it copies.
using Bound = std::function<void()>;
using Kernel = std::function<Bound(void**)>;
std::map<std::string, Kernel>& kernels();

template <class... A, size_t... I> Bound bound(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    std::tuple<A...> own(*static_cast<A*>(arguments[I])...);
    return [kernel, own] { std::apply(kernel, own); };
}

struct Registered {
    template <class... A> Registered(const char* name, void (*kernel)(A...)) {
        kernels()[name] = [kernel](void** arguments) { return bound(kernel, arguments, std::index_sequence_for<A...>()); };
    }
};

template <class T> T exchange(T x, unsigned lane) {
    unsigned warp = threadIdx.x / 32 * 32;
    memcpy(&exchanged[threadIdx.x], &x, sizeof x);
    wait_for_warp();
    memcpy(&x, &exchanged[warp + lane], sizeof x);
    wait_for_warp();
    return x;
}

}  // namespace emulator

#define KERNEL(name, ...)                                       \
    static void name(__VA_ARGS__);                              \
    static emulator::Registered registered_##name(#name, name); \
    static void name(__VA_ARGS__)
#define DYNAMIC_SHARED(name) float* name = emulator::dynamic_shared

inline void __syncthreads() { emulator::wait_for_block(); }

template <class T> T __shfl_xor_sync(unsigned, T x, int mask) { return emulator::exchange(x, (threadIdx.x % 32) ^ mask); }

inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned votes = 0, warp = threadIdx.x / 32 * 32;
    emulator::exchanged[threadIdx.x] = vote;
    emulator::wait_for_warp();
    for (unsigned lane = 0; lane < 32; ++lane) votes |= (unsigned)emulator::exchanged[warp + lane] << lane;
    emulator::wait_for_warp();
    return votes;
}

// Only one thread runs at a time.
template <class T> T atomicAdd(T* to, T x) {
    T before = *to;
    *to += x;
    return before;
}

inline unsigned __popc(unsigned x) { return __builtin_popcount(x); }

template <class To, class From> To same_bits(From x) {
    To y;
    static_assert(sizeof x == sizeof y);
    memcpy(&y, &x, sizeof x);
    return y;
}
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
