// A block of 16 values under NVFP4, as search.py defines it: absmax code, rounding to E2M1, a candidate's error.
//
// Macros: HALF (0: bf16, 1: fp16), BOUNDED (0 where no |y| can exceed search.py's bound, which saves a comparison).
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int MIN_CODE = 1, MAX_CODE = 126, NAN_CODE = 0x7F;
constexpr u32 SIGNS = 0x80008000u, INFINITE = HALF ? 0x7C00u : 0x7F80u;
constexpr float SIXTH = 0.16666667163372039794921875f;
constexpr float Y_LIMIT = 1099511627776.0f;  // 2^40, as in search.py

// --- instructions ----------------------------------------------------------------------------------------

// Of two values x; an addition, off the integer pipe that a search fills, where masks are not.
__device__ __forceinline__ u32 magnitudes_of(u32 x) {
    u32 out;
#if HALF
    asm("abs.f16x2 %0, %1;" : "=r"(out) : "r"(x));
#else
    asm("abs.bf16x2 %0, %1;" : "=r"(out) : "r"(x));
#endif
    return out;
}

// Of magnitudes of x; a NaN wins.
__device__ __forceinline__ u32 max_magnitudes(u32 a, u32 b) {
    u32 out;
#if __CUDA_ARCH__ >= 900
    asm("max.u16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#elif HALF
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#else
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#endif
    return out;
}

__device__ __forceinline__ float half_to_float(u32 bits) {
    float out;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(out) : "r"(bits));
    return out;
}

// fp32 to fp16, rounded to nearest even; low and high in a register.
__device__ __forceinline__ u32 to_half2(float low, float high) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

#if __CUDA_ARCH__ >= 890
// fp32 v >= 0 to E4M3, to nearest even, saturating.
__device__ __forceinline__ int to_e4m3(float v) {
    u16 out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(0.0f), "f"(v));
    return out;
}
#else
__device__ __forceinline__ int to_e4m3(float v) {
    // A step is an eighth of the value's power of two, 2^-9 below 2^-6, and fp32's own where 1.5 * 2^20 of
    // those powers are added. Then 2^-6, the smallest normal E4M3, becomes fp32's, and the code its leading bits.
    v = fminf(v, 448.0f);
    const float magic = __uint_as_float(__float_as_uint(fmaxf(v, 0.015625f)) & 0x7F800000u) * 1572864.0f;
    return __float_as_uint((v + magic - magic) * 7.52316384526264e-37f) >> 20;
}
#endif

// --- a block ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float scale_of(int code) {
    return __uint_as_float((u32)code << 20) * 1.329227995784916e36f;  // 2^120
}

__device__ __forceinline__ int clamped(int code) {
    return min(max(code, MIN_CODE), MAX_CODE);
}

// |x| of the low or the high half of a word, fp32.
template <int high> __device__ __forceinline__ float magnitude(u32 word) {
#if HALF
    return fabsf(half_to_float(high ? word >> 16 : word & 0xFFFFu));
#else
    return fabsf(__uint_as_float(high ? word & 0xFFFF0000u : word << 16));
#endif
}

// |y|, bounded.
__device__ __forceinline__ float scaled(float magnitude, float reciprocal) {
    const float y = magnitude * reciprocal;
    return BOUNDED ? fminf(y, Y_LIMIT) : y;
}

// E2M1 of t >= 0 as `power`, the power of two of a binade (1 below 2), and the sum whose bits u hold it: u +
// (u >> 22) has the code in its low 22 bits. At 1.5 * 2^22 powers fp32's step is E2M1's, so the addition rounds to
// nearest even; the 149 less (an even number of steps) cancel what u >> 22 adds beside twice the binade.
constexpr float MAGIC = 1.5f * 4194304.0f - 149.0f;

__device__ __forceinline__ float rounded(float t, float& power) {
    t = fminf(t, 6.0f);
    power = __uint_as_float(__float_as_uint(fmaxf(t, 1.0f)) & 0x7F800000u);
    return fmaf(power, MAGIC, t);  // the product is exact
}

__device__ __forceinline__ float element(float sum, float power) {
    return fmaf(power, -MAGIC, sum);  // exact
}

struct Block {
    u32 x[8];
    u32 amax;  // bits of the largest magnitude, in x's dtype
    float v;  // amax / tensor_scale / 6
    int base;  // absmax code
};

__device__ __forceinline__ void load(Block& block, const u16* from) {
    const uint4 low = *(const uint4*)from, high = *(const uint4*)(from + 8);
    block.x[0] = low.x, block.x[1] = low.y, block.x[2] = low.z, block.x[3] = low.w;
    block.x[4] = high.x, block.x[5] = high.y, block.x[6] = high.z, block.x[7] = high.w;
}

__device__ __forceinline__ void find_base(Block& block, float reciprocal) {
    u32 largest = magnitudes_of(block.x[0]);
    #pragma unroll
    for (int i = 1; i < 8; ++i) largest = max_magnitudes(largest, magnitudes_of(block.x[i]));
    block.amax = max(largest & 0xFFFFu, largest >> 16);
    block.v = scaled(magnitude<0>(block.amax), reciprocal) * SIXTH;
    block.base = to_e4m3(block.v);
}

// The reference's error of a candidate.
__device__ __forceinline__ float exact_error(const float (&y)[16], float scale, float inverse) {
    float sums[16];
    #pragma unroll
    for (int i = 0; i < 16; ++i) {
        float power;
        const float sum = rounded(y[i] * inverse, power);
        const float d = fmaf(scale, element(sum, power), -y[i]);  // scale * element is exact
        sums[i] = d * d;
    }
    #pragma unroll
    for (int i = 0; i < 16; i += 2) sums[i] += sums[i + 1];
    #pragma unroll
    for (int i = 0; i < 16; i += 4) sums[i] += sums[i + 2];
    return (sums[0] + sums[4]) + (sums[8] + sums[12]);
}
