"""CUDA C++ kernels of kernels/, compiled with NVRTC on first use and kept in a cache.

NVRTC and the CUDA driver's functions come with PyTorch's own dependencies (`cuda-bindings` and
`nvidia-cuda-nvrtc`), so nothing needs a system toolkit or a host compiler.
"""

import functools
import hashlib
import os
import tempfile
from ctypes import c_float, c_int, c_void_p
from pathlib import Path

import torch

from vllm_scalesearch.paths import cache_dir

_SOURCES = Path(__file__).parent / "kernels"
_OPTIONS = ("--std=c++17", "--fmad=false", "--extra-device-vectorization")


class KernelBuildError(RuntimeError):
    """A kernel of this package did not compile or load; the message has the compiler's output."""


def _bindings():
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise KernelBuildError(
            "vllm-scalesearch's CUDA kernels need the Python package cuda-bindings, which PyTorch for "
            f"CUDA installs (pip install 'vllm-scalesearch[gpu]'): {error}"
        ) from error
    return driver, nvrtc


def _check(result: tuple, what: str):
    """What a call of cuda.bindings returned beside its status; raises when the status is an error."""
    status, *values = result
    if int(status) != 0:
        raise KernelBuildError(f"{what}: {status.name}")
    return values[0] if len(values) == 1 else values


def _headers() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(_SOURCES.glob("*.cuh"))}


def compile_kernel(source: str, name: str, defines: tuple[str, ...], arch: str) -> bytes:
    """Machine code of one source file of kernels/.

    source: file name. name: of the program, for messages. defines: ``NAME=VALUE`` macros.
    arch: as ``sm_90a``. Raises KernelBuildError with NVRTC's log.
    """
    _, nvrtc = _bindings()
    headers = _headers()
    options = [*_OPTIONS, f"--gpu-architecture={arch}", *(f"-D{define}" for define in defines)]
    program = _check(
        nvrtc.nvrtcCreateProgram(
            (_SOURCES / source).read_bytes(),
            source.encode(),
            len(headers),
            list(headers.values()),
            [header.encode() for header in headers],
        ),
        f"{name}: NVRTC",
    )
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status) != 0:
        size = _check(nvrtc.nvrtcGetProgramLogSize(program), f"{name}: NVRTC's log")
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise KernelBuildError(
            f"{source} did not compile for {arch} with {' '.join(options)}:\n{log.decode(errors='replace')}"
        )
    size = _check(nvrtc.nvrtcGetCUBINSize(program), f"{name}: NVRTC's result")
    code = b" " * size
    _check(nvrtc.nvrtcGetCUBIN(program, code), f"{name}: NVRTC's result")
    nvrtc.nvrtcDestroyProgram(program)
    return code


def machine_code(source: str, name: str, defines: tuple[str, ...], arch: str) -> bytes:
    """`compile_kernel`, or what the cache has of it. Needs no GPU."""
    _, nvrtc = _bindings()
    version = _check(nvrtc.nvrtcVersion(), "NVRTC's version")
    key = repr(((_SOURCES / source).read_bytes(), _headers(), defines, arch, _OPTIONS, version))
    path = cache_dir() / "kernels" / f"{name}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    if path.exists():
        return path.read_bytes()
    code = compile_kernel(source, name, defines, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may compile the same kernel: each writes a file of its own, the last one stays.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)
    return code


def arch_of(device: torch.device) -> str:
    """NVRTC's name of a GPU's architecture, with its own instructions where it has such (``sm_90a``)."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


class Kernel:
    """A loaded kernel. It runs on the current stream and can be captured in a CUDA graph."""

    def __init__(self, function) -> None:
        self._driver, _ = _bindings()
        self._function = function

    def __call__(
        self,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        *arguments,
        early: bool = False,
        cluster: bool = False,
    ) -> None:
        """Launch it. Tensors go by their address and None as a null pointer, int as a 32-bit int and
        float as a 32-bit float; shared_bytes is the dynamic shared memory of a block.

        early: the kernel may start while the one before it on the stream ends; it waits for that one's
        results itself (griddepcontrol.wait, sm_90 and newer).
        cluster: blocks with the same grid x and z form a cluster, at most 8 of them (sm_90 and newer).
        """
        values, types = [], []
        for argument in arguments:
            if isinstance(argument, float):
                values.append(argument)
                types.append(c_float)
            elif isinstance(argument, int):
                values.append(argument)
                types.append(c_int)
            else:
                values.append(0 if argument is None else argument.data_ptr())
                types.append(c_void_p)
        stream = torch.cuda.current_stream().cuda_stream
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = stream
        ids = self._driver.CUlaunchAttributeID
        attributes = []
        if early:
            attribute = self._driver.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster:
            attribute = self._driver.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y = 1, grid[1]
            attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        (status,) = self._driver.cuLaunchKernelEx(config, self._function, (tuple(values), tuple(types)), 0)
        if int(status) != 0:
            raise RuntimeError(
                f"kernel launch failed: {status.name}, grid {grid}, block {block}, {shared_bytes} bytes shared"
            )


@functools.cache
def _load(source: str, name: str, defines: tuple[str, ...], device_index: int) -> Kernel:
    driver, _ = _bindings()
    device = torch.device("cuda", device_index)
    code = machine_code(source, name, defines, arch_of(device))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the primary context exists
        module = _check(driver.cuModuleLoadData(code), f"{name}: loading")
        function = _check(driver.cuModuleGetFunction(module, name.encode()), f"{name}: loading")
        largest = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, largest), f"{name}: shared memory")
    return Kernel(function)


def kernel(source: str, name: str, defines: tuple[str, ...], device: torch.device) -> Kernel:
    """The ``extern "C"`` kernel `name` of kernels/`source`, compiled for `device` with macros `defines`.

    The first call compiles, or reads the cache in ``$XDG_CACHE_HOME/vllm-scalesearch/kernels``; do that
    before a CUDA graph is captured. A kernel has no static shared memory, so that a launch may ask for
    all that a block can have. Raises KernelBuildError.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return _load(source, name, defines, index)


def readable(x: torch.Tensor) -> torch.Tensor:
    """x (T, heads, D) of 16 bits, or a copy, so that a kernel can read its heads 16 bytes at a time."""
    if x.stride(2) == 1 and not (x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16):
        return x
    return x.contiguous()
