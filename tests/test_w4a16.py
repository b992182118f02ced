"""The decode product: layout and plans on the CPU, sources for every architecture, numbers on a GPU."""

import collections
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import w4a16_fit

from vllm_scalesearch.cuda_kernels import KernelBuildError, compile_kernel
from vllm_scalesearch.formats import NVFP4, QuantizedTensor, pack_e2m1, unpack_e2m1
from vllm_scalesearch.ops import w4a16, w4a16_plan
from vllm_scalesearch.search import quantize


def _weight(outputs: int, inputs: int, device: str = "cpu", seed: int = 0) -> QuantizedTensor:
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return quantize(values.to(device), policy="absmax")


def tile(weight: QuantizedTensor) -> w4a16.TiledWeight:
    """NVFP4 weights (N, K) as Humming keeps them: the formulas of ops/w4a16.py, padded with zeros."""
    codes = unpack_e2m1(weight.packed)
    outputs, inputs = codes.shape
    pad = (0, -inputs % 32, 0, -outputs % 64)
    codes = torch.nn.functional.pad(codes, pad)
    scales = torch.nn.functional.pad(weight.scales.view(torch.uint8), (0, pad[1] // 16, 0, pad[3]))
    # n = 64 a + 16 w + 8 b + c, k = 16 d + 8 e + 2 f + g
    split = codes.view(codes.shape[0] // 64, 4, 2, 8, codes.shape[1] // 16, 2, 4, 2)
    nibbles = split.permute(4, 0, 3, 6, 1, 7, 2, 5).reshape(codes.shape[1] // 16, -1, 8)
    words = pack_e2m1(nibbles).view(torch.int32).squeeze(-1)
    columns = scales.view(scales.shape[0] // 64, 8, 8, -1).permute(3, 0, 2, 1).reshape(scales.shape[1], -1)
    return w4a16.TiledWeight(
        words.contiguous(), columns.contiguous(), weight.tensor_scale.reshape(1), w4a16.scale_encoding(weight),
        1.0, outputs, inputs,
    )  # fmt: skip


def marlin(tiled: w4a16.TiledWeight) -> w4a16.TiledWeight:
    """The same weights with scales as Marlin keeps them, for a tensor whose power of two f is 1."""
    halves = (tiled.scales.view(torch.float8_e4m3fn).float() * 2**7).half().view(torch.int16)
    bytes_ = (halves >> 7 & 0xFF).to(torch.uint8)
    swapped = bytes_.view(len(bytes_), -1, 4)[..., [0, 2, 1, 3]].reshape(bytes_.shape)
    return replace(tiled, scales=swapped.contiguous(), encoding=w4a16.MARLIN, factor=2.0**7)


def test_layout_is_the_formula():
    weight = _weight(128, 96)
    tiled = tile(weight)
    n, k = torch.meshgrid(torch.arange(128), torch.arange(96), indexing="ij")
    word = n // 64 * 128 + (n % 8 * 4 + k % 8 // 2) * 4 + n % 64 // 16
    nibble = k % 2 * 4 + n // 8 % 2 * 2 + k // 8 % 2
    codes = tiled.codes[k // 16, word] >> (4 * nibble) & 0xF
    assert torch.equal(codes.to(torch.uint8), unpack_e2m1(weight.packed))
    n, block = torch.meshgrid(torch.arange(128), torch.arange(6), indexing="ij")
    scales = tiled.scales[block, n // 64 * 64 + n % 8 * 8 + n % 64 // 8]
    assert torch.equal(scales, weight.scales.view(torch.uint8))


@pytest.mark.parametrize("shape", [(64, 32), (100, 48), (1, 16), (192, 576)])
def test_layout_pads_with_zeros(shape):
    weight = _weight(*shape)
    tiled = tile(weight)
    assert tiled.padded_outputs % 64 == 0 and tiled.padded_inputs % 32 == 0
    assert int((tiled.scales != 0).sum()) == weight.scales.numel()
    nibbles = unpack_e2m1(tiled.codes.view(torch.uint8))
    assert int((nibbles != 0).sum()) == int((unpack_e2m1(weight.packed) != 0).sum())


def test_only_filled_blocks_with_subnormal_scales_need_the_slower_decoding():
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    values[1, 16:32] = 0
    assert w4a16.scale_encoding(quantize(values)) == w4a16.E4M3
    values[1, 16:32] = 1e-5
    assert w4a16.scale_encoding(quantize(values)) == w4a16.E4M3_SUBNORMAL


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 16, 17, 24, 25, 32])
@pytest.mark.parametrize(("clusters", "limit"), [(False, 99 << 10), (True, 99 << 10), (True, 227 << 10)])
def test_plans_cover_the_product(rows, clusters, limit):
    for outputs in (64, 192, 1024, 4096, 6144, 28672, 128256):
        for inputs in (32, 96, 576, 4096, 14336):
            for processors in (16, 108, 132):
                plan = w4a16.plan(rows, outputs, inputs, processors, limit, clusters)
                tiles = -(-outputs // (64 * plan.groups))
                assert rows <= plan.tokens < rows + 8 and plan.shared_bytes <= limit
                assert 1 <= plan.splits <= 8 and plan.splits <= inputs // 32
                assert not plan.cluster or (clusters and plan.splits > 1)
                # Blocks that add up in global memory wait for none, but have a workspace of so many sums.
                assert plan.splits == 1 or plan.cluster or tiles * plan.splits <= processors
                assert plan.splits == 1 or tiles <= 1024  # what is counted in a workspace
                assert plan.warps >= 2 and plan.threads <= 1024


@pytest.mark.parametrize(
    ("shape", "expected"),  # at 8, 16, 24 and 32 rows: groups, warps, splits
    [
        ((8704, 5120), [(4, 3, 3), (1, 4, 3), (4, 3, 3), (4, 3, 3)]),
        ((10240, 8192), [(3, 4, 2), (1, 4, 3), (1, 4, 3), (1, 4, 2)]),
        ((12288, 4096), [(2, 6, 1), (1, 4, 2), (1, 4, 2), (1, 4, 2)]),
        ((14336, 4096), [(2, 6, 1), (2, 6, 1), (2, 6, 1), (2, 6, 1)]),
        ((22016, 4096), [(1, 8, 1), (1, 4, 1), (1, 4, 1), (1, 4, 1)]),
        ((28672, 4096), [(4, 5, 1), (4, 5, 1), (2, 4, 1), (4, 3, 1)]),
        ((34816, 5120), [(5, 4, 1), (1, 4, 1), (5, 3, 1), (1, 4, 1)]),
        ((43008, 5376), [(6, 3, 1), (2, 3, 1), (2, 4, 1), (6, 2, 1)]),
        ((57344, 8192), [(8, 3, 1), (8, 2, 1), (1, 4, 1), (1, 4, 1)]),
        # And fewer.
        ((1536, 8960), [(1, 12, 4), (1, 8, 4), (1, 8, 4), (1, 8, 4)]),
        ((4096, 1024), [(1, 12, 1), (1, 8, 1), (1, 8, 1), (1, 8, 1)]),
        ((4608, 3584), [(2, 6, 3), (2, 6, 3), (2, 6, 3), (2, 6, 3)]),
        ((5120, 5120), [(1, 12, 1), (1, 4, 4), (1, 4, 4), (1, 4, 4)]),
        ((5120, 17408), [(3, 4, 4), (1, 4, 4), (2, 6, 3), (2, 6, 3)]),
        ((8192, 8192), [(2, 6, 2), (2, 6, 2), (2, 6, 2), (2, 6, 2)]),
        ((2560, 2560), [(1, 12, 2), (1, 8, 2), (1, 8, 2), (1, 8, 2)]),
        ((4096, 4096), [(1, 12, 2), (1, 8, 2), (1, 8, 2), (1, 8, 2)]),
        ((6144, 4096), [(1, 12, 1), (1, 16, 1), (1, 12, 1), (1, 8, 1)]),
        ((4096, 14336), [(1, 12, 2), (1, 12, 2), (1, 12, 2), (1, 12, 2)]),
    ],
)
def test_matrices_are_cut_as_measured_and_compile(shape, expected):
    """More tiles than an H100's 132 multiprocessors: of the cuts that are fast, one that gives all as many."""
    plans = [w4a16.plan(rows, *shape, 132, 227 << 10, True) for rows in (8, 16, 24, 32)]
    assert [(plan.groups, plan.warps, plan.splits) for plan in plans] == expected
    for plan in plans:  # the source checks its shared memory
        defines = plan.defines(torch.bfloat16, w4a16.E4M3)
        assert compile_kernel("w4a16_decode.cu", "w4a16_decode", defines, "sm_90a")[1:4] == b"ELF"


def test_many_tiles_fill_the_multiprocessors():
    """Of a matrix of two tiles for each or more, the busiest has less than 1.5 times the mean."""
    for processors, limit in ((132, 227 << 10), (108, 163 << 10), (128, 99 << 10)):
        for tiles in range(2 * processors, 3000, 7):
            for rows in (8, 16, 24, 32):
                plan = w4a16.plan(rows, 64 * tiles, 4096, processors, limit, processors == 132)
                assert plan.splits == 1 and plan.occupancy(tiles, processors, limit)[0] < 1.5, (tiles, plan)


@pytest.mark.parametrize(
    ("cut", "tiles", "limit", "expected"),
    [
        # Four blocks of 256 threads a multiprocessor: 528 tiles fill them, the next ones wait.
        (w4a16.Plan(8, 1, 8, 1, False, 2), 528, 227 << 10, (1.0, 1)),
        (w4a16.Plan(8, 1, 8, 1, False, 2), 544, 227 << 10, (5 * 132 / 544, 2)),
        (w4a16.Plan(8, 5, 4, 1, False, 3), 544, 227 << 10, (5 * 132 / 544, 1)),  # 109 blocks of five
        (w4a16.Plan(8, 1, 8, 1, False, 2), 400, 99 << 10, (4 * 132 / 400, 2)),  # shared memory for three
    ],
)
def test_occupancy(cut, tiles, limit, expected):
    assert cut.occupancy(tiles, 132, limit) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [8, 16, 24, 32])
def test_the_rule_is_what_was_measured(rows):
    assert w4a16_fit.fit(rows) == w4a16_plan.FITS[rows]


@pytest.mark.parametrize(
    ("name", "mean", "largest"), [("w4a16_cuts", 1.006, 1.05), ("w4a16_cuts_split", 1.003, 1.04)]
)
def test_cuts_are_nearly_the_best_that_were_measured(name, mean, largest):
    over = [w4a16_fit.over_best(line) for line in w4a16_fit.measured(name)]
    assert len(over) > 100 and statistics.geometric_mean(over) < mean and max(over) < largest


def test_a_plan_for_fewer_rows_is_refused():
    with pytest.raises(ValueError, match="a plan for 8 rows at most, got 9"):
        w4a16.product(
            torch.zeros(9, 64, dtype=torch.bfloat16),
            tile(_weight(64, 64)),
            cut=w4a16.Plan(8, 1, 8, 1, False, 3),
        )


def test_multiprocessors_are_left_idle_rather_than_given_two_blocks():
    """As measured: an H100 has 132, and holds 39 clusters of 3 blocks that fill one each but 30 of 4."""
    for outputs, splits in ((1024, 6), (2048, 3), (2560, 2), (4096, 2), (5120, 1), (6144, 1), (8192, 1)):
        for rows in (1, 16, 32):
            plan = w4a16.plan(rows, outputs, 4096, 132, 227 << 10, True)
            assert (plan.groups, plan.splits) == (1, splits), (outputs, rows)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"])
def test_source_compiles(arch):
    clusters = arch not in ("sm_80", "sm_86", "sm_89")
    limit = 227 * 1024 if clusters else 99 * 1024
    for rows, dtype, encoding in (
        (1, torch.bfloat16, w4a16.E4M3),
        (16, torch.float16, w4a16.E4M3_SUBNORMAL),
        (24, torch.bfloat16, w4a16.E4M3),
        (32, torch.bfloat16, w4a16.MARLIN),
    ):
        defines = w4a16.plan(rows, 4096, 4096, 132, limit, clusters).defines(dtype, encoding)
        assert compile_kernel("w4a16_decode.cu", "w4a16_decode", defines, arch)[1:4] == b"ELF"


def test_a_failed_build_has_the_compilers_words():
    with pytest.raises(KernelBuildError, match=r'identifier "TOKENS" is undefined'):
        compile_kernel("w4a16_decode.cu", "w4a16_decode", ("HALF=0",), "sm_90a")


def _pretend(monkeypatch, capability):
    """That the GPU has this compute capability."""
    from vllm.platforms.interface import DeviceCapability

    from vllm_scalesearch import linear

    monkeypatch.setattr(
        type(linear.current_platform),
        "get_device_capability",
        classmethod(lambda cls, device_id=0: DeviceCapability(*capability)),
    )


@pytest.mark.parametrize(
    ("kernel", "capabilities"),
    [("HummingNvFp4LinearKernel", {(9, 0)}), ("MarlinNvFp4LinearKernel", {(8, 0), (8, 9), (9, 0), (12, 0)})],
)
def test_only_weights_whose_order_is_known_are_read(monkeypatch, kernel, capabilities):
    """Humming keeps weights otherwise on other GPUs: reading those would give wrong numbers."""
    from vllm_scalesearch import linear, vllm_api

    made = object.__new__(getattr(vllm_api, kernel))
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0)):
        _pretend(monkeypatch, capability)
        assert linear._decode_reads(made) == (capability in capabilities)
    assert not linear._decode_reads(object())


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("kernel", "capability", "shape", "by_rows"),
    [
        ("Marlin", (9, 0), (4096, 4096), {1: "decode", 32: "decode", 33: "vLLM", 1023: "vLLM", 1024: "dense"}),
        ("Humming", (9, 0), (4096, 14336), {32: "decode", 33: "vLLM", 1791: "vLLM", 1792: "dense"}),
        ("Humming", (9, 0), (28672, 4096), {32: "decode", 33: "vLLM", 2559: "vLLM", 2560: "dense"}),
        ("Humming", (9, 0), (10240, 8192), {32: "decode", 33: "vLLM", 2560: "dense"}),
        ("Humming", (9, 0), (12288, 4096), {32: "decode", 33: "vLLM"}),
        ("Marlin", (8, 0), (28672, 4096), {32: "decode", 33: "vLLM", 8192: "vLLM"}),
    ],
)
def test_rows_decide_what_multiplies(monkeypatch, kernel, capability, shape, by_rows):
    """With and without scales of rows; none for no rows, which vLLM's kernels take."""
    from vllm_scalesearch import linear, vllm_api

    _pretend(monkeypatch, capability)
    ran = []

    def stand_in(name):
        return lambda x, *arguments: (ran.append(name), x.new_zeros(len(x), 1))[1]

    monkeypatch.setattr(w4a16, "product", stand_in("decode"))
    monkeypatch.setattr(w4a16, "dense_product", stand_in("dense"))
    made = object.__new__(getattr(vllm_api, f"{kernel}NvFp4LinearKernel"))
    monkeypatch.setattr(type(made), "apply_weights", lambda self, layer, x, bias: stand_in("vLLM")(x))
    product = object.__new__(linear._DecodeProduct)
    product.kernel, product.alpha, product.weight = made, 1.0, None
    weight = SimpleNamespace(outputs=shape[0], inputs=shape[1])
    product.dense_rows = linear._dense_rows(made, weight)
    layer = SimpleNamespace(plain_bias=None, bias=None)
    for rows, expected in {0: "vLLM", **by_rows}.items():
        x = torch.zeros(rows, 8)
        for scale in (None, torch.ones(rows, 1)):
            ran.clear()
            assert product.run(layer, x, scale, False).shape == (rows, 1)
            assert ran == [expected], rows


# fp32 sums of exact products, rounded once to the output: half a unit in the last place and a little.
_BOUND = {torch.bfloat16: 2**-8 * 1.02, torch.float16: 2**-11 * 1.1}


def _expected(x, weight, bias=None, row_scale=None):
    out = x.double() @ weight.dequantize(torch.float64).T
    if row_scale is not None:
        out = out * row_scale.double()
    return out if bias is None else out + bias.double()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (64, 32), (100, 48), (576, 576), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
        # Blocks of one to eight tiles, the last one not full.
        (12288, 512), (24576, 512), (34780, 528), (43008, 1024), (57300, 512),
    ],
)  # fmt: skip
def test_product_against_fp64(shape, dtype):
    weight = _weight(*shape, "cuda")
    tiled = tile(weight)
    w4a16.prepare(tiled, dtype)
    assert tiled.encoding == w4a16.E4M3
    generator = torch.Generator("cuda").manual_seed(0)
    for rows in (1, 2, 7, 8, 9, 16, 23, 24, 32):
        x = torch.randn(rows, shape[1], device="cuda", generator=generator).to(dtype)
        bias = torch.randn(shape[0], device="cuda", generator=generator).to(dtype)
        row_scale = torch.rand(rows, 1, device="cuda", generator=generator)
        for arguments in ({}, {"bias": bias}, {"row_scale": row_scale}, {"bias": bias, "row_scale": row_scale}):
            out = w4a16.product(x, tiled, **arguments)
            expected = _expected(x, weight, **arguments)
            # A sum of large products that cancel keeps their rounding: 2**-20 of the row's norm covers it.
            slack = expected.norm(dim=-1, keepdim=True) / expected.shape[1] ** 0.5 * 2**-16
            assert ((out.double() - expected).abs() <= expected.abs() * _BOUND[dtype] + slack).all()
            assert torch.equal(out, w4a16.product(x, tiled, **arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 16, 23, 31])
@pytest.mark.parametrize("even", [False, True], ids=["any_steps", "even_steps"])
def test_every_cut_of_a_small_matrix(rows, even):
    """All cuts that GPUs of several sizes take, also those that this one does not, on matrices that
    compute-sanitizer is done with soon. even: all warps have as many steps, two."""
    major, _ = torch.cuda.get_device_capability()
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    sizes = [(132, 227 << 10, True), (132, 227 << 10, False), (108, 163 << 10, False), (128, 99 << 10, False)]
    cuts = {
        w4a16.plan(rows, 64 * tiles, inputs, *size)
        for size in sizes
        for tiles in (4, 20, 24, 32, 40, 64, 72, 80, 90, 128, 136, 144, 160, 192, *range(264, 1200, 40))
        for inputs in (576, 1536, 4096, 14336)
    }
    cuts = [cut for cut in cuts if cut.shared_bytes <= limit and (major >= 9 or not cut.cluster)]
    assert len({cut.groups for cut in cuts}) > 1 and len({cut.splits for cut in cuts}) > 1
    generator = torch.Generator("cuda").manual_seed(0)
    by_shape = collections.defaultdict(list)
    for cut in cuts:
        inputs = 32 * 2 * cut.warps * cut.splits if even else 528
        by_shape[64 * 2 * cut.groups + 36, inputs].append(cut)
    for shape, those in by_shape.items():
        x = torch.randn(rows, shape[1], device="cuda", generator=generator).bfloat16()
        weight = _weight(*shape, "cuda")
        tiled, expected = tile(weight), _expected(x, weight)
        slack = expected.norm(dim=-1, keepdim=True) / expected.shape[1] ** 0.5 * 2**-16
        for cut in those:
            out = w4a16.product(x, tiled, cut=cut).double()
            close = (out - expected).abs() <= expected.abs() * _BOUND[torch.bfloat16] + slack
            assert close.all(), cut


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_subnormal_scales_are_exact(dtype):
    values = torch.randn(256, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    values *= torch.logspace(0, -6, 32, device="cuda").repeat_interleave(16)
    weight = quantize(values)
    tiled = tile(weight)
    assert tiled.encoding == w4a16.E4M3_SUBNORMAL
    for start in range(0, 512, 64):  # one part of the inputs at a time, so that small blocks show
        x = torch.zeros(9, 512, device="cuda", dtype=dtype)
        x[:, start : start + 64] = torch.randn(9, 64, device="cuda")
        expected = _expected(x, weight)
        out = w4a16.product(x, tiled).double()
        smallest = 2**-25 * out.numel() ** 0.5 if dtype == torch.float16 else 0  # an output may be subnormal
        assert (out - expected).norm() <= expected.norm() * _BOUND[dtype] + smallest


@pytest.mark.gpu
def test_every_code_times_every_scale():
    codes = torch.arange(16, dtype=torch.uint8, device="cuda").repeat(128, 16)
    scales = torch.arange(128, dtype=torch.uint8, device="cuda").clamp(0, 126).unsqueeze(1).repeat(1, 16)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    weight = QuantizedTensor(packed, scales.view(torch.float8_e4m3fn), torch.ones((), device="cuda"), NVFP4)
    for dtype in (torch.bfloat16, torch.float16):
        tiled = tile(weight)
        x = torch.eye(256, device="cuda", dtype=dtype)
        out = torch.cat([w4a16.product(part, tiled) for part in x.split(32)])
        assert torch.equal(out.double(), weight.dequantize(torch.float64).T)


@pytest.mark.gpu
def test_captured_and_on_two_streams():
    weight = _weight(512, 1024, "cuda")
    tiled = tile(weight)
    w4a16.prepare(tiled, torch.bfloat16)
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    expected = w4a16.product(x, tiled)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [w4a16.product(x, tiled) for _ in range(20)]
    graph.replay()
    assert all(torch.equal(out, expected) for out in outs)
    x.mul_(2)
    graph.replay()
    assert all(torch.equal(out, expected * 2) for out in outs)
    side = torch.cuda.Stream()
    for _ in range(50):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            one = w4a16.product(x, tiled)
        two = w4a16.product(x, tiled)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(one, two) and torch.equal(one, expected * 2)


@pytest.mark.gpu
def test_not_a_number_stays_in_its_row():
    weight = _weight(256, 512, "cuda")
    x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    clean = w4a16.product(x, tile(weight))
    x[3, 100] = torch.nan
    out = w4a16.product(x, tile(weight))
    assert out[3].isnan().all()
    keep = torch.arange(16, device="cuda") != 3
    assert torch.equal(out[keep], clean[keep])


@pytest.mark.gpu
def test_misaligned_input_is_copied():
    weight = _weight(256, 512, "cuda")
    x = torch.randn(1 + 3 * 512, device="cuda", dtype=torch.bfloat16)[1:].view(3, 512)
    assert torch.equal(w4a16.product(x, tile(weight)), w4a16.product(x.clone(), tile(weight)))


@pytest.mark.gpu
def test_bad_input_is_named():
    tiled = tile(_weight(64, 64, "cuda"))
    for x in (torch.zeros(33, 64), torch.zeros(1, 32), torch.zeros(64)):
        with pytest.raises(ValueError, match="1 to 32 rows by 64"):
            w4a16.product(x.cuda().bfloat16(), tiled)
    with pytest.raises(ValueError, match="bf16 or fp16"):
        w4a16.product(torch.zeros(1, 64, device="cuda"), tiled)


AS_KEPT = pytest.mark.parametrize(
    "kept", [tile, lambda weight: marlin(tile(weight))], ids=["humming", "marlin"]
)


@pytest.mark.gpu
@AS_KEPT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantized_rows_are_exact(dtype, kept):
    for shape in ((64, 32), (100, 48), (576, 576)):
        weight = _weight(*shape, "cuda")
        tiled = kept(weight)
        expected = weight.dequantize(torch.float64)
        for first, last in ((0, shape[0]), (64 if shape[0] > 64 else 0, shape[0])):
            values = w4a16.dequantize(tiled, dtype, first, last).double()
            values = values * tiled.multiplier * weight.tensor_scale.double()
            assert torch.equal(values.float(), expected[first:last].float())


@pytest.mark.gpu
@AS_KEPT
def test_many_rows_by_cublas(kept):
    weight = _weight(4160, 576, "cuda")  # more than one piece, the last one narrow
    tiled = kept(weight)
    x = torch.randn(300, 576, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(4160, device="cuda", dtype=torch.bfloat16)
    row_scale = torch.rand(300, 1, device="cuda")
    alpha = tiled.multiplier * float(weight.tensor_scale)
    for arguments in ({}, {"bias": bias}, {"row_scale": row_scale}, {"bias": bias, "row_scale": row_scale}):
        out = w4a16.dense_product(x, tiled, alpha, **arguments)
        expected = _expected(x, weight, **arguments)
        assert (out.double() - expected).norm() <= expected.norm() * 2**-8


@pytest.mark.parametrize(("splits", "cluster"), [(1, False), (2, False), (2, True)])
def test_memory_for_sums_is_taken_only_where_no_cluster_has_it(monkeypatch, splits, cluster):
    """A graph that is captured can get no such memory: where none was reserved, none must be asked for."""
    tiled, launches, asked = tile(_weight(512, 64)), [], []
    plan = w4a16.Plan(8, 1, 4, splits, cluster, 2)
    sums = torch.empty(plan.splits * 512 * 8), torch.zeros(8, dtype=torch.int32)
    workspaces = SimpleNamespace(reserve=asked.append, of=lambda stream: sums)
    monkeypatch.setattr(w4a16, "_plan_for", lambda rows, weight: plan)
    monkeypatch.setattr(w4a16, "_kernel_for", lambda *_: lambda *given, **how: launches.append((given, how)))
    monkeypatch.setattr(w4a16, "_workspaces", lambda device: workspaces)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert w4a16.product(torch.zeros(3, 64, dtype=torch.bfloat16), tiled).shape == (3, 512)
    ((given, how),) = launches
    assert given[0] == (8, splits, 1) and how == {"cluster": cluster, "early": True}
    in_memory = splits == 2 and not cluster
    assert asked == ([sums[0].numel()] if in_memory else [])
    assert any(each is sums[0] for each in given) == any(each is sums[1] for each in given) == in_memory


def test_sums_are_fp32_while_vllm_loads_a_model() -> None:
    """Which makes the model's dtype the default one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        workspaces = w4a16._Workspaces(torch.device("cpu"))
        workspaces.reserve(100)
    finally:
        torch.set_default_dtype(before)
    assert all(sums.dtype == torch.float32 and len(sums) == 100 for sums, _ in workspaces._spare)
