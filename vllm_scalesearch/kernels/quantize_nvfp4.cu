// NVFP4 with searched block scales: the bits of search.py (metric mse, policies made of offsets).
//
// A thread takes a block of 16 values. It tries all candidates in packed fp16, where an element costs 2.5
// instructions a candidate, and knows how far that may be from the reference's fp32 errors. If one candidate
// alone can be the winner, it is; otherwise the block goes to a queue in shared memory, and full warps compute
// the exact errors of the candidates that are left. The winner's codes too come out of packed fp16, except where
// an element lies too near a midpoint; those blocks go the same way.
//
// Units of the search. c0 is the absmax code and 2^E its power of two, 2^r <= 1 / tensor_scale < 2^(r + 1) and
// m = 2^-r / tensor_scale in [1, 2). An element is a = |x| 2^(r - E - 2), which fp16 holds exactly (but for
// values some 2^-20 of the largest), and |y| = a * 4 m 2^E. A candidate's scale s gives R = fp16(2^-12 m 2^E / s)
// and S = fp16(2^12 s / (m 2^E)); both depend on c0 % 8 only, except where candidates end at code 126. Then
// * fp16(a R) is t = |y| / s times 2^-14, so that E2M1, its subnormal included, is fp16's own sign, exponent and
//   first mantissa bit: adding half a step and clearing nine bits rounds (ties up);
// * d = fma(q 2^-14, -S, a) and acc = fma(d, d, acc) give the error in units of (4 m 2^E)^2.
//
// How far off is it? With u = 2^-11, fp16's unit roundoff:
// 1. t is off by t u through R and by half a unit in the last place of its binade through the product, so it falls
//    to the wrong side of a midpoint only within delta of it, which costs an element at most 4 h delta over a true
//    (h - delta)^2, where h is half the step: 2.2 % (at 1.75 and 3.5; less at .25, .75, 1.25, 2.5 and 5).
//    It never makes an error smaller. alpha = 0.022.
// 2. S is off by u, so the vector of s q by at most u (|a| + |d|) (norms over the block): the square root of
//    the error moves by that at most.
// 3. d is rounded (u each, twice in the square), eight sums in a half of the accumulator and one of the halves:
//    11 u of the error.
// With m the least of the approximate errors, the reference's winner has an approximate error of at most
//    T = (A sqrt(m) + B |a|)^2 + C,
//    A = sqrt(1 + alpha) * sqrt((1 + 11 u) / (1 - 11 u)) * (1 + 2 u) < 1.0175,
//    B = u (sqrt(1 + alpha) + 1) sqrt(1 + 11 u) < 2.02 u; |a|^2 is summed in fp16 too (9 u), hence 2.03 u,
//    C = 2^-15 for what is subnormal (2^-25 each in d, a and the sums) and the reference's own roundings.
//
// Macros: HALF (0: bf16, 1: fp16), COUNT and OFFSETS (a list, ascending), LOWEST and HIGHEST of them, SCALE (0:
// one tensor scale, 1: one a row, 2: computed here from each row), PACKED (0: no codes, 1: codes and scales, 2:
// scales in 128x4 tiles), VALUES (1: dequantized values and residual), THREADS.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#if __CUDA_ARCH__ >= 1000
constexpr bool HARDWARE_E2M1 = true;  // compiled for sm_100a, sm_120a and their like
#else
constexpr bool HARDWARE_E2M1 = false;
#endif
constexpr int MIN_CODE = 1, MAX_CODE = 126, NAN_CODE = 0x7F;
constexpr int NEVER = 1 << 20;
// The packed search takes scales from half to twice that of absmax; R and S are normal there.
constexpr bool APPROXIMATE = COUNT > 1 && LOWEST >= -8 && HIGHEST <= 8;
constexpr int TOP = HIGHEST > 0 && APPROXIMATE ? HIGHEST : 0;  // absmax codes with a candidate above 126
constexpr int TABLE_ROWS = APPROXIMATE ? 8 + TOP : 0;
constexpr int QUADS = (COUNT + 1) / 2 | 1;  // of a row; odd, so that eight rows lie in different banks
constexpr int PAIRS = (COUNT + 1) / 2;
constexpr u32 ALL = (1u << COUNT) - 1;
constexpr u32 SIGNS = 0x80008000u, INFINITE = HALF ? 0x7C00u : 0x7F80u;
constexpr float SIXTH = 0.16666667163372039794921875f;
constexpr float Y_LIMIT = 1099511627776.0f;  // 2^40, as in search.py
constexpr float A = 1.0175f, B = 2.03f / 2048, C = 1.0f / 32768;

__device__ constexpr int offset_list[COUNT] = {OFFSETS};

// What a thread block shares, besides the table and the queue.
struct Shared {
    u32 queued, row_amax;
    int offsets[COUNT];
    float inverses[127];  // 1 / scale of each code, correctly rounded
};

// --- instructions ----------------------------------------------------------------------------------------

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

__device__ __forceinline__ u32 mul_bf162(u32 a, u32 b) {
    u32 out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(SIGNS));  // a * b - 0
    return out;
}

// Of halves that are not negative; a NaN loses.
__device__ __forceinline__ u32 min_half2(u32 a, u32 b) {
    u32 out;
    asm("min.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
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

__device__ __forceinline__ float square_root(float x) {
    float out;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// 1 / x, within two units in the last place.
__device__ __forceinline__ float inverse_of(float x) {
    float out;
    asm("rcp.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

#if __CUDA_ARCH__ >= 1000
// Two fp32 values to a byte of E2M1 codes, low nibble first.
__device__ __forceinline__ u32 to_e2m1(float low, float high) {
    u32 out;
    asm("{.reg .b8 code; .reg .b16 wide; cvt.rn.satfinite.e2m1x2.f32 code, %2, %1; mov.b16 wide, {code, 0}; "
        "cvt.u32.u16 %0, wide;}" : "=r"(out) : "f"(low), "f"(high));
    return out;
}
#endif

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

// |y|. Below the limit for tensor scales that come from x.
__device__ __forceinline__ float scaled(float magnitude, float reciprocal) {
    const float y = magnitude * reciprocal;
    return SCALE == 2 ? y : fminf(y, Y_LIMIT);
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
    u32 largest = block.x[0] & ~SIGNS;
    #pragma unroll
    for (int i = 1; i < 8; ++i) largest = max_magnitudes(largest, block.x[i] & ~SIGNS);
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

// The winning code among the candidates of `mask`, as the reference finds it.
__device__ __forceinline__ int exact_search(const Block& block, float reciprocal, u32 mask, const Shared& shared) {
    float y[16];
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        y[2 * i] = scaled(magnitude<0>(block.x[i]), reciprocal);
        y[2 * i + 1] = scaled(magnitude<1>(block.x[i]), reciprocal);
    }
    int best = 0;
    float least = __uint_as_float(0x7F800000u);
    #pragma unroll 1
    for (; mask; mask &= mask - 1) {
        const int code = clamped(block.base + shared.offsets[__ffs(mask) - 1]);
        const float error = exact_error(y, scale_of(code), shared.inverses[code]);
        if (error < least) least = error, best = code;
    }
    return best;
}

// What the packed search knows of the tensor scale.
struct Unit {
    float m;
    int exponent;  // r - 2, or NEVER
};

__device__ __forceinline__ Unit unit_of(float reciprocal) {
    const u32 bits = __float_as_uint(reciprocal);
    const bool normal = bits >= 0x00800000u && bits < 0x7F800000u;
    return {__uint_as_float((bits & 0x007FFFFFu) | 0x3F800000u), normal ? (int)(bits >> 23) - 129 : NEVER};
}

// R and -S of candidate i in a row, each twice: rows 0 to 7 are base % 8, the others base from 127 - TOP to 126.
// A candidate beyond 126 that repeats another is NaN, which never wins.
__device__ __forceinline__ uint2 table_entry(int row, int i, float m, const Shared& shared) {
    const uint2 never = make_uint2(0x7FFF7FFFu, 0x7FFF7FFFu);
    if (i >= COUNT) return never;
    const int base = row < 8 ? 64 + row : 127 - TOP + row - 8;
    const int code = min(base + shared.offsets[i], MAX_CODE);
    if (row >= 8 && i > 0 && base + shared.offsets[i - 1] >= MAX_CODE) return never;
    const float relative = scale_of(code) * __uint_as_float((u32)(134 - (base >> 3)) << 23);  // times 2^-E
    const float r = m * inverse_of(relative) * (1.0f / 4096), s = relative * inverse_of(m) * -4096.0f;
    return make_uint2(to_half2(r, r), to_half2(s, s));
}

// The candidates that can be the winner: bit i for candidate i. a: the elements, if they are not all.
__device__ __forceinline__ u32 approximate_search(
    const Block& block, const Unit& unit, const uint4* table, u32 (&a)[8])
{
    const int shift = unit.exponent - (block.base >> 3) + 7;  // a = |x| 2^shift
    // fp16: the factor is a power of two from 2^-24 to 2^15. bf16: products 2^112 times smaller are bf16 whose
    // exponent and mantissa, three bits to the left, are fp16's.
    const int low = HALF ? shift + 24 : shift - 112 + 133, normal = HALF ? 10 : 7;
    if (block.base < 8 - min(LOWEST, 0) || block.v > 464.0f || low < 0 || low > (HALF ? 39 : 260)) return ALL;
    const u32 factor = (low < normal ? 1u << low : (u32)(low - normal + 1) << normal) * 0x10001u;
    u32 norm = 0;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 magnitudes = block.x[i] & ~SIGNS;
        a[i] = HALF ? mul_half2(magnitudes, factor) : mul_bf162(magnitudes, factor) << 3;
        norm = fma_half2(a[i], a[i], norm);
    }
    const int row = TOP && block.base > MAX_CODE - TOP ? block.base - (127 - TOP) + 8 : block.base & 7;
    table += row * QUADS;

    u32 errors[2 * PAIRS];
    #pragma unroll
    for (int quad = 0; quad < (COUNT + 1) / 2; ++quad) {
        const uint4 entries = table[quad];
        #pragma unroll
        for (int i = 2 * quad; i < 2 * quad + 2 && i < COUNT; ++i) {
            const u32 r = i % 2 ? entries.z : entries.x, s = i % 2 ? entries.w : entries.y;
            u32 sum = 0;
            #pragma unroll
            for (int j = 0; j < 8; ++j) {
                u32 q = (mul_half2(a[j], r) + 0x01000100u) & 0xFE00FE00u;
                // At 7 and above it would be 8; absmax itself and larger scales do not reach 6.4.
                if (offset_list[i] < 0) q = min_half2(q, 0x0E000E00u);
                const u32 d = fma_half2(q, s, a[j]);
                sum = fma_half2(d, d, sum);
            }
            errors[i] = sum;
        }
    }
    if (COUNT % 2) errors[2 * PAIRS - 1] = 0x7FFF7FFFu;

    // Candidates i and i + PAIRS in a register.
    u32 pairs[PAIRS], least;
    #pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        pairs[i] = add_half2(__byte_perm(errors[i], errors[i + PAIRS], 0x5410),
                             __byte_perm(errors[i], errors[i + PAIRS], 0x7632));
        least = i ? min_half2(least, pairs[i]) : pairs[i];
    }
    const float m = half_to_float(min_half2(least, least >> 16) & 0xFFFFu);
    const float n = half_to_float(add_half2(norm, norm >> 16) & 0xFFFFu);
    const float limit = A * A * m + 2 * A * B * square_root(m * n) + B * B * n + C;
    // A little more, so that rounding it down does no harm; bit 15 then takes no part in the differences.
    const u32 limits = to_half2(limit * 1.001f, limit * 1.001f) | SIGNS;
    u32 flags = 0;
    #pragma unroll
    for (int i = 0; i < PAIRS; ++i) flags = flags >> 1 | ((limits - pairs[i]) & SIGNS);
    return (flags >> (16 - PAIRS) & ((1u << PAIRS) - 1)) | flags >> (32 - PAIRS) << PAIRS;
}

struct Outputs {
    uint2* packed;
    u8* scales;
    uint4* values;
    int blocks;  // a row
};

__device__ __forceinline__ void write_scale(const Outputs& out, int code, u32 index, int row, int column) {
    const size_t at = PACKED == 1 ? index
        : ((size_t)(row / 128) * ((out.blocks + 3) / 4) + column / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4
            + column % 4;
    out.scales[at] = code;
}

// Codes of a block out of its elements a, in packed fp16, and its scale; false, and nothing is written, where an
// element is so near a midpoint that this cannot tell.
//
// R = 2^-2 m 2^E / s is the sum of two halves, good to 2^-21. Then fma(a, high, fp16(a low)) is t 2^-4 rounded to
// fp16, and so is, another time, t 2^-14 for the subnormals' sake. Midpoints are fp16 numbers, so neither rounding
// takes a t from one side of a midpoint to the other, only to the midpoint: there alone the side is unknown. What
// is on top of those roundings, here and in the reference (2^-20 t), is less than half a step of fp16.
__device__ __forceinline__ bool write_packed(
    const Block& block, const u32 (&a)[8], int code, const Unit& unit, const Shared& shared, const Outputs& out,
    u32 index, int row, int column)
{
    const float r = shared.inverses[code] * unit.m * __uint_as_float((u32)(118 + (block.base >> 3)) << 23);
    const u32 high = to_half2(r, r);
    const float rest = r - half_to_float(high & 0xFFFFu);
    const u32 low = to_half2(rest, rest);
    u32 nibbles[8], nearest = 0x01FF01FFu;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 t = mul_half2(fma_half2(a[i], high, mul_half2(a[i], low)), 0x14001400u);  // 2^-10
        u32 sum = t + 0x01000100u;
        nearest = min_half2(nearest, sum & 0x01FF01FFu);
        if (LOWEST < 0) sum = min_half2(sum, 0x0FFF0FFFu);
        // The code comes below the sign; what is below the code is dropped later.
        nibbles[i] = (sum << 3 & ~SIGNS) | (block.x[i] & SIGNS);
    }
    if (min(nearest & 0xFFFFu, nearest >> 16) == 0) return false;
    u32 words[2];
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32* n = nibbles + 4 * i;
        const u32 even = __byte_perm(__byte_perm(n[0], n[1], 0x0051), __byte_perm(n[2], n[3], 0x0051), 0x5410);
        const u32 odd = __byte_perm(__byte_perm(n[0], n[1], 0x0073), __byte_perm(n[2], n[3], 0x0073), 0x5410);
        words[i] = (even >> 4 & 0x0F0F0F0Fu) | (odd & 0xF0F0F0F0u);
    }
    out.packed[index] = make_uint2(words[0], words[1]);
    write_scale(out, code, index, row, column);
    return true;
}

// Codes and values of a block under the scale of `code`. index: among all blocks; column: in its row.
__device__ __forceinline__ void write(
    const Block& block, int code, float reciprocal, float fold, const Shared& shared, const Outputs& out,
    u32 index, int row, int column)
{
    const bool finite = block.amax < INFINITE;
    const float inverse = shared.inverses[code];
    u32 codes[2], values[8];
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32* x = block.x + 4 * half;
        u32 parts[2];
#if __CUDA_ARCH__ >= 1000
        #pragma unroll
        for (int i = 0; i < 4 * (PACKED > 0); ++i) {
            const u32 both = to_e2m1(magnitude<0>(x[i]) * reciprocal * inverse,
                                     magnitude<1>(x[i]) * reciprocal * inverse);
            parts[i / 2] = i % 2 ? parts[i / 2] | both << 8 : both;
        }
#endif
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (HARDWARE_E2M1 && !VALUES) continue;
            float low_power, high_power;  // the limit of y is far above any 6 * scale
            const float low = rounded(magnitude<0>(x[i]) * reciprocal * inverse, low_power);
            const float high = rounded(magnitude<1>(x[i]) * reciprocal * inverse, high_power);
            if (PACKED && !HARDWARE_E2M1) {
                const u32 l = __float_as_uint(low), h = __float_as_uint(high);
                const u32 both = (l + (l >> 22)) + (h + (h >> 22)) * 16;
                parts[i / 2] = i % 2 ? parts[i / 2] + both * 256 : both;
            }
            if (VALUES) {
                const float scale = finite ? scale_of(code) * fold : __uint_as_float(0x7FC00000u);
                const float v = element(low, low_power) * scale, w = element(high, high_power) * scale;
#if HALF
                const u32 pair = to_half2(v, w);
#else
                const u32 pair = __byte_perm(__float_as_uint(v), __float_as_uint(w), 0x7632);
#endif
                values[4 * half + i] = pair | (x[i] & SIGNS);
            }
        }
        if (PACKED) {
            // The signs of even and of odd elements, at the top of four bytes each.
            const u32 even = __byte_perm(__byte_perm(x[0], x[1], 0x0051), __byte_perm(x[2], x[3], 0x5100), 0x7610);
            const u32 odd = __byte_perm(__byte_perm(x[0], x[1], 0x0073), __byte_perm(x[2], x[3], 0x7300), 0x7610);
            const u32 signs = (even >> 4 & 0x08080808u) | (odd & 0x80808080u);
            codes[half] = finite ? __byte_perm(parts[0], parts[1], 0x5410) | signs : 0;
        }
    }
    if (PACKED) {
        out.packed[index] = make_uint2(codes[0], codes[1]);
        write_scale(out, finite ? code : NAN_CODE, index, row, column);
    }
    if (VALUES) {
        out.values[2ull * index] = make_uint4(values[0], values[1], values[2], values[3]);
        out.values[2ull * index + 1] = make_uint4(values[4], values[5], values[6], values[7]);
    }
}

// --- kernel ----------------------------------------------------------------------------------------------

// x: rows of 16 * blocks 16-bit values, x_stride apart, 16-byte aligned. tensor_scale: fp32, one (SCALE 0) or one
// a row (1); for SCALE 2 written, unless null. packed: (rows, 8 * blocks) bytes. scales: (rows, blocks), or tiles
// (padding is not written). values: (rows, 16 * blocks). residual: fp32, one a row, or one (SCALE 0).
// A thread block takes `share` blocks: of all, block after block (SCALE 0), or of row blockIdx.x, in the order of
// blockIdx.y. Shared memory: 640 bytes, the table's TABLE_ROWS * QUADS * 16, and 4 * share if COUNT > 1.
extern "C" __global__ void __launch_bounds__(THREADS) quantize_nvfp4(
    const u16* __restrict__ x, float* __restrict__ tensor_scale, uint2* __restrict__ packed,
    u8* __restrict__ scales, uint4* __restrict__ values, float* __restrict__ residual,
    int x_stride, int rows, int blocks, int share)
{
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *(Shared*)memory;
    uint4* table = (uint4*)(memory + 640);
    u32* queue = (u32*)(table + TABLE_ROWS * QUADS);
    const int tid = threadIdx.x;
    const Outputs out = {packed, scales, values, blocks};

    const int first_row = SCALE ? blockIdx.x : 0;
    const int first = SCALE ? blockIdx.y * share : blockIdx.x * share;
    const int last = min(first + share, SCALE ? blocks : rows * blocks);
    if (tid == 0) shared.queued = 0, shared.row_amax = 0;
    for (int i = tid; i < COUNT; i += THREADS) shared.offsets[i] = offset_list[i];
    for (int code = tid + MIN_CODE; code <= MAX_CODE; code += THREADS) shared.inverses[code] = 1.0f / scale_of(code);

    float scale;
    if (SCALE == 2) {
        const u16* from = x + (long long)first_row * x_stride;
        u32 largest = 0;
        __syncthreads();
        for (int i = tid; i < 2 * blocks; i += THREADS) {
            const uint4 quad = *(const uint4*)(from + 8 * i);
            const u32 words[4] = {quad.x, quad.y, quad.z, quad.w};
            #pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u32 low = words[j] & 0x7FFFu, high = words[j] >> 16 & 0x7FFFu;
                largest = max(largest, max(low < INFINITE ? low : 0, high < INFINITE ? high : 0));
            }
        }
        atomicMax(&shared.row_amax, largest);
        __syncthreads();
        // As `tensor_scale_of`: fp32(1 / 2688), and 2^-126.
        const u32 amax = shared.row_amax;
        scale = amax ? fmaxf(magnitude<0>(amax) * 0.00037202381645329297f, 1.1754943508222875e-38f) : 1.0f;
        if (tensor_scale != nullptr && tid == 0 && first == 0) tensor_scale[first_row] = scale;
    } else {
        scale = tensor_scale[first_row];
    }
    const float reciprocal = 1.0f / scale;
    float fold = 1.0f;
    if (VALUES) {
        // As `fold_exponent`.
        const int exponent = min(max((int)(__float_as_uint(scale) >> 23) - 127, HALF ? -14 : -100), HALF ? 4 : 116);
        fold = __uint_as_float((u32)(exponent + 127) << 23);
        if (tid == 0 && first == 0) residual[first_row] = scale * __uint_as_float((u32)(127 - exponent) << 23);
    }
    const Unit unit = unit_of(reciprocal);
    __syncthreads();
    for (int i = tid; i < TABLE_ROWS * QUADS * 2; i += THREADS)
        ((uint2*)table)[i] = table_entry(i / (QUADS * 2), i % (QUADS * 2), unit.m, shared);
    __syncthreads();

    auto row_of = [&](int at) { return SCALE ? first_row : at / blocks; };
    auto column_of = [&](int at, int row) { return SCALE ? at : at - row * blocks; };
    auto address = [&](int row, int column) { return x + (size_t)(u32)row * (u32)x_stride + (u32)column * 16; };

    const u32 before = SCALE ? first_row * blocks : 0;
    int row = row_of(first + tid), column = column_of(first + tid, row);
    for (int at = first + tid; at < last; at += THREADS) {
        Block block;
        load(block, address(row, column));
        find_base(block, reciprocal);
        if (COUNT == 1) {
            write(block, clamped(block.base + LOWEST), reciprocal, fold, shared, out, before + at, row, column);
        } else {
            u32 mask = 1, a[8];  // for zeros, and where nobody asks
            bool known = false;
            if (block.amax - 1 < INFINITE - 1) {
                mask = APPROXIMATE ? approximate_search(block, unit, table, a) : ALL;
                if (APPROXIMATE && (mask & (mask - 1)) == 0) {
                    const int code = clamped(block.base + shared.offsets[__ffs(mask) - 1]);
                    known = VALUES || write_packed(block, a, code, unit, shared, out, before + at, row, column);
                    if (VALUES) write(block, code, reciprocal, fold, shared, out, before + at, row, column);
                }
            }
            if (!known) queue[atomicAdd(&shared.queued, 1u)] = (u32)(at - first) | mask << 16;
        }
        column += THREADS;
        if (!SCALE) while (column >= blocks) column -= blocks, ++row;
    }
    if (COUNT == 1) return;
    __syncthreads();
    for (u32 i = tid; i < shared.queued; i += THREADS) {
        const int at = first + (queue[i] & 0xFFFFu);
        const int row = row_of(at), column = column_of(at, row);
        Block block;
        load(block, address(row, column));
        find_base(block, reciprocal);
        const u32 mask = queue[i] >> 16;
        const int code = mask & (mask - 1) ? exact_search(block, reciprocal, mask, shared)
                                           : clamped(block.base + shared.offsets[__ffs(mask) - 1]);
        write(block, code, reciprocal, fold, shared, out, before + at, row, column);
    }
}
