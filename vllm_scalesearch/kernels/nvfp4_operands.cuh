// Blocks of NVFP4 as operands of fp16 products, scales multiplied in: E2M1 as fp16, 2^-14 of it, times E4M3 as fp16.
// That is exact, subnormal numbers included: such products are multiples of 2^-24 of at most 6 bits.
#pragma once

#include "nvfp4_attention.cuh"

constexpr bool LOOK_FOR_NAN = !E4M3_NAN_IS_NAN;  // else a NaN scale is a NaN of all that it is multiplied into

// The E4M3 numbers of half `index` of some words, as fp16.
__device__ __forceinline__ u32 scales_of(const u32* words, int index) {
    return index % 2 ? halves_of_e4m3<1>(words[index / 2]) : halves_of_e4m3<0>(words[index / 2]);
}

// Their NaN marks.
__device__ __forceinline__ u32 marks_of(const u32* words, int index) {
    return (words[index / 2] >> index % 2 * 16 & 0x7F7Fu) + 0x0101u;
}

// One block's codes of a lane, in the low nibbles of a word's bytes, as an operand: 2^-14 of what they stand for.
// HIGH: their scale is in the high half of `scales`.
template <int HIGH>
__device__ __forceinline__ void operand_of(u32 (&b)[2], u32 nibbles, u32 scales, const Opaque& opaque) {
    const u32 scale = half_twice<HIGH>(scales);
    b[0] = mul_half2(halves_of_low_nibbles<0>(nibbles, opaque), scale);
    b[1] = mul_half2(halves_of_low_nibbles<1>(nibbles, opaque), scale);
}

// The nibbles of a word's bytes, the low ones or the high ones.
__device__ __forceinline__ u32 nibbles_of(u32 codes, int high) {
    return (high ? codes >> 4 : codes) & 0x0F0F0F0Fu;
}
