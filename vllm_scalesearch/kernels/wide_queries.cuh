// Queries of paged_decode_wide.cu in shared memory: rows of fp16 numbers, channels of each 16 in the order of K's
// pages, the even ones first. Rows are a multiple of 16; those of no query are zeros.
#pragma once

#include "decode_work.cuh"

constexpr int ROWS = 16 * TILES;
constexpr int Q_PITCH = 2 * D + 16;

// A part's queries, for all warps of the block, and what is to multiply the scores of each row. Lanes of a row have
// four channels at a time.
struct Queries {
    static constexpr int LANES = WARPS * 32 / ROWS, PIECES = D / 4 / LANES;
    static_assert(D / 4 % LANES == 0);
    uint2 x[PIECES];

    __device__ __forceinline__ void load(const Arguments& a, const Part& part) {
        const int row = threadIdx.x / LANES;
#pragma unroll
        for (int n = 0; n < PIECES; n++) {
            x[n] = make_uint2(0, 0);
            if (row < part.count)
                x[n] = *reinterpret_cast<const uint2*>(
                    part.queries + row * a.q_head_stride + 4 * (n * LANES + threadIdx.x % LANES));
        }
    }
    __device__ __forceinline__ void store(u8* rows, float* factors, float score_scale) const {
        const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        float amax = 0.0f;
#pragma unroll
        for (int n = 0; n < PIECES; n++) {
            const float2 one = widened_pair(x[n].x), two = widened_pair(x[n].y);
            amax = fmaxf(amax, fmaxf(fabsf(one.x), fabsf(one.y)));
            amax = fmaxf(amax, fmaxf(fabsf(two.x), fabsf(two.y)));
        }
        const UpperRange range(max_across<1, LANES>(amax));
#pragma unroll
        for (int n = 0; n < PIECES; n++) {
            const int channel = 4 * (n * LANES + lane);
            u8* to = rows + row * Q_PITCH + channel / 16 * 32 + channel % 16;
            const float2 one = widened_pair(x[n].x), two = widened_pair(x[n].y);
            *reinterpret_cast<u32*>(to) = as_halves(one.x * range.up, two.x * range.up);
            *reinterpret_cast<u32*>(to + 16) = as_halves(one.y * range.up, two.y * range.up);
        }
        if (lane == 0) factors[row] = range.back * score_scale;
    }
};
