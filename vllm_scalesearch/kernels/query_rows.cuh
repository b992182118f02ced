// Queries of one KV head as the rows of a block (head_blocks.cuh): row r is query head r % group of the head, of token
// r / group. So few tokens fill a block too, and a block needs one matrix.
#pragma once

#include "head_blocks.cuh"

struct Queries {
    const u16* q;  // (tokens, heads, D), stride and head_stride apart
    int tokens, heads, group, stride, head_stride;

    __device__ int rows() const { return tokens * group; }
    __device__ const u16* from(int head, int row) const {
        return q + static_cast<long long>(row / group) * stride +
               static_cast<long long>(head * group + row % group) * head_stride;
    }
    // Where a row is in a contiguous tensor like q.
    __device__ long long place(int head, int row) const {
        return (static_cast<long long>(row / group) * heads + head * group + row % group) * D;
    }
};

// Rows from `first` on; those past the last one are zeros.
template <class Memory>
__device__ __forceinline__ void copy_queries(Memory& memory, const Queries& queries, int head, int first) {
    share<TOKENS * (D / 8)>([&](int i, int) {
        const int row = first + i / (D / 8), chunk = i % (D / 8);
        const bool present = row < queries.rows();
        copy_async(memory.tokens + i / (D / 8) * PITCH + 16 * chunk,
                   queries.from(head, present ? row : 0) + 8 * chunk, present);
    });
}

// The block's columns of them, from `column` on.
template <class Memory>
__device__ __forceinline__ void store_queries(
    const Memory& memory, u16* to, const Queries& queries, int head, int first, int column) {
    constexpr int WIDE = COLUMNS / 8;
    share<TOKENS * WIDE>([&](int i, int) {
        const int row = first + i / WIDE, chunk = i % WIDE;
        if (row < queries.rows())
            *reinterpret_cast<uint4*>(to + queries.place(head, row) + column + 8 * chunk) =
                *reinterpret_cast<const uint4*>(memory.tokens + i / WIDE * PITCH + 2 * column + 16 * chunk);
    });
}
