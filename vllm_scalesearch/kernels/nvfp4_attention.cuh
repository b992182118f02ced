// What attention kernels need of NVFP4 and 16-bit numbers. HALF: 16-bit numbers are fp16, not bf16.
#pragma once

#include "packed_halves.cuh"
#include "warp_matrices.cuh"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7F800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7FFFFFFF)
#endif

constexpr float E4M3_BITS_UNIT = 1.329227995784916e36f;    // 2^120: of a scale whose bits are moved only

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The largest of the lanes that differ in bits from FIRST up to END alone.
template <int FIRST, int END>
__device__ __forceinline__ float max_across(float x) {
#pragma unroll
    for (int mask = FIRST; mask < END; mask *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
    return x;
}

// The sum of those.
template <int FIRST, int END>
__device__ __forceinline__ float sum_across(float x) {
#pragma unroll
    for (int mask = FIRST; mask < END; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
    return x;
}

// What exponents are relative to: a maximum is -inf until a first token is seen.
__device__ __forceinline__ float base_of(float maximum) {
    return maximum == -INFINITY ? 0.0f : maximum;
}

// 16-bit numbers, in the low half of a word.
__device__ __forceinline__ float widened(u32 x) {
#if HALF
    float y;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(x));
    return y;
#else
    return __uint_as_float(x << 16);
#endif
}

__device__ __forceinline__ u32 narrowed(float x) {
    u16 y;
#if HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}

// Two such numbers in a word, the first in the low half.
__device__ __forceinline__ u32 narrowed(float low, float high) {
    u32 pair;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

__device__ __forceinline__ float2 widened_pair(u32 x) {
    return make_float2(widened(x & 0xFFFF), widened(x >> 16));
}

// Two numbers in two parts: rounded, and what is left of them, `rest`.
__device__ __forceinline__ u32 split(float low, float high, u32& rest) {
    const u32 rounded = narrowed(low) | narrowed(high) << 16;
    rest = narrowed(low - widened(rounded & 0xFFFF)) | narrowed(high - widened(rounded >> 16)) << 16;
    return rounded;
}

// COUNT words that are read once, at an address that is a multiple of 4 * COUNT bytes, or of 4 where COUNT is odd.
template <int COUNT>
__device__ __forceinline__ void load_words(u32* words, const u8* from) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                         : "l"(from + 4 * i));
    } else if constexpr (COUNT % 2 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2)
            asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                         : "=r"(words[i]), "=r"(words[i + 1]) : "l"(from + 4 * i));
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[i]) : "l"(from + 4 * i));
    }
}

__device__ __forceinline__ uint4 load_whole(const u16* from) {
    uint4 x;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}

// Until the kernels in front on the stream are done, if this one was launched early.
__device__ __forceinline__ void wait_for_results() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel on the stream, if launched early, may begin when every block of this one has come here.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// COUNT halves of words, as words, the last one's upper half zero where COUNT is odd; address even.
template <int COUNT>
__device__ __forceinline__ void load_halves(u32* words, const u8* from) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const u32 half = __ldg(reinterpret_cast<const u16*>(from) + i);
        words[i / 2] = i % 2 ? words[i / 2] | half << 16 : half;
    }
}

// 512, 32, 2 and 0x70007000, as arguments of a kernel: the compiler must not know them, or it makes two instructions
// of the integer pipe, which decoding fills, of one multiply-add of another.
struct Opaque {
    u32 by_512, by_32, by_2, carry;
};

// Two E2M1 codes, the nibbles at bit BIT of a word's halves, as fp16 numbers: 2^-14 of them, exact.
template <int BIT>
__device__ __forceinline__ u32 halves_of_e2m1(u32 codes, const Opaque& opaque) {
    if constexpr (BIT == 12) {
        return (codes >> 3 & 0x0E000E00u) | (codes & 0x80008000u);
    } else {  // A sign at bit 12 is carried to bit 15; without one, what was added is masked.
        const u32 multiplier = BIT == 0 ? opaque.by_512 : BIT == 4 ? opaque.by_32 : opaque.by_2;
        return ((codes & 0x000F000Fu << BIT) * multiplier + opaque.carry) & 0x8E008E00u;
    }
}

// The same of bytes BYTE and BYTE + 2 of a word whose high nibbles are zeros; what the other bytes leave is masked.
template <int BYTE>
__device__ __forceinline__ u32 halves_of_low_nibbles(u32 nibbles, const Opaque& opaque) {
    return (nibbles * (BYTE ? opaque.by_2 : opaque.by_512) + opaque.carry) & 0x8E008E00u;
}

// Byte `index` of a word, a positive E4M3 number: 2^-120 of it. NaN becomes 480.
__device__ __forceinline__ float e4m3_bits(u32 word, int index) {
    const int left = 20 - 8 * index;
    return __uint_as_float((left >= 0 ? word << (left & 31) : word >> (-left & 31)) & 0x07F00000u);
}

// Of four E4M3 numbers, positive or NaN: bit 7 of a byte is set where it is NaN. Marks are gathered by `or`.
__device__ __forceinline__ u32 nan_marks(u32 word) {
    return word + 0x01010101u;
}

__device__ __forceinline__ bool any_nan(u32 marks) {  // of a warp
    return __any_sync(~0u, marks & 0x80808080u);
}

// The two E4M3 numbers of a word's low or HIGH half, positive or NaN, as fp16.
#if __CUDA_ARCH__ >= 890
constexpr bool E4M3_NAN_IS_NAN = true;

template <int HIGH>
__device__ __forceinline__ u32 halves_of_e4m3(u32 word) {
    u32 pair;
    if (HIGH)
        asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high;}" : "=r"(pair) : "r"(word));
    else
        asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(pair) : "r"(word));
    return pair;
}
#else
constexpr bool E4M3_NAN_IS_NAN = false;  // but 480

template <int HIGH>
__device__ __forceinline__ u32 halves_of_e4m3(u32 word) {
    // Their bits in the place of fp16's are 2^-8 of them.
    const u32 bytes = __byte_perm(word, 0, HIGH ? 0x4342 : 0x4140);
    return mul_half2((bytes & 0x007F007Fu) << 7, 0x5C005C00u);
}
#endif

// Two numbers as fp16, the first in the low half.
__device__ __forceinline__ u32 as_halves(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Powers of two: `up` brings numbers of which `amax` is the largest to fp16's upper range, that one to [2^14, 2^15), so
// that bf16 is exact but for what is below 2^-28 of it; `back` undoes that, and the 2^-14 of E2M1, in their products.
struct UpperRange {
    float up, back;

    __device__ __forceinline__ explicit UpperRange(float amax) {
        const int exponent = min(max(static_cast<int>(__float_as_uint(amax) >> 23), 40), 220);
        up = __uint_as_float((268 - exponent) << 23), back = __uint_as_float(exponent << 23);
    }
};

// COUNT words of shared memory, at an address that is a multiple of 4 * COUNT bytes, up to 16.
template <int COUNT>
__device__ __forceinline__ void read_words(u32* words, const u8* from) {
    if constexpr (COUNT % 4 == 0) {
        const uint4 x = *reinterpret_cast<const uint4*>(from);
        words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
        if constexpr (COUNT > 4) read_words<COUNT - 4>(words + 4, from + 16);
    } else if constexpr (COUNT == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(from);
        words[0] = x.x, words[1] = x.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) words[i] = *reinterpret_cast<const u32*>(from + 4 * i);
    }
}

// 16 bytes to shared memory, in the background.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(to)), "l"(from) : "memory");
}

// Until what this thread copies is there.
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
