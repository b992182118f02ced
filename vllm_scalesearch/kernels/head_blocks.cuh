// Blocks of rows of one head, a token each: their product with the head's matrix, and scale blocks of 16 with
// searched scales (kv_write.cu, transform_queries.cu).
//
// * The product: a warp multiplies rows with 8 * N columns of the matrix. 16-bit rows and bf16 parts of the matrix,
//   three that hold 24 bits, are tensor core operands, and sums are fp32; fp16 rows have two parts too. Rounded to
//   16 bits, rows meet in shared memory.
// * Scales: a thread takes a scale block. It tries all candidates in packed fp16 (nvfp4_search.cuh). Where that
//   leaves several (a fifth of the blocks of normal data, two or three candidates each), each pair of block and
//   candidate goes to a queue in shared memory, and a thread computes the exact error of one pair: full warps do,
//   and the others nothing.
//
// A launch with few tokens (ROWS 1) is bound by latency, so a block has 32 columns only, and copies its part of the
// matrix before the kernels in front are done.
//
// Macros: D, HALF, ROWS (of how many times 16 tokens a block is), MATRIX (0: rows stay as they are).
#pragma once

#define BOUNDED 1
#include "nvfp4_search.cuh"
#include "nvfp4_attention.cuh"

// As in cuda_kv_write.py, `plan`.
constexpr int N = ROWS == 1 ? 1 : D <= 128 ? 2 : 4;
constexpr int COLUMNS = ROWS == 1 ? 32 : D;  // of a block
constexpr int WARPS = COLUMNS / (8 * N), THREADS = 32 * WARPS;
constexpr int TOKENS = 16 * ROWS;
constexpr int PITCH = 2 * D + 16;            // bytes of a token in shared memory
constexpr int STEPS = (ROWS * D + THREADS - 1) / THREADS;  // scale blocks of a thread, at most
// Few tokens: room for many blocks, most of which have nothing to do. Many: as many threads as registers allow.
#if __CUDA_ARCH__ >= 900
constexpr int RESIDENT = ROWS == 1 ? 7 : (D <= 128 ? 768 : 512) / THREADS;
#else
constexpr int RESIDENT = ROWS == 1 ? 7 : 512 / THREADS;
#endif

constexpr int PARTS = 3;

static_assert(D % 32 == 0);

// Shared memory of a block, with room for `Place`, what a kernel keeps there, and for what is looked up. The queue
// lies where the matrix was.
template <class Place, int LOOKUP>
struct alignas(16) Memory {
    u8 tokens[TOKENS * PITCH];
    u8 lookup[LOOKUP];
    Place place;
    u32 queued[(STEPS + 3) / 4 * 4];
    union {
        uint4 matrix[ROWS == 1 && MATRIX ? D / 32 * PARTS * THREADS : 1];
        u32 queue[1];  // STEPS times THREADS times candidates
    };
};

// body(i) for every i below COUNT, which threads share out.
template <int COUNT, class Body>
__device__ __forceinline__ void share(Body body) {
#pragma unroll
    for (int n = 0; n < (COUNT + THREADS - 1) / THREADS; n++) {
        const int i = n * THREADS + threadIdx.x;
        if (COUNT % THREADS == 0 || i < COUNT) body(i, n);
    }
}

__device__ __forceinline__ void copy_async(void* to, const void* from, bool whole) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(whole ? 16 : 0) : "memory");
}

// --- quantization ------------------------------------------------------------------------------------

// a * b + c, between 0 and 1.
__device__ __forceinline__ float saturated(float a, float b, float c) {
    float out;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(out) : "f"(a), "f"(b), "f"(c));
    return out;
}

// E2M1 of t >= 0, in the lowest byte; what floats do need not wait for the integer pipe, which the search fills.
// Steps up to 2, from there to 4 and to 6 are rounded one after the other, at 1.5 * 2^23, where a step of fp32 is 1.
// What is there when the next begins is even, so ties go to even.
__device__ __forceinline__ u32 code_of(float t) {
    const float low = saturated(t, 0.5f, 0.0f), middle = saturated(t, 0.5f, -1.0f);
    const float high = saturated(t, 0.5f, -2.0f);
    return __float_as_uint(fmaf(middle, 2.0f, fmaf(low, 4.0f, 12582912.0f)) + high);
}

// A block's codes where `factor` is 1 / scale: byte i of word t has that of value 4 t + i.
__device__ __forceinline__ void pack(const Block& block, float factor, u32 (&words)[4]) {
    const bool finite = block.amax < INFINITE;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        u32 codes[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 word = block.x[2 * t + i / 2];
            codes[i] = code_of((i % 2 ? magnitude<1>(word) : magnitude<0>(word)) * factor);
        }
        const u32 magnitudes = __byte_perm(
            __byte_perm(codes[0], codes[1], 0x0040), __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
        const u32 signs = __byte_perm(block.x[2 * t], block.x[2 * t + 1], 0x7531) >> 4 & 0x08080808u;
        words[t] = finite ? magnitudes | signs : 0;
    }
}

// Of two threads whose words share bytes, `second` having the high nibbles: words 0 and 1 of both for the first of
// them, words 2 and 3 for the second.
template <int APART>
__device__ __forceinline__ void paired(const u32 (&words)[4], bool second, u32 (&both)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 other = __shfl_xor_sync(~0u, second ? words[i] : words[2 + i], APART);
        both[i] = second ? other | words[2 + i] << 4 : words[i] | other << 4;
    }
}

// Scale blocks 0 to ITEMS - 1, a multiple of 32, which lie in shared memory at at(item). Whole warps have those for
// which present(item), and call store(item, words, code).
template <class P, int ITEMS, class Memory, class Present, class At, class Store>
__device__ __forceinline__ void quantize_blocks(
    Memory& memory, float reciprocal, Present present, At at, Store store) {
    const Lookup<P>& lookup = *reinterpret_cast<const Lookup<P>*>(memory.lookup);
    const Unit unit = unit_of(reciprocal);
#pragma unroll 1
    for (int step = 0; step * THREADS < ITEMS; step++) {
        const int item = step * THREADS + threadIdx.x;
        // A queue for each step: its errors may be read while the next one is filled.
        u32* queue = memory.queue + step * (THREADS * P::count);
        const bool here = item < ITEMS && present(item);
        Block block;
        u32 mask = 1;  // for zeros, and where nobody asks
        int queued = 0;
        if (here) {
            load(block, reinterpret_cast<const u16*>(at(item)));
            find_base(block, reciprocal);
            if (P::count > 1 && block.amax - 1 < INFINITE - 1) {
                u32 a[8];
                mask = P::approximate
                    ? approximate_search<P>(block, unit, reinterpret_cast<const uint4*>(lookup.table), a)
                    : P::all;
                if (mask & (mask - 1)) {
                    queued = atomicAdd(&memory.queued[step], __popc(mask));
                    int to = queued;
                    for (u32 left = mask; left; left &= left - 1)
                        queue[to++] = item | clamped(block.base + lookup.offsets[__ffs(left) - 1]) << 16;
                }
            }
        }
        if (P::count > 1) {
            __syncthreads();
            const int pairs = memory.queued[step];
#pragma unroll 1
            for (int i = threadIdx.x; i < pairs; i += THREADS) {
                const int code = queue[i] >> 16;
                Block other;
                load(other, reinterpret_cast<const u16*>(at(queue[i] & 0xFFFFu)));
                float y[16];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    y[2 * j] = scaled(magnitude<0>(other.x[j]), reciprocal);
                    y[2 * j + 1] = scaled(magnitude<1>(other.x[j]), reciprocal);
                }
                queue[i] = __float_as_uint(exact_error(y, scale_of(code), lookup.inverses[code]));
            }
            __syncthreads();
        }
        if (here) {
            u32 best = mask;
            if (mask & (mask - 1)) {
                // Not negative, so that bits are in the order of errors. The first of equal ones has the least code.
                u32 least = ~0u;
                for (u32 left = mask; left; left &= left - 1) {
                    const u32 error = queue[queued++];
                    if (error < least) least = error, best = left;
                }
            }
            const int code =
                clamped(block.base + (P::count > 1 ? lookup.offsets[__ffs(best) - 1] : P::offset(0)));
            u32 words[4];
            // As |x| reciprocal inverse: the first product is exact, or beyond all or nothing of what codes tell.
            pack(block, reciprocal * lookup.inverses[code], words);
            store(item, words, block.amax < INFINITE ? code : NAN_CODE);
        }
    }
}

// --- the product ------------------------------------------------------------------------------------

// Products of a warp's bf16 fragments, in fp32.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two fp16 numbers as two bf16 ones and what those leave.
__device__ __forceinline__ u32 split_halves(u32 pair, u32& rest) {
    const float low = half_to_float(pair & 0xFFFFu), high = half_to_float(pair >> 16);
    const u32 first = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
    const float low_rest = low - __uint_as_float(first << 16);
    const float high_rest = high - __uint_as_float(first & 0xFFFF0000u);
    rest = __byte_perm(__float_as_uint(low_rest), __float_as_uint(high_rest), 0x7632);
    return first;
}

// A lane's place in the matrix of a head, of the warp's first columns.
__device__ __forceinline__ const uint4* matrix_of(const uint4* matrices, int head, int column) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return matrices + static_cast<long long>(head) * (D / 32 * PARTS * (D / 8) * 32) +
           (column / 8 + N * warp) * 32 + lane;
}

// Every lane copies what it will read itself.
template <class Memory>
__device__ __forceinline__ void copy_matrix(Memory& memory, const uint4* matrix) {
#pragma unroll
    for (int i = 0; i < D / 32 * PARTS; i++)
        copy_async(&memory.matrix[i * THREADS + threadIdx.x], matrix + i * (D / 8 * 32), true);
}

// The rows in memory.tokens times the matrix, columns from `column` on, instead of them.
template <class Memory>
__device__ __forceinline__ void transform_rows(Memory& memory, const uint4* matrix, int column) {
    constexpr int TOGETHER = HALF || ROWS == 1 ? 1 : 2;  // rows: for independent sums, and few registers
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 rows = matrices_address<PITCH>(memory.tokens, lane);
    float sums[ROWS][N][4] = {};
#pragma unroll 1
    for (int j = 0; j < D / 32; j++) {
        uint4 b[PARTS][N];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#pragma unroll
            for (int n = 0; n < N; n++)
                b[part][n] = ROWS == 1 ? memory.matrix[(j * PARTS + part) * THREADS + threadIdx.x]
                                       : __ldg(matrix + (part * (D / 8) + n) * 32);
        }
        matrix += PARTS * (D / 8) * 32;
#pragma unroll
        for (int first = 0; first < ROWS; first += TOGETHER) {
            u32 x[TOGETHER][2][4], rest[TOGETHER][2][4];
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 (&words)[4] = x[r][half];
                    load_matrices(words, rows + 16 * (first + r) * PITCH + 64 * j + 32 * half);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (HALF) words[i] = split_halves(words[i], rest[r][half][i]);
                }
            }
            auto multiply = [&](const u32 (&keys)[TOGETHER][2][4], int part) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
#pragma unroll
                    for (int r = 0; r < TOGETHER; r++) {
#pragma unroll
                        for (int n = 0; n < N; n++)
                            mma_bf16(sums[first + r][n], keys[r][half], half ? b[part][n].z : b[part][n].x,
                                     half ? b[part][n].w : b[part][n].y);
                    }
                }
            };
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                multiply(x, part);
                if (HALF && part < 2) multiply(rest, part);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                *reinterpret_cast<u32*>(
                    memory.tokens + (16 * r + 8 * i + g) * PITCH + (column + 8 * (N * warp + n) + 2 * t) * 2) =
                    narrowed(sums[r][n][2 * i], sums[r][n][2 * i + 1]);
        }
    }
    __syncthreads();
}

template <class P, class Memory>
__device__ __forceinline__ void copy_lookup(Memory& memory, const Lookup<P>& lookup) {
    const uint4* from = reinterpret_cast<const uint4*>(&lookup);
    share<sizeof(lookup) / 16>([&](int i, int) { reinterpret_cast<uint4*>(memory.lookup)[i] = from[i]; });
}
