"""How a product of few rows with NVFP4 weights is cut up for kernels/w4a16_decode.cu."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

MAX_ROWS = 32
OUTPUT_TILE, INPUT_STEP = 64, 32

# Threads that a multiprocessor holds at a time, as the kernel's registers allow, by its tokens.
RESIDENT = {8: 1024, 16: 640, 24: 512, 32: 384}
_RESERVED_BYTES = 1024  # of shared memory, by the driver, for each block
# How many clusters of so many blocks that each fill a multiprocessor an H100 of 132 holds at a time. They do
# not cross the groups that multiprocessors are built in. By cuOccupancyMaxActiveClusters, which says 24 for 5
# blocks on some H100s and 22 on others.
_CLUSTERS = {2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}


@dataclass(frozen=True)
class Fit:
    """What a product of many tiles takes, in units of what its bytes take at the copy's rate: `load` times
    what the busiest multiprocessor has over the mean, less `wave` over how often the GPU is filled with
    blocks, and a part of each cut (groups, warps, depth). By benchmarks/w4a16_fit.py.
    """

    load: float
    wave: float
    cuts: dict[tuple[int, int, int], float]


FITS = {
    8: Fit(0.49, 0.12, {(1, 8, 2): 0.66, (4, 5, 3): 0.56, (5, 4, 3): 0.58, (6, 3, 3): 0.61, (8, 3, 3): 0.54}),
    16: Fit(0.74, 0.18, {(1, 4, 3): 0.48, (2, 3, 3): 0.46, (4, 5, 3): 0.36, (8, 2, 3): 0.39}),
    24: Fit(0.99, 0.17, {(1, 4, 3): 0.21, (2, 4, 3): 0.17, (5, 2, 3): 0.51, (5, 3, 3): 0.27}),
    32: Fit(1.05, 0.18, {(1, 4, 3): 0.32, (4, 3, 4): 0.24, (6, 2, 3): 0.33}),
}


@dataclass(frozen=True)
class Plan:
    """How a product is cut up; the names are those of kernels/w4a16_decode.cu.

    cluster: the `splits` blocks of a tile add up in shared memory, otherwise in global memory.
    """

    tokens: int
    groups: int
    warps: int
    splits: int
    cluster: bool
    depth: int

    def defines(self, dtype: torch.dtype, encoding: int) -> tuple[str, ...]:
        """Macros of the kernel."""
        return (
            f"HALF={int(dtype == torch.float16)}", f"TOKENS={self.tokens}", f"GROUPS={self.groups}",
            f"WARPS={self.warps}", f"DEPTH={self.depth}", f"SPLITS={self.splits}", f"SCALES={encoding}",
            f"CLUSTER={int(self.cluster)}", f"SHARED={self.shared_bytes}", f"RESIDENT={RESIDENT[self.tokens]}",
        )  # fmt: skip

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.groups * self.warps

    def occupancy(self, tiles: int, processors: int, shared_limit: int) -> tuple[float, int]:
        """Of a product without splits: tiles of the busiest multiprocessor over the mean, and how often
        blocks fill the GPU. shared_limit: bytes of shared memory that a block may have.
        """
        resident = min(
            RESIDENT[self.tokens] // self.threads,
            (shared_limit + _RESERVED_BYTES) // (self.shared_bytes + _RESERVED_BYTES),
        )
        whole, rest = divmod(-(-tiles // self.groups), processors * resident)
        busiest = (whole * resident + -(-rest // processors)) * self.groups
        return busiest * processors / tiles, whole + bool(rest)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        outputs, pairs = OUTPUT_TILE * self.groups, self.tokens // 2
        # Pairs of tokens, as the kernel lays sums out.
        pitch = 4 if self.tokens == 8 else 8 if self.tokens == 16 else 16
        ring = self.warps * (self.depth * (self.groups * 1152 + self.tokens * 80) + self.groups * 512)
        needed = -(-max(ring, self.warps * outputs * pitch * 8) // 16) * 16 + (outputs + self.tokens) * 4
        return needed + (16 + self.splits * -(-outputs // self.splits) * pairs * 8 if self.cluster else 0)


@functools.cache
def plan(
    rows: int, padded_outputs: int, padded_inputs: int, processors: int, shared_limit: int, clusters: bool
) -> Plan:
    """The plan for a product, by measurements on an H100 (benchmarks/NOTES.md).

    rows: of x, at most `MAX_ROWS`. processors: the GPU's multiprocessors. shared_limit: bytes of shared
    memory that a block may have. clusters: whether there are thread block clusters (sm_90 and newer).
    """
    tiles, steps = padded_outputs // OUTPUT_TILE, padded_inputs // INPUT_STEP
    tokens = -(-rows // 8) * 8
    if tiles >= 2 * processors:
        return _widest_cut(tokens, tiles, processors, shared_limit)
    cuts = [*(_wide_cuts if tiles > processors else _narrow_cuts)(tokens, tiles, steps, processors, clusters)]
    cuts.append(dataclasses.replace(cuts[-1], depth=2, warps=min(cuts[-1].warps, 8)))
    return next(cut for cut in cuts if cut.shared_bytes <= shared_limit)


def _narrow_cuts(tokens: int, tiles: int, steps: int, processors: int, clusters: bool) -> Iterator[Plan]:
    """A tile for each multiprocessor at most. The best cut, and others for less shared memory."""
    splits = _splits(tiles, steps, processors, clusters)
    if clusters:
        pairs = -(-tiles // 2)
        pair_splits = _splits(pairs, steps, processors, True)
        # Two tiles a block, where more multiprocessors have work then, or where there are many inputs.
        if pair_splits * pairs > 1.2 * splits * tiles and steps >= 32 * pair_splits:
            yield Plan(tokens, 2, 6, pair_splits, True, 3)
        if splits == 1 and tiles > 0.9 * processors and steps >= 256:
            yield Plan(tokens, 2, 6, 2, True, 3)
        # Too few multiprocessors for two of them a tile, and for clusters of three blocks of two tiles.
        if splits == 1 and tiles <= 3 * clusters_at_once(4, processors):
            if tokens == 8 and steps >= 256:
                yield Plan(8, 3, 4, 4, True, 3)
            # Sums through global memory.
            if tokens > 16 and 3 * pairs <= processors and steps >= (384 if tokens == 24 else 256):
                yield Plan(tokens, 2, 6, 3, False, 3)
            if tokens > 8 and steps >= 160:
                yield Plan(tokens, 1, 4, 4, True, 3)
    steps //= splits
    if tokens == 8:
        warps, depth = (12, 2 if steps < 36 else 3) if steps >= 20 else (8, 3)
    elif tokens == 16:
        warps, depth = (12, 3) if steps >= 200 else (16, 2) if splits == 1 and steps >= 64 else (8, 3)
    else:
        warps, depth = (12, 3) if steps >= (100 if tokens == 24 else 200) else (8, 3)
    if warps == 8 and 12 < steps <= (32 if tokens == 32 else 16):
        depth = 2
    yield Plan(tokens, 1, warps, splits, clusters and splits > 1, depth)


def _splits(tiles: int, steps: int, processors: int, clusters: bool) -> int:
    """Blocks for each tile. A multiprocessor without work costs less than one with two blocks."""
    for splits in range(8, 1, -1):
        if clusters:
            fit, least = clusters_at_once(splits, processors), 9 if splits > 2 else 20
        else:
            fit, least = processors // splits, 16
        if tiles <= fit and steps >= least * splits:
            return splits
    return 1


def clusters_at_once(blocks: int, processors: int) -> int:
    """How many clusters of so many blocks that each fill a multiprocessor fit at a time."""
    return _CLUSTERS[blocks] * processors // 132


def _wide_cuts(tokens: int, tiles: int, steps: int, processors: int, clusters: bool) -> Iterator[Plan]:
    """More tiles than multiprocessors, but not two for each. The best cut first, as above."""
    if clusters and steps >= 96:
        # Blocks of several tiles, split so that none of the multiprocessors has two tiles.
        if tokens != 16 and tiles <= 4 * clusters_at_once(3, processors):
            yield Plan(tokens, 4, 3, 3, True, 3)
        if tokens == 8 and tiles < 1.33 * processors:
            yield Plan(8, 3, 4, 2, True, 3)
    if clusters and tokens > 8:

        def busiest(splits: int) -> float:
            """Tiles that the multiprocessor with the most of them has; with blocks of two tiles, two."""
            return -(-tiles * splits // processors) / splits

        # What a multiprocessor holds of blocks of four warps.
        possible = [splits for splits in (2, 3) if tiles * splits <= RESIDENT[tokens] // 128 * processors]
        splits = min(possible, key=busiest, default=1)
        if busiest(splits) * 1.15 < 2 and steps >= (48 if tokens == 32 else 16) * splits:
            yield Plan(tokens, 1, 4, splits, True, 3)
    yield Plan(tokens, 2, 6, 1, False, 3)


def _widest_cut(tokens: int, tiles: int, processors: int, shared_limit: int) -> Plan:
    """Two tiles for each multiprocessor or more: blocks of several read activations once for all of them."""
    fit = FITS[tokens]

    def cost(cut: Plan) -> float:
        load, waves = cut.occupancy(tiles, processors, shared_limit)
        return fit.load * load - fit.wave / waves + fit.cuts[cut.groups, cut.warps, cut.depth]

    cuts = [Plan(tokens, groups, warps, 1, False, depth) for groups, warps, depth in fit.cuts]
    return min((cut for cut in cuts if cut.shared_bytes <= shared_limit), key=cost)
