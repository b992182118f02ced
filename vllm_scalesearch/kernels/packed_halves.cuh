// Arithmetic of two fp16 numbers in a word.
#pragma once

typedef unsigned int u32;

__device__ __forceinline__ u32 mul_half2(u32 a, u32 b) {
    u32 out;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

__device__ __forceinline__ u32 add_half2(u32 a, u32 b) {
    u32 out;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

__device__ __forceinline__ u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// Of halves that are not negative; a NaN loses.
__device__ __forceinline__ u32 min_half2(u32 a, u32 b) {
    u32 out;
    asm("min.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

// 1 where a <= b, 0 elsewhere and for a NaN.
__device__ __forceinline__ u32 at_most(u32 a, u32 b) {
    u32 out;
    asm("set.le.f16x2.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

// The bits of a where the mask has ones, those of b elsewhere; the compiler makes two instructions of it.
__device__ __forceinline__ u32 selected(u32 mask, u32 a, u32 b) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(out) : "r"(mask), "r"(a), "r"(b));
    return out;
}

// The smaller of a + b and `limit`, of bit patterns of halves that are not negative.
__device__ __forceinline__ u32 add_min(u32 a, u32 b, u32 limit) {
#if __CUDA_ARCH__ >= 900
    u32 out;
    asm("{.reg .b32 sum; add.u16x2 sum, %1, %2; min.u16x2 %0, sum, %3;}" : "=r"(out) : "r"(a), "r"(b), "r"(limit));
    return out;
#else
    return min_half2(a + b, limit);
#endif
}

// One half of a word, in both: halves are named so that an instruction can take one twice.
template <int HIGH>
__device__ __forceinline__ u32 half_twice(u32 x) {
    u32 out;
    if (HIGH)
        asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high};}" : "=r"(out) : "r"(x));
    else
        asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low};}" : "=r"(out) : "r"(x));
    return out;
}
