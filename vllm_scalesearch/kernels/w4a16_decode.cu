// y = x * W^T for few rows of x (1 to 32) and NVFP4 weights, streamed once at memory speed.
//
// The weights are the copy that Humming (SM90) and Marlin keep for their own kernels, so larger products
// need no second one; nvfp4_tiles.cuh says how they lie.
//
// A block takes a tile of outputs and, when there are too few tiles to fill the GPU, a part of the inputs.
// Nothing is loaded ahead of the loop but a few steps of 32 inputs, weights and activations alike, so that
// the many small blocks of an SM hide each other's ends.
//
// A small product takes little longer than what precedes its first load and follows its last: so there are few
// instructions in front of the first load, no division among them, and what the end needs is asked for early.
//
// Macros, besides those of nvfp4_tiles.cuh: TOKENS (8, 16, 24 or 32: at least the rows of x), GROUPS (of 64
// outputs a tile), WARPS (a group; each takes every WARPS-th step), DEPTH (steps in flight a warp), SPLITS (of the
// inputs, each a block's), CLUSTER (1: the splits of a tile are a cluster and add up through shared memory,
// sm_90; 0: they add up through global memory), SHARED (bytes of a launch's shared memory), RESIDENT (threads that a
// multiprocessor is to hold, which bounds registers).

#include "nvfp4_tiles.cuh"

constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int ROWS = 64 * GROUPS;
constexpr int THREADS = 32 * WARPS * GROUPS;
constexpr int STEP = 1152;  // bytes of 32 inputs by 64 outputs
constexpr int SCALE_PAIRS = 512;  // bytes: the scales of a step as registers of two
constexpr int X_STRIDE = 80;  // bytes of a token's 32 activations; a fragment load meets all banks
constexpr int X_STEP = TOKENS * X_STRIDE;
constexpr int PAIRS = TOKENS / 2;  // of tokens, as the products' results lie
constexpr int PITCH = TOKENS == 8 ? 4 : TOKENS == 16 ? 8 : 16;  // pairs from output to output in a warp's sums
constexpr int RING_BYTES = WARPS * (DEPTH * (GROUPS * STEP + X_STEP) + GROUPS * SCALE_PAIRS);
constexpr int SUM_BYTES = WARPS * ROWS * PITCH * 8;
// What a block needs at its end lies behind the ring: bias, the tokens' factors, then what its cluster sends.
constexpr int BIAS_AT = (RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES) + 15 & ~15;
constexpr int FACTORS_AT = BIAS_AT + ROWS * 4;
constexpr int BARRIER_AT = FACTORS_AT + TOKENS * 4;
constexpr int RECEIVED_AT = BARRIER_AT + 16;
constexpr int OWNED = (ROWS + SPLITS - 1) / SPLITS;  // outputs of a tile that a block of a cluster adds up
static_assert(SHARED == (CLUSTER ? RECEIVED_AT + SPLITS * OWNED * PAIRS * 8 : BARRIER_AT), "as ops/w4a16.py has it");
static_assert(THREADS >= ROWS && THREADS >= TOKENS, "a thread for each output's bias and each token's factor");

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

// The lane's own value, which the compiler does not know: what it can work out it works out again at every step
// rather than keep it in a register.
__device__ __forceinline__ u32 kept(u32 value) {
    return __shfl_sync(0xFFFFFFFFu, value, threadIdx.x % 32);
}

__device__ __forceinline__ void write16(u32 to, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};"
                 :: "r"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
}

__device__ __forceinline__ uint4 read16(u32 from) {
    uint4 out;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w) : "r"(from) : "memory");
    return out;
}

// Where an output's pair of tokens lies in a warp's sums. Of 64-bit accesses half a warp meets all banks, both when they are
// written (4 outputs by 4 pairs) and when they are read (16 outputs).
__device__ __forceinline__ int sum_at(int output, int pair) {
    return output * PITCH + (pair ^ (output % 4 / (16 / PITCH) * 4 + output / 4 % 4));
}

// The warps that share activations: those of one step, one of each group.
__device__ __forceinline__ void synchronize(int warp) {
    if (GROUPS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" :: "r"(warp + 1), "n"(32 * GROUPS) : "memory");
}

// x: (tokens, inputs) 16-bit, rows x_stride apart, 16-byte aligned. codes, scales: padded_inputs (a
// multiple of 32) by padded_outputs (of 64). out: (tokens, outputs), a row of it x * W^T * tensor_scale *
// factor * the row's row_scale + bias, in fp32 up to the end; bias and row_scale (tokens) may be null.
// Grid (tiles, SPLITS), tiles = ceil(padded_outputs / ROWS). split_steps: ceil(padded_inputs / 32 / SPLITS). Where
// SPLITS > 1 without CLUSTER, partial: SPLITS * ROWS * TOKENS floats a tile; arrived: a zero for each, left zero.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT / THREADS) w4a16_decode(
    const u16* __restrict__ x, const unsigned char* __restrict__ codes,
    const unsigned char* __restrict__ scales, const float* __restrict__ tensor_scale,
    const u16* __restrict__ bias, const float* __restrict__ row_scale, u16* __restrict__ out,
    float2* __restrict__ partial,
    int* __restrict__ arrived, float factor, int tokens, int outputs, int inputs, int x_stride,
    int padded_outputs, int padded_inputs, int split_steps)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x % 32, all_warps = threadIdx.x / 32;
    const int group = GROUPS == 1 ? 0 : all_warps / WARPS, warp = GROUPS == 1 ? all_warps : all_warps % WARPS;
    const int block_tile = blockIdx.x, split = blockIdx.y;
    const int first_step = SPLITS == 1 ? warp : split * split_steps + warp;
    const int last_step = SPLITS == 1 ? padded_inputs / 32 : min(padded_inputs / 32, (split + 1) * split_steps);
    // Of 64 outputs; a block's last groups may lie past the end and then repeat the last one.
    const int tile = GROUPS == 1 ? block_tile : min(block_tile * GROUPS + group, padded_outputs / 64 - 1);

    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const u32 codes_to = base + (group * WARPS + warp) * (DEPTH * STEP) + lane * 16;
    const u32 scales_to = codes_to + 1024 - lane * 12;
    const unsigned char* codes_from = codes + 16ll * first_step * padded_outputs + tile * 512 + lane * 16;
    const unsigned char* more_codes_from = codes_from + 8 * padded_outputs;
    const unsigned char* scales_from = scales + (2ll * first_step + lane / 16) * padded_outputs + tile * 64
        + lane % 16 * 4;
    const long long scales_advance = 2ll * WARPS * padded_outputs, codes_advance = 8 * scales_advance;
    int steps_left = last_step - first_step;  // of a warp's every WARPS-th

    auto load_weights = [&](bool there, u32 codes_to, u32 scales_to) {
        if (there) {
            copy16(codes_to, codes_from);
            copy16(codes_to + 512, more_codes_from);
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(scales_to), "l"(scales_from));
        }
        codes_from += codes_advance;
        more_codes_from += codes_advance;
        scales_from += scales_advance;
    };
    #pragma unroll
    for (int slot = 0; slot < DEPTH - 1; ++slot)
        load_weights(steps_left > slot * WARPS, codes_to + slot * STEP, scales_to + slot * STEP);

#if CLUSTER
    const u32 barrier = base + BARRIER_AT;
    const int owned = min(ROWS - split * OWNED, OWNED);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
                     :: "r"(barrier) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     :: "r"(barrier), "r"(owned * ((tokens + 1) / 2) * 8 * (SPLITS - 1)) : "memory");
    }
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
    // Four lanes copy a token's 32 inputs; the groups share out the tokens.
    constexpr int X_COPIES = (TOKENS + 8 * GROUPS - 1) / (8 * GROUPS);
    const u32 x_ring = base + GROUPS * WARPS * (DEPTH * STEP + SCALE_PAIRS) + warp * (DEPTH * X_STEP);
    const int x_token = group * 8 + lane / 4, x_input = lane % 4 * 8;
    const u32 x_to = x_ring + x_token * X_STRIDE + x_input * 2;
    const u16* x_from = x + (long long)x_token * x_stride + first_step * 32 + x_input;
    // A copy is made while more steps are left than this. Nothing is read past the inputs; what lies there instead, zeros
    // or earlier inputs of the token, meets weights of zero.
    u32 x_none_from[X_COPIES];
    #pragma unroll
    for (int i = 0; i < X_COPIES; ++i)
        x_none_from[i] = x_token + i * 8 * GROUPS < tokens ? max(0, last_step - (inputs - x_input + 31) / 32) : 1 << 30;
    if (inputs % 32 != 0)
        for (int slot = 0; slot < DEPTH; ++slot)
            for (int t = 0; x_token + t < tokens; t += 8 * GROUPS)
                write16(x_to + slot * X_STEP + t * X_STRIDE, make_uint4(0, 0, 0, 0));
    auto load_x = [&](int left, u32 to) {
        #pragma unroll
        for (int i = 0; i < X_COPIES; ++i)
            if (left > (int)x_none_from[i])
                asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
                             :: "r"(to + i * (8 * GROUPS * X_STRIDE)),
                                "l"(x_from + (long long)(i * 8 * GROUPS) * x_stride));
        x_from += WARPS * 32;
    };
    const float tensor_factor = factor * __ldg(tensor_scale);
    const int own_output = block_tile * ROWS + threadIdx.x;
    u16 own_bias = 0;
    if (bias != nullptr && threadIdx.x < ROWS && own_output < outputs) own_bias = __ldg(bias + own_output);
#if __CUDA_ARCH__ >= 900
    // The weights do not depend on the kernel before this one; all else does.
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    #pragma unroll
    for (int slot = 0; slot < DEPTH - 1; ++slot) {
        load_x(steps_left - slot * WARPS, x_to + slot * X_STEP);
        // The first group holds the weights of all these steps: they were asked for before any x.
        asm volatile("cp.async.commit_group;");
    }
    float own_factor = 1.0f;
    if (row_scale != nullptr && threadIdx.x < tokens) own_factor = row_scale[threadIdx.x];

    const u32 pairs_at = base + GROUPS * WARPS * DEPTH * STEP + (group * WARPS + warp) * SCALE_PAIRS;
    const u32 own_codes = kept(codes_to), own_scales = kept(scales_to), own_x = kept(x_to);
    const u32 pairs_to = kept(pairs_at + lane * 16), pairs_from = kept(pairs_at + lane / 4 * 32);
    // Columns of a product do not mix: what lies where there is no token is not written.
    const u32 fragment_from = kept(x_ring + lane % 8 * X_STRIDE + lane / 8 * 16);
    Shifts shifts = shifts_of(tokens > 0);
    shifts = {kept(shifts.magnitude), kept(shifts.second), kept(shifts.third), kept(shifts.scale)};
    #pragma unroll
    for (int i = 0; i < X_COPIES; ++i) x_none_from[i] = kept(x_none_from[i]);
    float acc[4][TOKEN_TILES][4] = {};
    auto take_step = [&](int slot) {
        constexpr int AHEAD = (DEPTH - 1) * WARPS;
        const int free_slot = (slot + DEPTH - 1) % DEPTH;
        asm volatile("cp.async.wait_group %0;" :: "n"(DEPTH - 2) : "memory");
        // This step has arrived for all, and all have read the slot that is loaded next.
        synchronize(warp);
        load_weights(steps_left > AHEAD, own_codes + free_slot * STEP, own_scales + free_slot * STEP);
        load_x(steps_left - AHEAD, own_x + free_slot * X_STEP);
        asm volatile("cp.async.commit_group;");
        // Four lanes need the same scales: each converts the four that it copied, for all.
        u32 bytes;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bytes) : "r"(own_scales + slot * STEP) : "memory");
        write16(pairs_to, scale_pairs(bytes, shifts));
        __syncwarp();
        u32 b[TOKEN_TILES][4];
        #pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                         : "=r"(b[n][0]), "=r"(b[n][1]), "=r"(b[n][2]), "=r"(b[n][3])
                         : "r"(fragment_from + (slot * X_STEP + n * (8 * X_STRIDE))) : "memory");
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 quads = read16(own_codes + (slot * STEP + half * 512));
            const uint4 scale_quads[2] = {read16(pairs_from + half * 256), read16(pairs_from + half * 256 + 16)};
            const u32 words[4] = {quads.x, quads.y, quads.z, quads.w};
            #pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u32 low = j % 2 ? scale_quads[j / 2].z : scale_quads[j / 2].x;
                const u32 high = j % 2 ? scale_quads[j / 2].w : scale_quads[j / 2].y;
                u32 a[4];
                elements(a, words[j], shifts);
                a[0] = multiply(a[0], low);
                a[1] = multiply(a[1], high);
                a[2] = multiply(a[2], low);
                a[3] = multiply(a[3], high);
                #pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n) product(acc[j][n], a, b[n][2 * half], b[n][2 * half + 1]);
            }
        }
        steps_left -= WARPS;
    };
    while (steps_left > 0) {
        #pragma unroll
        for (int slot = 0; slot < DEPTH; ++slot) {
            if (slot > 0 && steps_left <= 0) break;
            take_step(slot);
        }
    }

    // Sum over warps and splits in a fixed order, so that results do not vary from run to run.
    float* const block_bias = (float*)(shared + BIAS_AT);
    float* const factors = (float*)(shared + FACTORS_AT);
    if (threadIdx.x < ROWS) block_bias[threadIdx.x] = to_float(own_bias);
    if (threadIdx.x < TOKENS) factors[threadIdx.x] = tensor_factor * own_factor;
    __syncthreads();
    float2* const sums = (float2*)shared;
    #pragma unroll
    for (int j = 0; j < 4; ++j)
        #pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = group * 64 + j * 16 + lane / 4 + i * 8, pair = n * 4 + lane % 4;
                sums[sum_at(warp * ROWS + row, pair)] = make_float2(acc[j][n][2 * i], acc[j][n][2 * i + 1]);
            }
    __syncthreads();
    auto block_sum = [&](int row, int pair) {
        float2 sum = sums[sum_at(row, pair)];
        #pragma unroll
        for (int w = 1; w < WARPS; ++w) {
            const float2 more = sums[sum_at(w * ROWS + row, pair)];
            sum.x += more.x, sum.y += more.y;
        }
        return sum;
    };
    auto write = [&](int row, int pair, float2 sum) {
        const int output = block_tile * ROWS + row;
        if (output >= outputs) return;
        u16* const to = out + (long long)(2 * pair) * outputs + output;
        to[0] = from_float(sum.x * factors[2 * pair] + block_bias[row]);
        if (2 * pair + 1 < tokens) to[outputs] = from_float(sum.y * factors[2 * pair + 1] + block_bias[row]);
    };
    const int pairs = (tokens + 1) / 2;
    if (SPLITS == 1) {
        #pragma unroll 1
        for (int e = threadIdx.x; e < ROWS * pairs; e += THREADS)
            write(e % ROWS, e / ROWS, block_sum(e % ROWS, e / ROWS));
        return;
    }
#if CLUSTER
    // Each block sends the others what is theirs to add up; a copy for each split, so that the order is fixed.
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");  // all barriers are there
    #pragma unroll 1
    for (int e = threadIdx.x; e < ROWS * pairs; e += THREADS) {
        const int row = e % ROWS, pair = e / ROWS, owner = row / OWNED;
        const float2 sum = block_sum(row, pair);
        const u32 to = base + RECEIVED_AT + ((split * PAIRS + pair) * OWNED + row % OWNED) * 8;
        if (owner == split) {
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(to), "f"(sum.x), "f"(sum.y) : "memory");
        } else {
            u32 there, counted;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(to), "r"(owner));
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(barrier), "r"(owner));
            asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
                         :: "r"(there), "f"(sum.x), "f"(sum.y), "r"(counted) : "memory");
        }
    }
    __syncthreads();
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again;}" :: "r"(barrier) : "memory");
    const float2* const received = (const float2*)(shared + RECEIVED_AT);
    #pragma unroll 1
    for (int e = threadIdx.x; e < OWNED * pairs; e += THREADS) {
        const int row = e % OWNED, pair = e / OWNED;
        if (row >= owned) continue;
        float2 sum = received[pair * OWNED + row];
        #pragma unroll
        for (int s = 1; s < SPLITS; ++s) {
            const float2 more = received[(s * PAIRS + pair) * OWNED + row];
            sum.x += more.x, sum.y += more.y;
        }
        write(split * OWNED + row, pair, sum);
    }
#else
    float2* const parts = partial + (long long)block_tile * (SPLITS * ROWS * PAIRS);
    #pragma unroll 1
    for (int e = threadIdx.x; e < ROWS * pairs; e += THREADS)
        __stcg(parts + split * (ROWS * PAIRS) + e, block_sum(e % ROWS, e / ROWS));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const bool last = atomicAdd(arrived + block_tile, 1) == SPLITS - 1;
        if (last) arrived[block_tile] = 0;
        *(int*)sums = last;
    }
    __syncthreads();
    if (!*(int*)sums) return;
    __threadfence();
    #pragma unroll 1
    for (int e = threadIdx.x; e < ROWS * pairs; e += THREADS) {
        float2 sum = __ldcg(parts + e);
        #pragma unroll
        for (int s = 1; s < SPLITS; ++s) {
            const float2 more = __ldcg(parts + s * (ROWS * PAIRS) + e);
            sum.x += more.x, sum.y += more.y;
        }
        write(e % ROWS, e / ROWS, sum);
    }
#endif
}
