"""A linear layer whose weights, and inputs where asked, are in a searched block format."""

import sys
from collections.abc import Callable

import torch
from torch.nn import Parameter

from vllm_scalesearch import linear_fp4
from vllm_scalesearch.formats import QuantizedTensor, finite_amax, swizzle_scales, tensor_scale_of
from vllm_scalesearch.loading import checked_loader
from vllm_scalesearch.ops import w4a16
from vllm_scalesearch.ops.packed_linear import packed_linear
from vllm_scalesearch.ops.quantize import quantize_packed, quantize_values, quantize_weight
from vllm_scalesearch.options import LayerOptions
from vllm_scalesearch.vllm_api import (
    HummingNvFp4LinearKernel,
    LinearMethodBase,
    MarlinNvFp4LinearKernel,
    ModelWeightParameter,
    UnquantizedLinearMethod,
    amax_for_tp_weight_quant,
    current_platform,
    dispatch_cpu_unquantized_gemm,
    get_current_vllm_config,
    get_forward_context,
    init_logger,
    init_mxfp4_linear_kernel,
    init_nvfp4_linear_kernel,
    initialize_online_processing,
    register_weight_loader_v2_supported_method,
)

logger = init_logger("vllm.scalesearch.linear")


@register_weight_loader_v2_supported_method
class FullPrecisionLinearMethod(UnquantizedLinearMethod):
    """A layer that stays as it is in the checkpoint.

    It takes part in `check_model`, which under pipeline parallelism waits for every rank, also for
    one whose layers are all left alone.
    """

    def __init__(self, check_model: Callable[[], None]) -> None:
        super().__init__()
        self.check_model = check_model

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.check_model()
        super().process_weights_after_loading(layer)


class ScaleSearchLinearMethod(LinearMethodBase):
    """Loads a bf16 or fp16 weight, quantizes it once it is complete, and multiplies with it.

    The weight waits on the meta device until the checkpoint has delivered all of it, so loading
    needs the quantized model and one layer. A fused layer (q, k and v; gate and up) has one tensor
    scale, taken over all tensor-parallel ranks: codes do not depend on how the model is split.
    """

    uses_meta_device = True

    def __init__(
        self, options: LayerOptions, prefix: str, cpu_storage: str, check_model: Callable[[], None]
    ) -> None:
        """options, cpu_storage: see options.py. prefix: the layer's name.

        check_model: called before the weight is quantized, when all layers of the model are built.
        """
        self.options = options
        self.prefix = prefix
        self.cpu_storage = cpu_storage
        self.check_model = check_model
        self.product: _Product

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        block = self.options.block_format.block_size
        if input_size_per_partition % block:
            logger.warning(
                "scalesearch: %s stays in %s: its input width %d (%d on this rank) is not a "
                "multiple of the %s block of %d",
                self.prefix, params_dtype, input_size, input_size_per_partition,
                self.options.format, block,
            )  # fmt: skip
            layer.quant_method = FullPrecisionLinearMethod(self.check_model)
            layer.quant_method.create_weights(
                layer, input_size_per_partition, output_partition_sizes, input_size, output_size,
                params_dtype, **extra_weight_attrs,
            )  # fmt: skip
            return
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = sum(output_partition_sizes)
        layer.params_dtype = params_dtype
        whole = (input_size, output_size)
        self.is_sharded = (input_size_per_partition, layer.output_size_per_partition) != whole
        weight = ModelWeightParameter(
            data=torch.empty(
                layer.output_size_per_partition, input_size_per_partition, device="meta", dtype=params_dtype
            ),
            input_dim=1,
            output_dim=0,
            weight_loader=checked_loader(extra_weight_attrs["weight_loader"], self.prefix),
        )
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)
        self.product = _product(self.cpu_storage, self.options, self.prefix, layer)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module):
        raise ValueError(
            f"scalesearch: {self.prefix} is tied to the embeddings, which stay in full precision; "
            "leave option 'lm_head' off"
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.check_model()
        self.product.load(layer, self._quantize(layer))
        layer._already_called_process_weights_after_loading = True

    def _quantize(self, layer: torch.nn.Module) -> QuantizedTensor:
        weight = layer.weight.data
        fmt = self.options.block_format
        amax = finite_amax(weight)
        if not torch.isfinite(weight).all():
            amax.fill_(torch.inf)  # all ranks must learn of it, or the others would wait for this one
        amax = amax_for_tp_weight_quant(amax.reshape(1), self.is_sharded).reshape(())
        if torch.isinf(amax):
            raise ValueError(f"scalesearch: {self.prefix}: the checkpoint's weight holds NaN or infinity")
        tensor_scale = tensor_scale_of(amax) if fmt.has_tensor_scale else None
        return quantize_weight(weight, fmt, self.options.weights, tensor_scale)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.options.activations is None:
            return self.product.apply(layer, x, bias)
        return self.product.apply_quantized(layer, x, self.options.format, self.options.activations, bias)


def _scale(out: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``out * scale + bias`` in fp32, rounded once to out's dtype."""
    scaled = out.float() * scale
    if bias is not None:
        scaled = scaled + bias
    return scaled.to(out.dtype)


class _Product:
    """``x @ W.T + bias`` for a quantized W, on one kind of machine."""

    def load(self, layer: torch.nn.Module, weight: QuantizedTensor) -> None:
        """Replace the layer's loaded weight by `weight` in the form that `apply` reads."""
        raise NotImplementedError

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def apply_scaled(
        self, layer: torch.nn.Module, x: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """``(x * row_scale) @ W.T + bias`` for quantized inputs; row_scale: fp32 (..., 1)."""
        if bias is not None:
            bias = getattr(layer, "plain_bias", bias)
        return _scale(self.apply(layer, x, None), row_scale, bias)

    def apply_quantized(
        self, layer: torch.nn.Module, x: torch.Tensor, format: str, policy: str, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`apply` on x (..., K) quantized by the search, with one tensor scale a row."""
        values, residual = quantize_values(x, format, policy)
        return self.apply_scaled(layer, values, residual, bias)


class _DenseCpuProduct(_Product):
    """Weights dequantized once, exactly, to 16 bits; the product is vLLM's own for bf16 on the CPU."""

    def load(self, layer: torch.nn.Module, weight: QuantizedTensor) -> None:
        values, residual = weight.values(layer.params_dtype)
        layer.weight = Parameter(values, requires_grad=False)
        layer.register_buffer("weight_residual", residual, persistent=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _scale(layer.cpu_linear(x, layer.weight, None), layer.weight_residual, bias)


class _PackedCpuProduct(_Product):
    """Weights kept at 4.5 bits and dequantized at every use."""

    def load(self, layer: torch.nn.Module, weight: QuantizedTensor) -> None:
        layer.weight = Parameter(weight.packed, requires_grad=False)
        layer.weight_scale = Parameter(weight.scales, requires_grad=False)
        layer.weight_global_scale = Parameter(weight.tensor_scale, requires_grad=False)
        self.format = weight.format

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = QuantizedTensor(layer.weight, layer.weight_scale, layer.weight_global_scale, self.format)
        return _scale(packed_linear(x, weight), weight.residual(x.dtype), bias)


class _VllmKernelProduct(_Product):
    """vLLM's own 4-bit weight-only kernel for this GPU, fed with our codes and scales."""

    def __init__(self, kernel) -> None:
        """kernel: as vLLM's choice for this GPU returns it."""
        self.kernel = kernel

    def load(self, layer: torch.nn.Module, weight: QuantizedTensor) -> None:
        layer.weight = Parameter(weight.packed, requires_grad=False)
        if weight.format.has_tensor_scale:
            layer.weight_scale = Parameter(weight.scales, requires_grad=False)
            layer.weight_global_scale = Parameter(weight.tensor_scale, requires_grad=False)
        else:
            layer.weight_scale = Parameter(weight.scales.view(torch.uint8), requires_grad=False)
        bias = getattr(layer, "bias", None)
        layer.has_bias = bias is not None  # read by Humming; an output head does not have it
        if bias is not None:
            # The kernel may pad and reorder the bias for itself. With quantized inputs the bias is
            # added after their scale, outside the kernel, and as it was.
            layer.register_buffer("plain_bias", bias.detach().clone(), persistent=False)
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.kernel.apply_weights(layer, x, bias)


class _DecodeProduct(_VllmKernelProduct):
    """Our weight-streaming kernel for the few rows of a decode step, vLLM's for more.

    Both read one copy of the weights. The choice depends on the number of rows, which torch.compile
    does not know: compiled code sees one operator that finds the layer by its name.
    """

    def __init__(self, kernel, prefix: str, layer: torch.nn.Module) -> None:
        super().__init__(kernel)
        self.name = f"{prefix}.scalesearch"
        self.weight: w4a16.TiledWeight
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = layer

    def load(self, layer: torch.nn.Module, weight: QuantizedTensor) -> None:
        encoding, tensor_scale = w4a16.scale_encoding(weight), weight.tensor_scale
        super().load(layer, weight)
        factor = 1.0
        if isinstance(self.kernel, MarlinNvFp4LinearKernel):
            # Marlin's tensor scale has the power of two in it that its floats lack.
            encoding, tensor_scale = w4a16.MARLIN, layer.weight_global_scale
            factor = 1.0 if layer.params_dtype == torch.float16 else 2.0**-112
        self.weight = w4a16.TiledWeight(
            layer.weight, layer.weight_scale, tensor_scale.reshape(1), encoding, factor,
            layer.output_size_per_partition, layer.input_size_per_partition,
        )  # fmt: skip
        self.alpha = self.weight.multiplier * float(tensor_scale)
        self.dense_rows = _dense_rows(self.kernel, self.weight)
        dense = self.dense_rows < sys.maxsize
        w4a16.prepare(self.weight, layer.params_dtype)
        logger.info_once(
            "scalesearch: %d x %d: up to %d rows by the weight-streaming kernel, fastest for few on an H100, "
            "on %s's copy of the weights; more by that%s",
            self.weight.outputs,
            self.weight.inputs,
            w4a16.MAX_ROWS,
            type(self.kernel).__name__,
            f", and by cuBLAS on dequantized pieces from {self.dense_rows} rows" if dense else "",
        )

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._apply(layer, x, None, bias is not None)

    def apply_scaled(self, layer, x, row_scale, bias):
        return self._apply(layer, x, row_scale, bias is not None)

    def _apply(
        self, layer: torch.nn.Module, x: torch.Tensor, row_scale: torch.Tensor | None, with_bias: bool
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.vllm_scalesearch.linear(
                x, row_scale, with_bias, layer.output_size_per_partition, self.name
            )
        return self.run(layer, x, row_scale, with_bias)

    def run(
        self, layer: torch.nn.Module, x: torch.Tensor, row_scale: torch.Tensor | None, with_bias: bool
    ) -> torch.Tensor:
        rows = x.shape[:-1].numel()
        bias = layer.plain_bias if with_bias else None
        if 0 < rows <= w4a16.MAX_ROWS:
            out = w4a16.product(x.reshape(rows, -1), self.weight, bias, row_scale)
            return out.view(*x.shape[:-1], out.shape[-1])
        if rows >= self.dense_rows:
            if row_scale is not None:
                row_scale = row_scale.reshape(rows, 1)
            out = w4a16.dense_product(x.reshape(rows, -1), self.weight, self.alpha, bias, row_scale)
            return out.view(*x.shape[:-1], out.shape[-1])
        if row_scale is None:
            return self.kernel.apply_weights(layer, x, layer.bias if with_bias else None)
        return _scale(self.kernel.apply_weights(layer, x, None), row_scale, bias)


class _NativeFp4Product(_Product):
    """NVFP4 weights times NVFP4 inputs on the GPU's FP4 units, by a GEMM of vLLM's or FlashInfer's.

    x: (..., K) bf16 or fp16. It is quantized by the search, with one tensor scale a row; the GEMM's 16-bit
    result is multiplied by weight and row scales in fp32, the bias is added, and that is rounded once. For
    torch.compile this is one operator, vLLM's GEMM and elementwise arithmetic: all of it can be captured in
    a CUDA graph. Not run on such a GPU: see linear_fp4.py.
    """

    def __init__(self, kernel) -> None:
        """kernel: of `linear_fp4.native_fp4_kernel`."""
        self.kernel = kernel

    def load(self, layer: torch.nn.Module, weight: QuantizedTensor) -> None:
        linear_fp4.load(self.kernel, layer, weight)

    def apply_quantized(
        self, layer: torch.nn.Module, x: torch.Tensor, format: str, policy: str, bias: torch.Tensor | None
    ) -> torch.Tensor:
        shape = (*x.shape[:-1], layer.output_size_per_partition)
        if x.numel() == 0:  # no GEMM promises to take it
            return x.new_empty(shape)
        packed, scales, row_scale = quantize_packed(x, format, policy)
        out = linear_fp4.multiply(self.kernel, layer, packed, scales, x.dtype)
        return _scale(out, layer.result_scale * row_scale, bias).view(shape)


class _TritonFp4Product(_Product):
    """NVFP4 weights times NVFP4 inputs on the GPU's FP4 units, by this package's Triton kernel.

    x: (..., K) bf16 or fp16. It is quantized by the search, with one tensor scale a row; all scales and the
    bias are applied to fp32 sums, which are rounded once. For torch.compile these are two operators. Compiled
    for sm_100a and sm_120a, not run there: see ops/fp4_product.py.
    """

    def __init__(self) -> None:
        from vllm_scalesearch.ops.fp4_product import fp4_product  # with Triton, which only this needs

        self.multiply = fp4_product

    def load(self, layer: torch.nn.Module, weight: QuantizedTensor) -> None:
        layer.weight = Parameter(weight.packed, requires_grad=False)
        layer.weight_scale = Parameter(swizzle_scales(weight.scales), requires_grad=False)
        layer.weight_global_scale = Parameter(weight.tensor_scale, requires_grad=False)

    def apply_quantized(
        self, layer: torch.nn.Module, x: torch.Tensor, format: str, policy: str, bias: torch.Tensor | None
    ) -> torch.Tensor:
        packed, scales, row_scale = quantize_packed(x, format, policy)
        weight = (layer.weight, layer.weight_scale, layer.weight_global_scale)
        out = self.multiply(packed, scales, row_scale, *weight, bias, x.dtype)
        return out.view(*x.shape[:-1], layer.output_size_per_partition)


_LIB = torch.library.Library("vllm_scalesearch", "FRAGMENT")
_LIB.define("linear(Tensor x, Tensor? row_scale, bool with_bias, int outputs, str layer) -> Tensor")


def _linear(
    x: torch.Tensor, row_scale: torch.Tensor | None, with_bias: bool, outputs: int, layer: str
) -> torch.Tensor:
    module = get_forward_context().no_compile_layers[layer]
    return module.quant_method.product.run(module, x, row_scale, with_bias)


def _linear_fake(
    x: torch.Tensor, row_scale: torch.Tensor | None, with_bias: bool, outputs: int, layer: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


_LIB.impl("linear", _linear, "CUDA")
torch.library.register_fake("vllm_scalesearch::linear", _linear_fake, lib=_LIB)


def _dense_rows(kernel, weight: w4a16.TiledWeight) -> int:
    """From how many rows on dequantized pieces are the fastest."""
    if current_platform.get_device_capability() != (9, 0):  # not measured elsewhere
        return sys.maxsize
    return w4a16.dense_rows(weight.outputs, weight.inputs, not isinstance(kernel, HummingNvFp4LinearKernel))


def _decode_reads(kernel) -> bool:
    """Whether ops/w4a16.py knows the order in which `kernel` keeps its weights on this GPU.

    Humming's was read for Hopper and may be another elsewhere; Marlin's is one, and the decode kernel
    needs compute capability 8.0.
    """
    capability = current_platform.get_device_capability()
    if isinstance(kernel, HummingNvFp4LinearKernel):
        return capability == (9, 0)
    return isinstance(kernel, MarlinNvFp4LinearKernel) and capability >= (8, 0)


def _product(cpu_storage: str, options: LayerOptions, prefix: str, layer: torch.nn.Module) -> _Product:
    if current_platform.is_cpu():
        logger.info_once(
            "scalesearch: product in torch on exactly dequantized weights, kept %s (%s), because "
            "this machine's vLLM runs on the CPU",
            cpu_storage,
            "16 bits a weight" if cpu_storage == "dense" else "packed, dequantized at every use",
        )
        return _DenseCpuProduct() if cpu_storage == "dense" else _PackedCpuProduct()
    nvfp4 = options.format == "nvfp4"
    inputs = "inputs not quantized"
    if options.activations is not None:
        native, reason = None, f"vLLM's FP4 products are for nvfp4, not {options.format}"
        if nvfp4:
            native, reason = linear_fp4.native_fp4_kernel()
        if native is not None:
            logger.info_once(
                "scalesearch: product by the GEMM of vLLM's %s on FP4 units, inputs quantized before it (%s)",
                type(native).__name__,
                reason,
            )
            return _NativeFp4Product(native)
        if nvfp4:
            uses_triton, reason = linear_fp4.uses_triton_product(reason)
            if uses_triton:
                logger.info_once(
                    "scalesearch: product by this package's Triton kernel on FP4 units, inputs quantized "
                    "before it (%s)",
                    reason,
                )
                return _TritonFp4Product()
        inputs = f"inputs quantized before it and multiplied in 16 bits: {reason}"
    kernel = init_nvfp4_linear_kernel(use_a16=True) if nvfp4 else init_mxfp4_linear_kernel()
    product = _DecodeProduct(kernel, prefix, layer) if _decode_reads(kernel) else _VllmKernelProduct(kernel)
    logger.info_once(
        "scalesearch: product by vLLM's %s (%s), its choice for %s weights on this GPU",
        type(kernel).__name__,
        inputs,
        options.format,
    )
    return product
