// Tiles of 128 keys or values of a KV head in 16 bits, as prompt_attention.cu multiplies them.
//
// A tile is an operand of wgmma whose rows are K-major without swizzle: 8 rows by 16 bytes lie together, 128 bytes,
// and such pieces follow each other along the sum, then along the rows. Keys have tokens for rows and channels to
// sum over; values lie transposed, channels for rows and tokens to sum over.
//
// Tokens are in another order: the place n = 8 i + 2 t + e (t in 0..3, e in 0..1) of a tile holds token
// 32 t + 2 i + e. In the accumulators of a product with keys, lane 4 g + t of a warp has the places 8 i + 2 t + e
// of its rows, so that it has two whole scale blocks of P of each, 16 tokens that follow each other.
#pragma once

#include "nvfp4_attention.cuh"

constexpr int TILE = 128;
constexpr int TILE_BYTES = TILE * D * 2;
constexpr int K_ROWS = D / 8 * 128;      // bytes from 8 keys to the next 8
constexpr int V_ROWS = TILE / 8 * 128;   // and of channels

static_assert(D % 64 == 0 && D <= 128);

// First token in full precision for being new, of a query at `position`: attention_reference.py's boundary.
__device__ __forceinline__ int boundary_of(int position) {
    return max(position + 1 - RECENT, 0) / 16 * 16;
}

// The first tile of a request whose tokens begin at starts[request]: each has as many as it can need, or one more.
__device__ __forceinline__ int first_tile(const int* starts, int request) {
    return starts[request] / TILE + request;
}

// The request that has tile `index`.
__device__ __forceinline__ int request_of(const int* starts, int requests, int index) {
    int low = 0, high = requests;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (first_tile(starts, middle) <= index) low = middle;
        else high = middle;
    }
    return low;
}
