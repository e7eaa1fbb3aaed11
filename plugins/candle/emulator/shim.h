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
extern uint32_t left[THREADS][4], right[THREADS][2];

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
#define KERNEL_AT_ONCE(blocks, ...) KERNEL(__VA_ARGS__)
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

// ---- tensor cores ------------------------------------------------------------------------------------------------

// c (16, 8) += a (16, 16) b (16, 8). Where elements lie: of a, row r and column k in lane r % 8 * 4 + k % 8 / 2, register
// r / 8 + k / 8 * 2; of b, row k and column n in lane n * 4 + k % 8 / 2, register k / 8; the even one of two in the lower half.
inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
    unsigned warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    memcpy(emulator::left[threadIdx.x], a, sizeof a);
    memcpy(emulator::right[threadIdx.x], b, 2 * sizeof *b);
    emulator::wait_for_warp();
    auto half = [](uint32_t both, unsigned k) { return __uint_as_float(k % 2 ? both & 0xffff0000u : both << 16); };
    for (unsigned i = 0; i < 4; ++i) {
        unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0.0f;
        for (unsigned k = 0; k < 16; ++k) {
            uint32_t x = emulator::left[warp + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            uint32_t y = emulator::right[warp + column * 4 + k % 8 / 2][k / 8];
            sum += half(x, k) * half(y, k);
        }
        c[i] += sum;
    }
    emulator::wait_for_warp();
}

namespace emulator {

// Element (row, column) of the matrix (8, 8) whose rows begin where eight lanes from `first` on say.
inline uint32_t element(unsigned first, unsigned row, unsigned column) {
    return reinterpret_cast<const uint16_t*>(exchanged[threadIdx.x / 32 * 32 + first + row])[column];
}

inline void matrices(unsigned (&to)[4], const void* row, bool turned) {
    // As the GPU wants it.
    if ((uintptr_t)row % 16) __builtin_trap();
    exchanged[threadIdx.x] = (uintptr_t)row;
    wait_for_warp();
    unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) {
        uint32_t low = turned ? element(8 * i, t, g) : element(8 * i, g, t);
        uint32_t high = turned ? element(8 * i, t + 1, g) : element(8 * i, g, t + 1);
        to[i] = low | high << 16;
    }
    wait_for_warp();
}

}  // namespace emulator

inline void matrices(unsigned (&to)[4], const void* row) { emulator::matrices(to, row, false); }
inline void matrices_turned(unsigned (&to)[4], const void* row) { emulator::matrices(to, row, true); }

inline unsigned rounded(float low, float high) {
    auto upper = [](float x) {
        unsigned bits = __float_as_uint(x);
        return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu;
    };
    return upper(low) | upper(high) << 16;
}
inline float power_of_two(float x) { return exp2f(x); }
