// Queries times their KV head's matrix, in 16 bits; and the same with NVFP4's values, scales searched along the head
// (head_blocks.cuh), the bits of search.py.
//
// A block has ROWS * 16 rows of one KV head (query_rows.cuh).
//
// Macros: those of head_blocks.cuh, and OFFSETS: the candidates, ascending, if QUANTIZED.

#include "query_rows.cuh"

#if !QUANTIZED
#define OFFSETS 0
#endif

using Policy = Candidates<OFFSETS>;

__device__ constexpr Lookup<Policy> lookup = lookup_of<Policy>();

struct Nothing {};
using Shared = Memory<Nothing, sizeof(Lookup<Policy>)>;

// Value of the E2M1 code in the lowest bits, times a scale that is 2^62 too large.
__device__ __forceinline__ float value_of(u32 code, float scale) {
    const float bits = __uint_as_float((code & 7) << 22 | (code & 8) << 28);  // 2^-126 of it
    return bits * 1.8446744073709552e19f * scale;                             // 2^64
}

// q: (tokens, heads, D), q_stride and q_head_stride apart. transformed, stored: contiguous; the latter if QUANTIZED.
// matrix: of KV heads, which have `group` query heads each. Before wait_for_results only tables and the matrix are
// read.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) transform_queries(
    const u16* q, u16* transformed, u16* stored, const uint4* matrix, int tokens, int heads, int group, int q_stride,
    int q_head_stride)
{
    constexpr int GROUPS = D / COLUMNS;
    extern __shared__ __align__(16) u8 shared[];
    Shared& memory = *reinterpret_cast<Shared*>(shared);
    const Queries queries = {q, tokens, heads, group, q_stride, q_head_stride};
    const int head = ROWS == 1 ? blockIdx.x : blockIdx.y, index = ROWS == 1 ? blockIdx.y : blockIdx.x;
    const int first = index / GROUPS * TOKENS, column = index % GROUPS * COLUMNS;
    if (threadIdx.x < STEPS) memory.queued[threadIdx.x] = 0;
    if (ROWS == 1 && MATRIX) copy_matrix(memory, matrix_of(matrix, head, column));
    if (QUANTIZED) copy_lookup(memory, lookup);
    wait_for_results();

    copy_queries(memory, queries, head, first);
    wait_for_copies();
    __syncthreads();
    if (MATRIX) {
        transform_rows(memory, matrix_of(matrix, head, column), column);
        store_queries(memory, transformed, queries, head, first, column);
    }
#if QUANTIZED
    constexpr int EACH = COLUMNS / 16;
    auto present = [&](int item) { return first + item / EACH < queries.rows(); };
    auto at = [&](int item) { return memory.tokens + item / EACH * PITCH + 2 * column + item % EACH * 32; };
    auto store = [&](int item, const u32 (&words)[4], int code) {
        const float scale =
            code == NAN_CODE ? NAN : scale_of(code) * 4.611686018427388e18f;  // 2^62
        u32 pairs[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 two = words[i / 2] >> 16 * (i % 2);
            const float low = value_of(two, scale), high = value_of(two >> 8, scale);
            // Exact in either.
            pairs[i] = HALF ? to_half2(low, high)
                            : __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
        }
        uint4* to = reinterpret_cast<uint4*>(
            stored + queries.place(head, first + item / EACH) + column + item % EACH * 16);
        to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    };
    quantize_blocks<Policy, ROWS * COLUMNS>(memory, 1.0f, present, at, store);
#endif
}
