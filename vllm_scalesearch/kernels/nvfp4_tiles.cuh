// NVFP4 weights in the layout of ops/w4a16.py, and how their elements and scales become 16-bit floats.
//
// A tile is 16 inputs by 64 outputs. Its codes are 512 contiguous bytes in which lane l of a warp owns 16
// bytes; word j of those is the lane's A fragment of an m16n8k16 product with outputs 16 j to 16 j + 15 as
// rows, nibbles (0, 4), (2, 6), (1, 5), (3, 7) in the fragment's four registers. Its scales are 64 bytes; the 8
// of outputs g, g + 8, ..., g + 56 are neighbours.
//
// A magnitude code is moved to the lowest exponent bits of a 16-bit float, where E2M1, its subnormal
// included, is that float's value up to a power of two. Scales get their power of two by adding to the
// exponent. A product element * scale is then exact, times 2^-7.
//
// Macros: HALF (0: bf16, 1: fp16), SCALES (0: E4M3 codes, none of 1 to 7 with elements that are not zero; 1:
// any E4M3 codes; 2: Marlin's, bits 14 to 7 of fp16(scale * f * 2^7), f a power of two of the tensor).

#pragma once

typedef unsigned int u32;
typedef unsigned short u16;

constexpr u32 SIGN = 0x80008000u;
#if HALF
constexpr u32 MAGNITUDE = 0x0E000E00u;
constexpr int MAGNITUDE_BIT = 9, SCALE_SHIFT = 7;
constexpr u32 SCALE_EXPONENT = SCALES == 0 ? 0x3C003C00u : 0;
#else
constexpr u32 MAGNITUDE = 0x01C001C0u;
constexpr int MAGNITUDE_BIT = 6, SCALE_SHIFT = 4;
constexpr u32 SCALE_EXPONENT = SCALES == 0 ? 0x77807780u : SCALES == 2 ? 0x70007000u : 0;
#endif

// Shifts as multiplications, by values that the compiler does not know, made of a 1 of the same kind: those run
// beside the integer pipe, which limits the kernels.
struct Shifts {
    u32 magnitude, second, third, scale;
};

__device__ __forceinline__ Shifts shifts_of(u32 one) {
    return {one << MAGNITUDE_BIT, one << (HALF ? 1 : 4), one << (MAGNITUDE_BIT - 4), one << SCALE_SHIFT};
}

// The eight elements of a word as the four registers of a fragment: element * 2^-126 (bf16) or
// element * 2^-14 (fp16). A nibble's sign is the bit above its magnitude; adding ones from there up to
// bit 14 carries a set sign into bit 15, and the mask drops the ones that an unset sign leaves.
__device__ __forceinline__ void elements(u32 (&a)[4], u32 word, const Shifts& by) {
    const u32 ones = HALF ? 0x70007000u : 0x7E007E00u;
    const u32 right = word >> (12 - MAGNITUDE_BIT);
    a[0] = (word & 0x000F000Fu) * by.magnitude + ones & (MAGNITUDE | SIGN);
    a[1] = (HALF ? (word & 0x0F000F00u) * by.second : (right & 0x003C003Cu) * by.second) + ones & (MAGNITUDE | SIGN);
    a[2] = (word & 0x00F000F0u) * by.third + ones & (MAGNITUDE | SIGN);
    a[3] = (right & MAGNITUDE) | (word & SIGN);
}

__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
    u32 out;
#if HALF
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));  // a * b - 0
#endif
    return out;
}

// The four scales of a word, each twice in a register, times 2^119 (bf16) or 2^7 (fp16).
__device__ __forceinline__ uint4 scale_pairs(u32 bytes, const Shifts& by) {
    u32 pair[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int byte = SCALES == 2 ? i % 2 << 1 | i / 2 : i;  // Marlin has the middle two swapped
        pair[i] = __byte_perm(bytes, 0, 0x4040 | byte | byte << 8) * by.scale + SCALE_EXPONENT;
        if (SCALES == 1)
            pair[i] = HALF ? multiply(pair[i], 0x78007800u) : multiply(multiply(pair[i], 0x7F007F00u), 0x77807780u);
    }
    return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}
