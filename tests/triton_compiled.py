"""Triton kernels of the paged cache compiled without a GPU, and what they take of one."""

import re
import subprocess

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Arguments that are not pointers to the packed pages (u8), the model's values or fp32 or i32 scalars.
TYPES = dict(
    pages_ptr="*u8", slots_ptr="*i64", full_slots_ptr="*i64", query_start_loc_ptr="*i32", seq_lens_ptr="*i32",
    block_table_ptr="*i32", full_block_table_ptr="*i32", matrix_ptr="*fp32", partial_ptr="*fp32",
    maximum_ptr="*fp32", total_ptr="*fp32", v_scale="fp32", score_scale="fp32", cap="fp32", unit="fp32",
)  # fmt: skip


def compiled(kernel, constants: dict, arch: int, dtype: str = "bf16", **launch):
    """A kernel compiled without a GPU, its strides and pointers divisible by 16."""
    names = kernel.arg_names
    types = {
        name: TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in names
        if name not in constants
    }
    aligned = [
        name
        for name, kind in types.items()
        if kind[0] == "*" or (name.endswith(("stride", "words")) and "table" not in name)
    ]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False, **launch}
    )


def spilled(binary, path) -> int:
    """Bytes of stack of a thread, which hold what registers do not."""
    path.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


# The least that a program may have of shared memory, among GPUs from 8.0 on; and what Hopper has.
SHARED_MEMORY, HOPPER_SHARED_MEMORY = 99 * 1024, 227 * 1024
