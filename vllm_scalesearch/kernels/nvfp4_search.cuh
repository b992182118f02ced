// The search for a block's scale in packed fp16, where an element costs 2.5 instructions a candidate: which
// candidates can be the winner that search.py finds in fp32.
//
// Units. c0 is the absmax code and 2^E its power of two, 2^r <= 1 / tensor_scale < 2^(r + 1) and
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
//    and less of both where the R and S looked up are known to be off by less than u (slack_of),
//    C = 2^-15 for what is subnormal (2^-25 each in d, a and the sums) and the reference's own roundings.
#pragma once

#include "nvfp4_block.cuh"
#include "packed_halves.cuh"

constexpr int NEVER = 1 << 20;

// Offsets from the absmax code, ascending.
template <int... list>
struct Candidates {
    static constexpr int count = sizeof...(list);

    static __device__ constexpr int offset(int i) {
        constexpr int offsets[count] = {list...};
        return offsets[i];
    }

    static constexpr int lowest = offset(0), highest = offset(count - 1);
    // The packed search takes scales from half to twice that of absmax; R and S are normal there.
    static constexpr bool approximate = count > 1 && lowest >= -8 && highest <= 8;
    static constexpr int top = highest > 0 && approximate ? highest : 0;  // absmax codes with a candidate above 126
    static constexpr int table_rows = approximate ? 8 + top : 0;
    static constexpr int quads = (count + 1) / 2 | 1;  // of a row; odd, so that eight rows lie in different banks
    static constexpr int pairs = (count + 1) / 2;
    static constexpr u32 all = (1u << count) - 1;
};

// --- instructions ----------------------------------------------------------------------------------------

__device__ __forceinline__ u32 mul_bf162(u32 a, u32 b) {
    u32 out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(SIGNS));  // a * b - 0
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

// --- a block ---------------------------------------------------------------------------------------------

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

// The absmax code that a row of the table is for: rows 0 to 7 are base % 8, the others base from 127 - top to 126.
template <class P>
__device__ constexpr int base_of(int row) {
    return row < 8 ? 64 + row : 127 - P::top + row - 8;
}

// What the errors of the packed search can be off by: T is of_least m + of_root sqrt(m n), and a little that
// candidates_left adds.
struct Slack {
    float of_least, of_root;
};

constexpr float MORE = 1.001f;  // of T, so that rounding it down to fp16 does no harm

// r, s: the largest relative errors of R and of S in units of u. At the midpoint 1.75, where it counts most (as much at
// 3.5), t is off by 1.75 r u through R and by u through the product.
__device__ constexpr Slack slack_of(float r, float s) {
    const float delta = (1.75f * r + 1) / 2048, alpha = delta / ((0.25f - delta) * (0.25f - delta));
    return {1.0129f * MORE * (1 + alpha), 2 * 1.0175f * MORE * (2.03f / 2048) * s};
}

// The row of a base that the packed search takes.
template <class P>
__device__ __forceinline__ int row_of_base(int base) {
    return P::top && base > MAX_CODE - P::top ? base - (127 - P::top) + 8 : base & 7;
}

// What makes elements of magnitudes, twice; 0 for a base that the packed search does not take.
// fp16: a power of two from 2^-24 to 2^15. bf16: products 2^112 times smaller are bf16 whose exponent and mantissa,
// three bits to the left, are fp16's.
template <class P>
__device__ __forceinline__ u32 factor_of(int base, const Unit& unit) {
    const int shift = unit.exponent - (base >> 3) + 7;  // a = |x| 2^shift
    const int low = HALF ? shift + 24 : shift - 112 + 133, normal = HALF ? 10 : 7;
    if (base < 8 - min(P::lowest, 0) || low < 0 || low > (HALF ? 39 : 260)) return 0;
    return (low < normal ? 1u << low : (u32)(low - normal + 1) << normal) * 0x10001u;
}

__device__ __forceinline__ void find_elements(const Block& block, u32 factor, u32 (&a)[8]) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 magnitudes = magnitudes_of(block.x[i]);
        a[i] = HALF ? mul_half2(magnitudes, factor) : mul_bf162(magnitudes, factor) << 3;
    }
}

// The candidates that can be the winner: bit i for candidate i.
// table: of the base's row, R and -S of each candidate, each twice. A candidate beyond 126 that repeats another is
// NaN, which never wins. one: 1; where the compiler does not know that, additions are multiply-adds, off the integer
// pipe that the rest of the rounding fills.
template <class P>
__device__ __forceinline__ u32 candidates_left(const u32 (&a)[8], const uint4* table, const Slack& slack, u32 one) {
    const u32 half_step = 0x01000100u, held = half_step * one;  // in a register, if one is unknown
    u32 norm = 0;
    #pragma unroll
    for (int i = 0; i < 8; ++i) norm = fma_half2(a[i], a[i], norm);

    u32 errors[2 * P::pairs];
    #pragma unroll
    for (int quad = 0; quad < (P::count + 1) / 2; ++quad) {
        const uint4 entries = table[quad];
        #pragma unroll
        for (int i = 2 * quad; i < 2 * quad + 2 && i < P::count; ++i) {
            const u32 r = i % 2 ? entries.z : entries.x, s = i % 2 ? entries.w : entries.y;
            u32 sum = 0;
            #pragma unroll
            for (int j = 0; j < 8; ++j) {
                const u32 t = mul_half2(a[j], r);
                // At 7 and above it would be 8; absmax itself and larger scales do not reach 6.4.
                const u32 q = (P::offset(i) < 0 ? add_min(t, held, 0x0FFF0FFFu) : t * one + half_step) & 0xFE00FE00u;
                const u32 d = fma_half2(q, s, a[j]);
                sum = fma_half2(d, d, sum);
            }
            errors[i] = sum;
        }
    }
    if (P::count % 2) errors[2 * P::pairs - 1] = 0x7FFF7FFFu;

    // Candidates i and i + pairs in a register.
    u32 pairs[P::pairs], least;
    #pragma unroll
    for (int i = 0; i < P::pairs; ++i) {
        pairs[i] = add_half2(__byte_perm(errors[i], errors[i + P::pairs], 0x5410),
                             __byte_perm(errors[i], errors[i + P::pairs], 0x7632));
        least = i ? min_half2(least, pairs[i]) : pairs[i];
    }
    const float m = half_to_float(min_half2(least, least >> 16) & 0xFFFFu);
    const float n = half_to_float(add_half2(norm, norm >> 16) & 0xFFFFu);
    constexpr float B = 2.03f / 2048, C = 1.0f / 32768;
    const float limit =
        fmaf(slack.of_least, m, fmaf(slack.of_root, square_root(m * n), fmaf(B * B * MORE, n, C * MORE)));
    const u32 limits = to_half2(limit, limit);
    // Flags as bits of 1024 and more.
    u32 flags = 0x64006400u;
    #pragma unroll
    for (int i = 0; i < P::pairs; ++i)
        flags = fma_half2(at_most(pairs[i], limits), (u32)((15 + i) << 10) * 0x10001u, flags);
    return (flags & 0xFFu) | (flags >> 16 & 0xFFu) << P::pairs;
}

// The same of a block, and its elements if it can be done so; all candidates if not.
template <class P>
__device__ __forceinline__ u32 approximate_search(
    const Block& block, const Unit& unit, const uint4* table, u32 (&a)[8])
{
    const u32 factor = factor_of<P>(block.base, unit);
    if (factor == 0 || block.v > 464.0f) return P::all;
    find_elements(block, factor, a);
    return candidates_left<P>(a, table + row_of_base<P>(block.base) * P::quads, slack_of(1, 1), 1);
}

// --- a tensor scale that is a power of two ------------------------------------------------------------------

// Then m is 1, and all that the search looks up is known to the compiler.
template <class P>
struct alignas(16) Lookup {
    u32 table[(P::table_rows ? P::table_rows * P::quads : 1) * 4];
    float inverses[128];  // 1 / scale of each code, correctly rounded
    int offsets[(P::count + 3) / 4 * 4];
};

template <class P>
__device__ constexpr Lookup<P> lookup_of() {
    Lookup<P> out = {};
    for (int row = 0; row < P::table_rows; ++row) {
        const int base = base_of<P>(row);
        for (int i = 0; i < 2 * P::quads; ++i) {
            u32 r = 0x7FFF, s = 0x7FFF;
            const bool repeats = row >= 8 && i > 0 && i < P::count && base + P::offset(i - 1) >= MAX_CODE;
            if (i < P::count && !repeats) {
                const int wanted = base + P::offset(i), code = wanted < MAX_CODE ? wanted : MAX_CODE;
                // The scale is eighths / 8 * 2^binade times base's power of two; R is 2^-12 / that, rounded.
                const int eighths = 8 + code % 8, binade = code / 8 - base / 8;
                s = 0x8000 | (27 + binade) << 10 | code % 8 << 7;
                r = (eighths == 8 ? (3 - binade) << 10
                                  : ((2 - binade) << 10) + (32768 + eighths) / (2 * eighths) - 1024);
            }
            out.table[(row * 2 * P::quads + i) * 2] = r * 0x10001u;
            out.table[(row * 2 * P::quads + i) * 2 + 1] = s * 0x10001u;
        }
    }
    for (int code = MIN_CODE; code <= MAX_CODE; ++code) {
        float scale = code < 8 ? code : 8 + code % 8;
        for (int i = code < 8 ? 1 : code / 8; i < 10; ++i) scale *= 0.5f;
        for (int i = 10; i < code / 8; ++i) scale *= 2.0f;
        out.inverses[code] = 1.0f / scale;
    }
    for (int i = 0; i < P::count; ++i) out.offsets[i] = P::offset(i);
    return out;
}
