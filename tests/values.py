"""Values to quantize, from kind ones to unkind ones, and the comparison of what comes of them."""

import torch


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def tokens(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows over all magnitudes that the dtype has, every third with outliers."""
    low, high = (-3, 2) if dtype == torch.float16 else (-20, 20)
    x = normal(rows, width, seed=rows) * torch.logspace(low, high, rows).unsqueeze(1)
    x[::3, 5] *= 100
    return x.to(dtype)


def distributions(blocks: int, seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """fp32 blocks (blocks, 16) of several kinds, none of them all zero."""
    rng = generator(seed, device)
    normal = torch.randn(blocks, 16, device=device, generator=rng)
    uniform = torch.rand(blocks, 16, device=device, generator=rng)
    sign = torch.where(normal < 0, -1.0, 1.0)
    first = torch.arange(16, device=device) == 0
    grid = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], device=device)
    pick = (torch.rand(blocks, 16, device=device, generator=rng) * 8).int()
    return {
        "normal": normal,
        "uniform": uniform * sign,
        "heavy": normal / uniform.sqrt().clamp(min=0.02),
        "log": (normal * 2).exp() * sign,
        "outlier": torch.where(first, 12 * sign, normal),
        "equal": normal[:, :1].expand(-1, 16).contiguous(),
        "sparse": torch.where((uniform < 0.8) & ~first, 0, normal),
        # All but one element at a midpoint under one of the scales, where rounding decides.
        "midpoints": torch.where(first, 6.0, grid[pick]) * sign * (1 + uniform[:, :1]),
        "near midpoints": torch.where(first, 6.0, grid[pick]) * (1 + normal * 2**-10) * (1 + uniform[:, :1]),
        "on the grid": (normal * 2).round() / 2 + 0.5 * first,
    }


def unkind(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows on the CPU of blocks of every kind, with special values, and rows that are tiny, huge and zero."""
    kinds = list(distributions(rows * width // 16, seed=5).values())
    normal = kinds[0]
    at, pick = torch.arange(16), torch.randint(0, 16, (len(normal), 1), generator=generator(6))
    kinds += [
        normal * 1e-4,  # the smallest scales
        normal * 3e-6,  # below them
        normal * (1e-41 if dtype == torch.bfloat16 else 3e-7),  # denormals
        torch.where(at == pick, 300 * normal, normal),
        torch.where(at == pick, normal, 0.0),
        torch.zeros_like(normal).copysign(normal),
        torch.where(at == pick, -0.0, normal),
        torch.where(at == pick, torch.inf, normal).copysign(normal),
        torch.where(at == pick, torch.nan, normal),
    ]
    kind = torch.randint(0, len(kinds), (len(normal),), generator=generator(7))
    x = torch.stack(kinds)[kind, torch.arange(len(normal))].view(rows, width)
    if rows > 4:
        x[1] *= 1e-30 if dtype == torch.bfloat16 else 1e-5
        x[2] *= 1e30 if dtype == torch.bfloat16 else 1e3
        x[3] = 0
    return x.to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit, where NaN is NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point() and a.dtype.itemsize > 1:
        a, b = (torch.where(t.isnan(), torch.nan, t) for t in (a, b))
    a, b = (t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
