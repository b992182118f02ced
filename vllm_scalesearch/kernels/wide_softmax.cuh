// The running softmax of a block of paged_decode_wide.cu, whose warps score tokens of their own and add up channels of
// their own: they agree on maxima, and find each other's P, in shared memory.
#pragma once

#include "decode_work.cuh"

constexpr int OWN = (GROUPS + WARPS - 1) / WARPS;  // groups of channels of a warp; of 6 the last warp has none
constexpr int FOUND_PITCH = D + 8;                 // floats; rows that are written at once are 8 banks apart
constexpr int P_PITCH = 64 * WARPS + 16;
constexpr float P_LOG2 = 15.0f;                    // P is in units of 2^-15, so that small ones are normal numbers

static_assert(GROUPS % OWN == 0 && WARPS == 4);

// What a block's warps tell each other in a step.
struct Exchange {
    const float* factors;  // what is to multiply the scores of each row
    float* maxima;         // of each row each warp's
    u8* p;                 // rows of P: of each warp 32 tokens in fp16, or 16 in the model's dtype and their rests
    u32 operand;           // the address in it that this lane needs for load_matrices
    int warp, lane;

    // A tile's operand of 16 tokens.
    __device__ __forceinline__ void store(int tile, int token, const u32 (&x)[4]) const {
#pragma unroll
        for (int k = 0; k < 4; k++)
            *reinterpret_cast<u32*>(
                p + (16 * tile + k % 2 * 8 + lane / 4) * P_PITCH + (token + k / 2 * 8 + lane % 4 * 2) * 2) = x[k];
    }
    __device__ __forceinline__ bool has_channels() const { return GROUPS == OWN * WARPS || warp * OWN < GROUPS; }
};

// The running softmax of a block: lane (g, t) has rows g and g + 8 of each tile, and channels 8 n + 2 t and
// 8 n + 2 t + 1 of its warp's, as accumulators have them. Totals are of the tokens that its warp scored, as rounded.
struct State {
    float maximum[TILES][2], total[TILES][2], output[TILES][2 * OWN][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) maximum[i][h] = -INFINITY, total[i][h] = 0.0f;
#pragma unroll
            for (int n = 0; n < 2 * OWN; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) output[i][n][e] = 0.0f;
            }
        }
    }

    // What the block found, in decode_work.cuh's place. broken: the warp has seen a NaN that its products did not.
    __device__ __forceinline__ void leave(float* found, bool broken, const Exchange& exchange) const {
        const int lane = exchange.lane, warp = exchange.warp, g = lane / 4, t = lane % 4;
        float* totals = exchange.maxima;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (t == 0) totals[(16 * i + 8 * h + g) * WARPS + warp] = broken ? NAN : total[i][h];
            }
        }
        __syncthreads();  // and all warps are done with what `found` takes the place of
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = 16 * i + 8 * h + g;
                if (row >= QUERIES) continue;
                float* to = found + row * FOUND_PITCH;
                if (exchange.has_channels()) {
#pragma unroll
                    for (int n = 0; n < 2 * OWN; n++)
                        *reinterpret_cast<float2*>(to + 16 * OWN * warp + 8 * n + 2 * t) =
                            make_float2(output[i][n][2 * h], output[i][n][2 * h + 1]);
                }
                if (warp == 0 && t == 0) {
                    const float4 of = *reinterpret_cast<const float4*>(totals + row * WARPS);
                    to[D] = maximum[i][h], to[D + 1] = of.x + of.y + of.z + of.w;
                }
            }
        }
    }
};

// Scores of a warp's 8 COUNT tokens become P, where it has any. What was summed up before is scaled to the new maximum.
// Every warp of the block has come here before one goes on.
template <int COUNT>
__device__ __forceinline__ void softmax(
    State& state, float (&s)[TILES][COUNT][4], bool any, float scale_of_all, float cap, const Exchange& exchange) {
    const int row = exchange.lane / 4;
    float factor[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            factor[i][h] = COUNT == 4 ? exchange.factors[16 * i + 8 * h + row] : scale_of_all;
            if (SOFT_CAP) {
#pragma unroll
                for (int n = 0; n < COUNT; n++) {
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++)
                        if (s[i][n][e] != -INFINITY) s[i][n][e] = capped(s[i][n][e], factor[i][h], cap);
                }
                factor[i][h] = 1.0f;
            }
            float most = s[i][0][2 * h];
#pragma unroll
            for (int n = 0; n < COUNT; n++) most = fmaxf(most, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
            most = max_across<1, 4>(most);
            if (exchange.lane % 4 == 0)
                exchange.maxima[(16 * i + 8 * h + row) * WARPS + exchange.warp] =
                    any ? most * factor[i][h] : -INFINITY;
        }
    }
    __syncthreads();
    float scale[TILES][2];
    bool higher = false;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float before = state.maximum[i][h];
            const float4 of = *reinterpret_cast<const float4*>(exchange.maxima + (16 * i + 8 * h + row) * WARPS);
            const float now = fmaxf(before, fmaxf(fmaxf(of.x, of.y), fmaxf(of.z, of.w)));
            const float base = base_of(now);
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; e++)
                    s[i][n][e] = exp2_approx(fmaf(s[i][n][e], factor[i][h], P_LOG2 - base));
            }
            scale[i][h] = exp2_approx(before - base);
            state.total[i][h] *= scale[i][h];
            state.maximum[i][h] = now;
            higher = higher || now != before;
        }
    }
    if (__any_sync(~0u, higher)) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int n = 0; n < 2 * OWN; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) state.output[i][n][e] *= scale[i][e / 2];
            }
        }
    }
}
