// NVFP4 with searched block scales: the bits of search.py (metric mse, policies made of offsets).
//
// A thread takes a block of 16 values. It tries all candidates in packed fp16, and knows how far that may be from
// the reference's fp32 errors (nvfp4_search.cuh). If one candidate alone can be the winner, it is; otherwise the
// block goes to a queue in shared memory, and full warps compute the exact errors of the candidates that are left.
// The winner's codes too come out of packed fp16, except where an element lies too near a midpoint; those blocks
// go the same way.
//
// Macros: HALF (0: bf16, 1: fp16), COUNT and OFFSETS (a list, ascending), LOWEST and HIGHEST of them, SCALE (0:
// one tensor scale, 1: one a row, 2: computed here from each row), PACKED (0: no codes, 1: codes and scales, 2:
// scales in 128x4 tiles), VALUES (1: dequantized values and residual), THREADS.

#define BOUNDED (SCALE != 2)  // tensor scales that come from x leave nothing above it
#include "nvfp4_search.cuh"

#if __CUDA_ARCH__ >= 1000
constexpr bool HARDWARE_E2M1 = true;  // compiled for sm_100a, sm_120a and their like
#else
constexpr bool HARDWARE_E2M1 = false;
#endif

using Policy = Candidates<OFFSETS>;
constexpr bool APPROXIMATE = Policy::approximate;
constexpr int TABLE_ROWS = Policy::table_rows, QUADS = Policy::quads;
constexpr u32 ALL = Policy::all;

__device__ constexpr int offset_list[COUNT] = {OFFSETS};

// What a thread block shares, besides the table and the queue.
struct Shared {
    u32 queued, row_amax;
    int offsets[COUNT];
    float inverses[127];  // 1 / scale of each code, correctly rounded
};

#if __CUDA_ARCH__ >= 1000
// Two fp32 values to a byte of E2M1 codes, low nibble first.
__device__ __forceinline__ u32 to_e2m1(float low, float high) {
    u32 out;
    asm("{.reg .b8 code; .reg .b16 wide; cvt.rn.satfinite.e2m1x2.f32 code, %2, %1; mov.b16 wide, {code, 0}; "
        "cvt.u32.u16 %0, wide;}" : "=r"(out) : "f"(low), "f"(high));
    return out;
}
#endif

// --- a block ---------------------------------------------------------------------------------------------

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

// R and -S of candidate i in a row, as `approximate_search` looks them up.
__device__ __forceinline__ uint2 table_entry(int row, int i, float m, const Shared& shared) {
    const uint2 never = make_uint2(0x7FFF7FFFu, 0x7FFF7FFFu);
    if (i >= COUNT) return never;
    const int base = base_of<Policy>(row);
    const int code = min(base + shared.offsets[i], MAX_CODE);
    if (row >= 8 && i > 0 && base + shared.offsets[i - 1] >= MAX_CODE) return never;
    const float relative = scale_of(code) * __uint_as_float((u32)(134 - (base >> 3)) << 23);  // times 2^-E
    const float r = m * inverse_of(relative) * (1.0f / 4096), s = relative * inverse_of(m) * -4096.0f;
    return make_uint2(to_half2(r, r), to_half2(s, s));
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
                mask = APPROXIMATE ? approximate_search<Policy>(block, unit, table, a) : ALL;
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
