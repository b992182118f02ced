// Products of a warp's matrices of 16-bit numbers, and their operands from shared memory. HALF: the model's numbers are
// fp16, not bf16.
#pragma once

typedef unsigned int u32;

// c (16, 8) += a (16, 16) b (16, 8), fp16.
__device__ __forceinline__ void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of numbers of the model's dtype.
__device__ __forceinline__ void mma_16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
#endif
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit numbers from shared memory: lane l has the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}

// The address that a lane needs for 16 rows of 16 numbers, PITCH bytes apart, to be operand A.
template <int PITCH>
__device__ __forceinline__ u32 matrices_address(const void* rows, int lane) {
    return shared_address(rows) + lane % 16 * PITCH + lane / 16 * 16;
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_transposed(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}

// The address that a lane needs for 16 rows of 16 numbers, PITCH bytes apart, to be the columns of operand A.
template <int PITCH>
__device__ __forceinline__ u32 transposed_address(const void* rows, int lane) {
    return shared_address(rows) + (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16;
}
