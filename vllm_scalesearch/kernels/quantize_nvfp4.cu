// NVFP4 with searched block scales: the bits of search.py (metric mse, policies made of offsets).
//
// A thread takes a block of 16 values. It tries all candidates in packed fp16, and knows how far that may be from
// the reference's fp32 errors (nvfp4_search.cuh). If one candidate alone can be the winner, it is. The winner's
// codes too come out of packed fp16, except where an element lies too near a midpoint.
//
// Other blocks go to queues in shared memory, which each warp has for itself and empties whenever there is a block
// for each of its lanes, so that nothing waits for other warps: one queue for blocks with at most two candidates
// left, whose exact errors are straight code, one for the rest. What is in the queues in the end is shared out anew.
//
// A thread's next block is copied to shared memory while it searches the one before, which takes 6 % off.
//
// Macros: HALF (0: bf16, 1: fp16), COUNT and OFFSETS (a list, ascending), LOWEST and HIGHEST of them, SCALE (0:
// one tensor scale, 1: one a row, 2: computed here from each row), FLAT (1, for SCALE 0: x has a single row), PACKED
// (0: no codes, 1: codes and scales, 2: scales in 128x4 tiles), VALUES (1: dequantized values and residual), THREADS.

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

constexpr int WARPS = THREADS / 32;
constexpr bool MANY_ROWS = SCALE == 0 && !FLAT;  // of a thread block

// Thread blocks that a multiprocessor is to hold at a time, where that is how many there are.
constexpr int RESIDENT = SCALE ? 1 : (COUNT > 1 ? 1024 : 2048) / THREADS;

// What a thread block shares, besides the table and the queues.
struct Shared {
    u32 row_amax;
    int queued[2][WARPS];  // in the end
    int offsets[COUNT];
    float inverses[127];  // 1 / scale of each code, correctly rounded
};
static_assert(sizeof(Shared) <= 640);

// What the packed search knows of a base.
struct Base {
    u32 factor;  // see factor_of
    int row;  // of the table
};

// A candidate, when it has won: R, twice; what is added to the products, twice; what of the sums is zero where the
// side of a midpoint is in doubt, twice; the offset.
struct alignas(16) Rounder {
    u32 r, half_step, doubt;
    int offset;
};

// The largest relative errors in a row of the table, as the bits of floats.
struct Errors {
    u32 r, s;
};

constexpr u32 NOT_FINITE = 1u << 16;
constexpr int BASE_BIT = 17;

// Blocks that wait for all lanes of a warp to have one: fewer than 32, and 32 more.
struct Queue {
    uint2 entries[64];  // where (`at`); candidates or NOT_FINITE, and base
};

// 16 bytes, by this thread and for it.
__device__ __forceinline__ void copy_async(uint4* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
                 :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ void load_copy(Block& block, const uint4* copy) {
    const uint4 low = copy[0], high = copy[THREADS];
    block.x[0] = low.x, block.x[1] = low.y, block.x[2] = low.z, block.x[3] = low.w;
    block.x[4] = high.x, block.x[5] = high.y, block.x[6] = high.z, block.x[7] = high.w;
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

// --- a block ---------------------------------------------------------------------------------------------

__device__ __forceinline__ int candidate(int base, int i, const Shared& shared) {
    return clamped(base + shared.offsets[i]);
}

// |y| of a block, bounded if `bound`, which is not needed where the packed search has been used.
__device__ __forceinline__ void find_y(const Block& block, float reciprocal, bool bound, float (&y)[16]) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float low = magnitude<0>(block.x[i]), high = magnitude<1>(block.x[i]);
        y[2 * i] = bound ? scaled(low, reciprocal) : low * reciprocal;
        y[2 * i + 1] = bound ? scaled(high, reciprocal) : high * reciprocal;
    }
}

// The winning code among the candidates of `mask`, as the reference finds it.
__device__ __forceinline__ int exact_search(const float (&y)[16], int base, u32 mask, const Shared& shared) {
    int best = MIN_CODE;
    float least = __uint_as_float(0x7F800000u);
    #pragma unroll 1
    for (; mask; mask &= mask - 1) {
        const int code = candidate(base, __ffs(mask) - 1, shared);
        const float error = exact_error(y, scale_of(code), shared.inverses[code]);
        if (error < least) least = error, best = code;
    }
    return best;
}

// The same of one or two candidates.
__device__ __forceinline__ int exact_choice(const float (&y)[16], int base, u32 mask, const Shared& shared) {
    const int low = candidate(base, __ffs(mask) - 1, shared), high = candidate(base, 31 - __clz(mask), shared);
    const float error = exact_error(y, scale_of(low), shared.inverses[low]);
    return exact_error(y, scale_of(high), shared.inverses[high]) < error ? high : low;
}

// R and -S of candidate i in a row, as `candidates_left` looks them up, and the rounder.
//
// In units of its last place, t = fp16(a R) is off by half a unit, and through an R that is off by e 2^-11 R by 7/8 e
// more at the largest of the midpoints (1.75 and 3.5). So the true t may be on either side of a midpoint where the
// computed one is the midpoint, and also where it is the number above (below) if R is too large (small), unless e is
// small. half_step makes those two sums 0 and 1 beyond the step. The reference's own roundings, 2^-20 t, are 1/500 of
// a unit.
__device__ __forceinline__ uint2 table_entry(
    int row, int i, float m, const Shared& shared, Rounder& rounder, Errors& largest)
{
    const uint2 never = make_uint2(0x7FFF7FFFu, 0x7FFF7FFFu);
    if (i >= COUNT) return never;
    const int base = base_of<Policy>(row);
    const int code = min(base + shared.offsets[i], MAX_CODE);
    if (row >= 8 && i > 0 && base + shared.offsets[i - 1] >= MAX_CODE) return never;
    const float relative = scale_of(code) * __uint_as_float((u32)(134 - (base >> 3)) << 23);  // times 2^-E
    const float r = m * inverse_of(relative) * (1.0f / 4096), s = relative * inverse_of(m) * -4096.0f;
    const u32 rounded_r = to_half2(r, r), rounded_s = to_half2(s, s);
    const float rest = r - half_to_float(rounded_r & 0xFFFFu);
    const bool close = fabsf(rest) <= r * (0.56f / 2048);
    rounder = {rounded_r, !close && rest > 0 ? 0x01010101u : 0x01000100u, close ? 0x01FF01FFu : 0x01FE01FEu,
               shared.offsets[i]};
    // In units of 2^-11, and what the arithmetic here is off by; as integers, floats above 0 are in the same order.
    atomicMax(&largest.r, __float_as_uint(fabsf(rest) * inverse_of(r) * 2048 + 0.002f));
    const float rest_of_s = s - half_to_float(rounded_s & 0xFFFFu);
    atomicMax(&largest.s, __float_as_uint(fabsf(rest_of_s * inverse_of(s)) * 2048 + 0.002f));
    return make_uint2(rounded_r, rounded_s);
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
__device__ __forceinline__ bool write_packed(
    const Block& block, const u32 (&a)[8], int code, const Rounder& rounder, const Outputs& out, u32 index, int row,
    int column)
{
    u32 sums[8], nearest = rounder.doubt;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 t = mul_half2(a[i], rounder.r);
        const u32 sum = LOWEST < 0 ? add_min(t, rounder.half_step, 0x0FFF0FFFu) : t + rounder.half_step;
        nearest = min_half2(nearest, sum & rounder.doubt);
        sums[i] = selected(SIGNS, block.x[i], sum);
    }
    if ((nearest & 0xFFFFu) == 0 || nearest >> 16 == 0) return false;
    u32 words[2];
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        // Of even and of odd elements four bytes each: the sign, three zeros, the code and a bit below it.
        const u32* n = sums + 4 * i;
        const u32 low = __byte_perm(n[0], n[1], 0x7531), high = __byte_perm(n[2], n[3], 0x7531);
        const u32 even = __byte_perm(low, high, 0x6420), odd = __byte_perm(low, high, 0x7531);
        const u32 even_code = selected(0x07070707u, even >> 1, even >> 4);
        const u32 odd_code = selected(SIGNS | SIGNS >> 8, odd, odd << 3);
        words[i] = selected(0x0F0F0F0Fu, even_code, odd_code);
    }
    out.packed[index] = make_uint2(words[0], words[1]);
    write_scale(out, code, index, row, column);
    return true;
}

// Codes and values of a block under the scale of `code`. index: among all blocks; column: in its row.
__device__ __forceinline__ void write(
    const Block& block, const float (&y)[16], int code, bool finite, float fold, const Shared& shared,
    const Outputs& out, u32 index, int row, int column)
{
    const float inverse = shared.inverses[code];
    u32 codes[2], values[8];
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32* x = block.x + 4 * half;
        const float* of_half = y + 8 * half;
        u32 parts[2];
#if __CUDA_ARCH__ >= 1000
        #pragma unroll
        for (int i = 0; i < 4 * (PACKED > 0); ++i) {
            const u32 both = to_e2m1(of_half[2 * i] * inverse, of_half[2 * i + 1] * inverse);
            parts[i / 2] = i % 2 ? parts[i / 2] | both << 8 : both;
        }
#endif
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (HARDWARE_E2M1 && !VALUES) continue;
            float low_power, high_power;
            const float low = rounded(of_half[2 * i] * inverse, low_power);
            const float high = rounded(of_half[2 * i + 1] * inverse, high_power);
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
// SCALE 0: thread blocks, as many as the GPU holds, take turns. Else a thread block takes `share` blocks of row
// blockIdx.x, in the order of blockIdx.y. gridDim.z: 1.
// Shared memory: 640 bytes; if the packed search can be used 128 * 8, 16 * 8, and TABLE_ROWS * QUADS times 16 and 32;
// if COUNT > 1 THREADS * 96.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) quantize_nvfp4(
    const u16* __restrict__ x, float* __restrict__ tensor_scale, uint2* __restrict__ packed,
    u8* __restrict__ scales, uint4* __restrict__ values, float* __restrict__ residual,
    int x_stride, int rows, int blocks, int share)
{
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& shared = *(Shared*)memory;
    Base* bases = (Base*)(memory + 640);
    Slack* slacks = (Slack*)(bases + 128);  // of the table's rows; their Errors before
    uint4* table = (uint4*)(slacks + 16);
    Rounder* rounders = (Rounder*)(table + TABLE_ROWS * QUADS);
    Queue* queues = APPROXIMATE ? (Queue*)(rounders + TABLE_ROWS * QUADS * 2) : (Queue*)bases;
    const int tid = threadIdx.x;
    // A thread's present and next block, in turns; the halves apart, so that those of neighbours lie side by side.
    uint4* const copies = (uint4*)(queues + 2 * WARPS) + tid;
    const Outputs out = {packed, scales, values, blocks};

    const int first_row = SCALE ? blockIdx.x : 0;
    const int first = SCALE ? blockIdx.y * share : blockIdx.x * THREADS;
    const int last = SCALE ? min(first + share, blocks) : rows * blocks;
    const int stride = SCALE ? THREADS : gridDim.x * THREADS;
    auto address = [&](int row, int column) { return x + (size_t)(u32)row * (u32)x_stride + (size_t)(u32)column * 16; };
    auto index_of = [&](int row, int column) { return (u32)(row * blocks + column); };

    // Of the next block; where there are many rows, `at` counts the blocks of all.
    int at = first + tid;
    int row = MANY_ROWS ? at / blocks : first_row, column = MANY_ROWS ? at - row * blocks : at;
    const int row_stride = MANY_ROWS ? stride / blocks : 0, column_stride = stride - row_stride * blocks;
    auto advance = [&](int& at, int& row, int& column) {
        at += stride, column += column_stride, row += row_stride;
        if (MANY_ROWS && column >= blocks) column -= blocks, ++row;
    };
    auto copy = [&](uint4* to, int row, int column) {
        const u16* from = address(row, column);
        copy_async(to, from);
        copy_async(to + THREADS, from + 8);
    };
    int turn = 0;
    if (COUNT > 1 && at < last) copy(copies, row, column);

    if (tid == 0) shared.row_amax = 0;
    if (APPROXIMATE && tid < 16) ((Errors*)slacks)[tid] = {};
    #pragma unroll 1
    for (int i = tid; i < COUNT; i += THREADS) shared.offsets[i] = offset_list[i];
    #pragma unroll 1
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
    if (APPROXIMATE) {
        #pragma unroll 1
        for (int i = tid; i < TABLE_ROWS * QUADS * 2; i += THREADS) {
            const int row = i / (QUADS * 2);
            ((uint2*)table)[i] =
                table_entry(row, i - row * QUADS * 2, unit.m, shared, rounders[i], ((Errors*)slacks)[row]);
        }
        #pragma unroll 1
        for (int code = tid; code < 128; code += THREADS)
            bases[code] = {factor_of<Policy>(code, unit), row_of_base<Policy>(code)};
        __syncthreads();
        if (tid < TABLE_ROWS) {
            const Errors largest = ((Errors*)slacks)[tid];
            slacks[tid] = slack_of(__uint_as_float(largest.r), __uint_as_float(largest.s));
        }
        __syncthreads();
    }

    const int lane = tid % 32;
    const u32 one = gridDim.z;  // which the compiler does not know
    // The last 32 blocks of a queue, or those that there are, by exact arithmetic.
    auto resolve = [&](const Queue& queue, int& queued, bool few) {
        const int count = min(queued, 32);
        queued -= count;
        __syncwarp();
        if (lane < count) {
            const uint2 entry = queue.entries[queued + lane];
            const int row = MANY_ROWS ? entry.x / blocks : first_row, column = entry.x - MANY_ROWS * row * blocks;
            Block block;
            load(block, address(row, column));
            float y[16];
            find_y(block, reciprocal, !few, y);
            const int base = entry.y >> BASE_BIT;
            const u32 mask = entry.y & 0xFFFFu;
            const int code = few ? exact_choice(y, base, mask, shared) : exact_search(y, base, mask, shared);
            const bool finite = few || !(entry.y & NOT_FINITE);
            write(block, y, code, finite, fold, shared, out, index_of(row, column), row, column);
        }
        __syncwarp();
    };
    Queue& few = queues[tid / 32 * 2];
    Queue& many = queues[tid / 32 * 2 + 1];
    int few_queued = 0, many_queued = 0;
    enum Left { DONE, FEW, MANY };
    // Without branches: of a warp's blocks some are nearly always for `few`, and often one is for `many`.
    auto push = [&](Left left, u32 what) {
        const u32 of_few = __ballot_sync(~0u, left == FEW), of_many = __ballot_sync(~0u, left == MANY);
        uint2* const end = left == FEW ? few.entries + few_queued : many.entries + many_queued;
        const u32 before = (left == FEW ? of_few : of_many) & ((1u << lane) - 1);
        if (left != DONE) end[__popc(before)] = make_uint2(at, what);
        few_queued += __popc(of_few), many_queued += __popc(of_many);
    };

    // All that is left in the warps' queues of a kind, 32 to each: from the first warp on, or from the last.
    auto share_out = [&](int kind, Queue& queue, int& queued) {
        if (lane == 0) shared.queued[kind][tid / 32] = queued;
        __syncthreads();
        int warp = 0, i = kind ? THREADS - 1 - tid : tid;
        #pragma unroll 1
        while (warp < WARPS && i >= shared.queued[kind][warp]) i -= shared.queued[kind][warp++];
        const bool mine = warp < WARPS;
        uint2 entry;
        if (mine) entry = queues[2 * warp + kind].entries[i];
        __syncthreads();
        const u32 lanes = __ballot_sync(~0u, mine);
        queued = __popc(lanes);
        if (mine) queue.entries[__popc(lanes & ((1u << lane) - 1))] = entry;
    };

    #pragma unroll 1
    while (true) {
        const bool more = at - lane < last;
        Left left = DONE;
        u32 mask = 1;
        int base = 0;
        if (at < last) {
            Block block;
            const uint4* const copied = copies + turn;
            if (COUNT > 1) {
                wait_for_copies();
                load_copy(block, copied);
                turn = 2 * THREADS - turn;
                int next = at, next_row = row, next_column = column;
                advance(next, next_row, next_column);
                if (next < last) copy(copies + turn, next_row, next_column);
            } else {
                load(block, address(row, column));
            }
            find_base(block, reciprocal);
            base = block.base;
            if (COUNT == 1) {
                float y[16];
                find_y(block, reciprocal, true, y);
                write(block, y, clamped(base + LOWEST), block.amax < INFINITE, fold, shared, out,
                      index_of(row, column), row, column);
            } else if (APPROXIMATE && bases[base].factor != 0 && block.v <= 464.0f) {
                const Base known = bases[base];
                u32 a[8];
                find_elements(block, known.factor, a);
                mask = candidates_left<Policy>(a, table + known.row * QUADS, slacks[known.row], one);
                left = FEW;
                const u32 others = mask & (mask - 1);
                if (others & (others - 1)) left = MANY;
                if (others == 0) {
                    const Rounder rounder = rounders[known.row * QUADS * 2 + __ffs(mask) - 1];
                    const int code = min(base + rounder.offset, MAX_CODE);
                    const u32 index = index_of(row, column);
                    if (VALUES) {
                        float y[16];
                        find_y(block, reciprocal, false, y);
                        write(block, y, code, true, fold, shared, out, index, row, column);
                    }
                    if (!VALUES) load_copy(block, copied);  // for the signs, instead of eight registers
                    if (VALUES || write_packed(block, a, code, rounder, out, index, row, column)) left = DONE;
                }
            } else {
                left = MANY;
                mask = block.amax >= INFINITE ? NOT_FINITE : block.amax ? ALL : 1;
            }
        }
        if (COUNT > 1) {
            push(left, mask | (u32)base << BASE_BIT);
            const int enough = more ? 32 : 1;
            if (!more) {
                share_out(0, few, few_queued);
                share_out(1, many, many_queued);
            }
            if (few_queued >= enough) resolve(few, few_queued, true);
            if (many_queued >= enough) resolve(many, many_queued, false);
        }
        if (!more) break;
        advance(at, row, column);
    }
}
