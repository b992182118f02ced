// NVFP4 weights back to dense 16-bit rows, for products large enough that cuBLAS repays it.
// Macros: those of nvfp4_tiles.cuh.

#include "nvfp4_tiles.cuh"

constexpr int WARPS = 4;
constexpr int ROW_BYTES = 144;  // of 64 inputs, and 16 so that a warp's stores meet all banks

// out: (outputs, inputs), element * scale * 2^-7, of outputs first_tile * 64 and on. codes, scales: the whole
// weight. Grid (ceil(inputs / 64), tiles), 128 threads, 64 * 144 bytes of shared memory.
extern "C" __global__ void __launch_bounds__(32 * WARPS) w4a16_dequantize(
    const unsigned char* __restrict__ codes, const unsigned char* __restrict__ scales, u16* __restrict__ out,
    int outputs, int inputs, int padded_outputs, int padded_inputs, int first_tile)
{
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = first_tile + blockIdx.y;
    const int block = blockIdx.x * WARPS + warp;
    if (block * 16 < padded_inputs) {
        const uint4 quads = *(const uint4*)(codes + (long long)block * 8 * padded_outputs + tile * 512 + lane * 16);
        const uint2 bytes = *(const uint2*)(scales + (long long)block * padded_outputs + tile * 64 + lane / 4 * 8);
        const u32 words[4] = {quads.x, quads.y, quads.z, quads.w};
        const uint4 pairs[2] = {scale_pairs(bytes.x, shifts_of(1)), scale_pairs(bytes.y, shifts_of(1))};
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 low = j % 2 ? pairs[j / 2].z : pairs[j / 2].x, high = j % 2 ? pairs[j / 2].w : pairs[j / 2].y;
            u32 a[4];
            elements(a, words[j], shifts_of(1));
            unsigned char* to = shared + (16 * j + lane / 4) * ROW_BYTES + warp * 32 + lane % 4 * 4;
            *(u32*)to = multiply(a[0], low);
            *(u32*)(to + 8 * ROW_BYTES) = multiply(a[1], high);
            *(u32*)(to + 16) = multiply(a[2], low);
            *(u32*)(to + 8 * ROW_BYTES + 16) = multiply(a[3], high);
        }
    }
    __syncthreads();
    #pragma unroll
    for (int i = threadIdx.x; i < 64 * 8; i += 32 * WARPS) {
        const int row = i / 8, input = blockIdx.x * 64 + i % 8 * 8;
        if (tile * 64 + row < outputs && input < inputs)
            *(uint4*)(out + (long long)(blockIdx.y * 64 + row) * inputs + input) =
                *(const uint4*)(shared + row * ROW_BYTES + i % 8 * 16);
    }
}
