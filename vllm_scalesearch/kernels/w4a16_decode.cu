// y = x * W^T for few rows of x (1 to 32) and NVFP4 weights, streamed once at memory speed.
//
// The weights are the copy that Humming (SM90) and Marlin keep for their own kernels, so larger products
// need no second one; nvfp4_tiles.cuh says how they lie.
//
// A block takes a tile of outputs and, when there are too few tiles to fill the GPU, a part of the inputs.
// Nothing is loaded ahead of the loop but a few steps of 32 inputs, weights and activations alike, so that
// the many small blocks of an SM hide each other's ends.
//
// Macros, besides those of nvfp4_tiles.cuh: TOKENS (8, 16, 24 or 32: at least the rows of x), GROUPS (of 64
// outputs a tile), WARPS (a group; each takes every WARPS-th step), DEPTH (steps in flight a warp, a power of
// two), CLUSTER (1: the splits of a tile are a cluster and add up through shared memory, sm_90; 0: they add up
// through global memory).

#include "nvfp4_tiles.cuh"

constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int ROWS = 64 * GROUPS;
constexpr int THREADS = 32 * WARPS * GROUPS;
constexpr int RESIDENT = TOKENS == 8 ? 1024 : TOKENS == 16 ? 640 : 512;  // threads of an SM, by their registers
constexpr int STEP = 1152;  // bytes of 32 inputs by 64 outputs
constexpr int SCALE_PAIRS = 512;  // bytes: the scales of a step as registers of two
constexpr int X_STRIDE = 80;  // bytes of a token's 32 activations; a fragment load meets all banks
constexpr int X_STEP = TOKENS * X_STRIDE;
constexpr int SUM_STRIDE = ROWS + 4;  // floats from token to token; the 4 keeps stores off each other's banks

__device__ __forceinline__ void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
#if HALF
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float to_float(u16 bits) {
    float out;
#if HALF
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
#else
    out = __uint_as_float((u32)bits << 16);
#endif
    return out;
}

__device__ __forceinline__ u16 from_float(float value) {
    u16 out;
#if HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
#endif
    return out;
}

__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from));
}

// The warps that share activations: those of one step, one of each group.
__device__ __forceinline__ void synchronize(int warp) {
    if (GROUPS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" :: "r"(warp + 1), "n"(32 * GROUPS) : "memory");
}

// x: (tokens, inputs) 16-bit, rows x_stride apart, 16-byte aligned. codes, scales: padded_inputs (a
// multiple of 32) by padded_outputs (of 64). out: (tokens, outputs), a row of it x * W^T * tensor_scale *
// factor * the row's row_scale + bias, in fp32 up to the end; bias and row_scale (tokens) may be null.
// CLUSTER: grid (tiles, splits of the inputs), tiles = ceil(padded_outputs / ROWS). Otherwise the first
// `whole` tiles are a block's each, and the rest `splits` blocks', in one dimension: the remainder that
// does not fill the GPU is dealt out evenly. Shared memory: the larger of WARPS * DEPTH *
// (GROUPS * STEP + X_STEP) + WARPS * GROUPS * 512 and WARPS * TOKENS * SUM_STRIDE * 4.
// partial: splits * ROWS * TOKENS floats a tile that is not whole; arrived: a zero for each, left zero.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT / THREADS) w4a16_decode(
    const u16* __restrict__ x, const unsigned char* __restrict__ codes,
    const unsigned char* __restrict__ scales, const float* __restrict__ tensor_scale,
    const u16* __restrict__ bias, const float* __restrict__ row_scale, u16* __restrict__ out,
    float* __restrict__ partial,
    int* __restrict__ arrived, float factor, int tokens, int outputs, int inputs, int x_stride,
    int padded_outputs, int padded_inputs, int whole, int tail_splits)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % WARPS, group = threadIdx.x / (32 * WARPS);
#if CLUSTER
    const int splits = gridDim.y, split = blockIdx.y, block_tile = blockIdx.x;
#else
    const int rest = (int)blockIdx.x - whole;
    const int splits = rest < 0 ? 1 : tail_splits;
    const int split = rest < 0 ? 0 : rest % tail_splits;
    const int block_tile = rest < 0 ? blockIdx.x : whole + rest / tail_splits;
#endif
    const int all_steps = padded_inputs / 32;
    const int first_step = all_steps * split / splits + warp;
    const int step_count = (all_steps * (split + 1) / splits - first_step + WARPS - 1) / WARPS;
    // Of 64 outputs; a block's last groups may lie past the end and then repeat the last one.
    const int tile = min(block_tile * GROUPS + group, padded_outputs / 64 - 1);

    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const u32 weight_ring = base + (group * WARPS + warp) * (DEPTH * STEP);
    const u32 x_ring = base + GROUPS * WARPS * (DEPTH * STEP + SCALE_PAIRS) + warp * (DEPTH * X_STEP);
    uint4* scale_ring = (uint4*)(shared + GROUPS * WARPS * DEPTH * STEP + (group * WARPS + warp) * SCALE_PAIRS);
    const long long advance = 2ll * WARPS * padded_outputs;
    const unsigned char* codes_from = codes + 16ll * first_step * padded_outputs + tile * 512 + lane * 16;
    const unsigned char* scales_from = scales + (2ll * first_step + lane / 16) * padded_outputs + tile * 64
        + lane % 16 * 4;
    const int code_row = 8 * padded_outputs;
    // Four lanes copy a token's 32 inputs; the groups share out the tokens.
    const int x_token = group * 8 + lane / 4;
    int input = first_step * 32 + lane % 4 * 8;
    const u16* x_from = x + (long long)x_token * x_stride + input;
    const u32 x_to = x_ring + x_token * X_STRIDE + lane % 4 * 16;

    auto load_weights = [&](int step, int slot) {
        if (step < step_count) {
            const u32 to = weight_ring + slot * STEP;
            copy16(to + lane * 16, codes_from);
            copy16(to + 512 + lane * 16, codes_from + code_row);
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(to + 1024 + lane * 4), "l"(scales_from));
        }
        codes_from += 8 * advance;
        scales_from += advance;
    };
    auto load_x = [&](int step, int slot) {
        if (step < step_count) {
            #pragma unroll
            for (int t = 0; t < TOKENS; t += 8 * GROUPS)
                if (x_token + t < tokens)  // nothing is read past the inputs: those become zeros
                    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
                                 :: "r"(x_to + slot * X_STEP + t * X_STRIDE),
                                    "l"(x_from + (long long)t * x_stride), "r"(input < inputs ? 16 : 0));
        }
        input += WARPS * 32;
        x_from += WARPS * 32;
    };
    #pragma unroll
    for (int slot = 0; slot < DEPTH - 1; ++slot) load_weights(slot, slot);
#if __CUDA_ARCH__ >= 900
    // The weights do not depend on the kernel before this one; all else does.
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    #pragma unroll
    for (int slot = 0; slot < DEPTH - 1; ++slot) {
        load_x(slot, slot);
        // The first group holds the weights of all these steps: they were asked for before any x.
        asm volatile("cp.async.commit_group;");
    }

    // Columns of a product do not mix: where there is no token, any row will do and is not written.
    u32 column[TOKEN_TILES];
    #pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n)
        column[n] = x_ring + min(n * 8 + lane % 8, tokens - 1) * X_STRIDE + lane / 8 * 16;
    const unsigned char* codes_at = shared + (weight_ring - base) + lane * 16;
    const unsigned char* scales_at = shared + (weight_ring - base) + 1024 + lane * 4;
    const u32 one = tokens > 0;
    float acc[4][TOKEN_TILES][4] = {};
    for (int first = 0; first < step_count; first += DEPTH) {
        #pragma unroll
        for (int slot = 0; slot < DEPTH; ++slot) {
            if (first + slot >= step_count) break;
            asm volatile("cp.async.wait_group %0;" :: "n"(DEPTH - 2) : "memory");
            // This step has arrived for all, and all have read the slot that is loaded next.
            synchronize(warp);
            load_weights(first + slot + DEPTH - 1, (slot + DEPTH - 1) % DEPTH);
            load_x(first + slot + DEPTH - 1, (slot + DEPTH - 1) % DEPTH);
            asm volatile("cp.async.commit_group;");
            // Four lanes need the same scales: each converts the four that it copied, for all.
            scale_ring[lane] = scale_pairs(*(const u32*)(scales_at + slot * STEP), one);
            __syncwarp();
            u32 b[TOKEN_TILES][4];
            #pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n)
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(b[n][0]), "=r"(b[n][1]), "=r"(b[n][2]), "=r"(b[n][3])
                             : "r"(column[n] + slot * X_STEP) : "memory");
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 quads = *(const uint4*)(codes_at + slot * STEP + half * 512);
                const uint4 scale_quads[2] = {scale_ring[half * 16 + lane / 4 * 2], scale_ring[half * 16 + lane / 4 * 2 + 1]};
                const u32 words[4] = {quads.x, quads.y, quads.z, quads.w};
                #pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const u32 low = j % 2 ? scale_quads[j / 2].z : scale_quads[j / 2].x;
                    const u32 high = j % 2 ? scale_quads[j / 2].w : scale_quads[j / 2].y;
                    u32 a[4];
                    elements(a, words[j], one);
                    a[0] = multiply(a[0], low);
                    a[1] = multiply(a[1], high);
                    a[2] = multiply(a[2], low);
                    a[3] = multiply(a[3], high);
                    #pragma unroll
                    for (int n = 0; n < TOKEN_TILES; ++n) product(acc[j][n], a, b[n][2 * half], b[n][2 * half + 1]);
                }
            }
        }
    }

    // Sum over warps and splits in a fixed order, so that results do not vary from run to run.
    __syncthreads();
    float* sums = (float*)shared;
    #pragma unroll
    for (int j = 0; j < 4; ++j)
        #pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = group * 64 + j * 16 + lane / 4 + i / 2 * 8, token = n * 8 + lane % 4 * 2 + i % 2;
                sums[(warp * TOKENS + token) * SUM_STRIDE + row] = acc[j][n][i];
            }
    __syncthreads();
    factor *= tensor_scale[0];
    auto block_sum = [&](int e) {
        float sum = 0.0f;
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[(w * TOKENS + e / ROWS) * SUM_STRIDE + e % ROWS];
        return sum;
    };
    auto write = [&](int e, float sum) {
        const int token = e / ROWS, row = block_tile * ROWS + e % ROWS;
        if (row < outputs) {
            sum *= row_scale == nullptr ? factor : factor * row_scale[token];
            if (bias != nullptr) sum += to_float(bias[row]);
            out[(long long)token * outputs + row] = from_float(sum);
        }
    };
    if (splits == 1) {
        for (int e = threadIdx.x; e < ROWS * tokens; e += THREADS) write(e, block_sum(e));
        return;
    }
#if CLUSTER
    for (int e = threadIdx.x; e < ROWS * tokens; e += THREADS)
        sums[e / ROWS * SUM_STRIDE + e % ROWS] = block_sum(e);
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
    for (int e = threadIdx.x + THREADS * split; e < ROWS * tokens; e += THREADS * splits) {
        const u32 here = (u32)__cvta_generic_to_shared(sums + e / ROWS * SUM_STRIDE + e % ROWS);
        float parts[8];
        #pragma unroll
        for (int s = 0; s < 8; ++s)
            if (s < splits) {
                u32 there;
                asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(s));
                asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(parts[s]) : "r"(there));
            }
        float sum = 0.0f;
        #pragma unroll
        for (int s = 0; s < 8; ++s)
            if (s < splits) sum += parts[s];
        write(e, sum);
    }
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
    float* parts = partial + (long long)(block_tile - whole) * splits * (ROWS * TOKENS);
    for (int e = threadIdx.x; e < ROWS * tokens; e += THREADS)
        __stcg(parts + split * (ROWS * TOKENS) + e, block_sum(e));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const bool last = atomicAdd(arrived + block_tile - whole, 1) == splits - 1;
        if (last) arrived[block_tile - whole] = 0;
        *(int*)sums = last;
    }
    __syncthreads();
    if (!*(int*)sums) return;
    __threadfence();
    for (int e = threadIdx.x; e < ROWS * tokens; e += THREADS) {
        float sum = 0.0f;
        for (int s = 0; s < splits; ++s) sum += __ldcg(parts + s * (ROWS * TOKENS) + e);
        write(e, sum);
    }
#endif
}
