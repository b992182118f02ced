"""The typed options of quantization `scalesearch`: one object, however they arrive.

They arrive as a mapping, from ``LLM(additional_config={"scalesearch": {...}})``, from
``vllm serve --additional-config '{"scalesearch": {...}}'`` or from the `quantization_config` of a
checkpoint's config.json. Every key, value and pattern is checked; nothing unknown is passed over.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vllm_scalesearch.formats import BlockFormat, format_named
from vllm_scalesearch.search import ScalePolicy

QUANT_METHOD = "scalesearch"
ATTENTION_BACKEND = "SCALESEARCH"
CPU_STORAGES = ("dense", "packed")


@dataclass(frozen=True)
class LayerOptions:
    """How one linear layer, or one product of a layer of experts, is quantized.

    format: ``nvfp4`` or ``mxfp4``.
    weights: scale policy of the weights (`ScalePolicy`), applied once, while loading.
    activations: scale policy of the inputs, applied at run time with one tensor scale a token, or
        None to leave the inputs alone (W4A16).
    """

    format: str = "nvfp4"
    weights: str = "paper"
    activations: str | None = None

    def __post_init__(self) -> None:
        format_named(self.format)
        for key in ("weights", "activations"):
            rule = getattr(self, key)
            if rule is None and key == "activations":
                continue
            try:
                ScalePolicy(rule).check_format(self.block_format)
            except ValueError as error:
                raise ValueError(f"option {key!r}: {error}") from None

    @property
    def block_format(self) -> BlockFormat:
        return format_named(self.format)

    @property
    def scheme(self) -> str:
        """``w4a16`` or ``w4a4``."""
        return "w4a16" if self.activations is None else "w4a4"

    def __str__(self) -> str:
        inputs = "" if self.activations is None else f", activations {self.activations}"
        return f"{self.format} {self.scheme}, weights {self.weights}{inputs}"


_LAYER_KEYS = tuple(f.name for f in fields(LayerOptions))


@dataclass(frozen=True)
class ExpertOptions:
    """How the experts of one mixture-of-experts layer are quantized; all of them alike.

    w13: the first product, with gate and up projections (w1 and w3) fused.
    w2: the second, with the down projections. Both have the same format, since one kernel runs both.
    """

    w13: LayerOptions
    w2: LayerOptions

    @property
    def block_format(self) -> BlockFormat:
        return self.w13.block_format

    @property
    def activations(self) -> tuple[str | None, str | None]:
        """Policies of the inputs of the two products."""
        return self.w13.activations, self.w2.activations


@dataclass(frozen=True)
class Options:
    """All options.

    layer: what holds for every linear layer; its keys stand at the top level of the mapping.
    ignore: patterns of layers that stay as they are in the checkpoint.
    overrides: patterns with the keys of `LayerOptions` that differ there; later ones win.
    lm_head: quantize the output head too; it must not be tied to the embeddings.
    cpu_storage: on the CPU, keep weights ``dense`` (dequantized once, 16 bits a weight, fast) or
        ``packed`` (4.5 bits a weight, dequantized at every use, slow).

    A pattern is a layer's name, whole components of it (``down_proj``, ``layers.0.mlp``), or
    ``re:`` and a regular expression matched from the start of the name. Names are those of the
    checkpoint (``q_proj``) or of vLLM (``qkv_proj``).
    """

    layer: LayerOptions = LayerOptions()
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    lm_head: bool = False
    cpu_storage: str = "dense"

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str) -> "Options":
        """Build and check options. `source` says in errors where the mapping came from.

        Raises ValueError for an unknown key, a wrong type or a wrong value.
        """
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{source}: expected a mapping of options, got {mapping!r}")
        # Attention's options stand beside these, and its backend reads them (attention_options.py).
        known = (*_LAYER_KEYS, "ignore", "overrides", "lm_head", "cpu_storage", "attention")
        _check_keys(mapping, known, source)
        ignore = mapping.get("ignore", ())
        if isinstance(ignore, str) or not isinstance(ignore, Iterable):
            raise ValueError(f"{source}: 'ignore' is a list of patterns, got {ignore!r}")
        ignore = tuple(ignore)
        overrides = mapping.get("overrides", {})
        if not isinstance(overrides, Mapping):
            raise ValueError(f"{source}: 'overrides' maps patterns to options, got {overrides!r}")
        lm_head = mapping.get("lm_head", False)
        if not isinstance(lm_head, bool):
            raise ValueError(f"{source}: 'lm_head' is true or false, got {lm_head!r}")
        storage = mapping.get("cpu_storage", "dense")
        if storage not in CPU_STORAGES:
            raise ValueError(f"{source}: 'cpu_storage' is one of {', '.join(CPU_STORAGES)}, got {storage!r}")
        try:
            layer = LayerOptions(**{key: mapping[key] for key in _LAYER_KEYS if key in mapping})
            for pattern, changes in overrides.items():
                where = f"overrides[{pattern!r}]"
                if not isinstance(changes, Mapping):
                    raise ValueError(f"{where} maps option names to values, got {changes!r}")
                _check_keys(changes, _LAYER_KEYS, where)
                replace(layer, **changes)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        for pattern in (*ignore, *overrides):
            _check_pattern(pattern, source)
        return cls(layer, ignore, tuple(overrides.items()), lm_head, storage)


def _check_keys(mapping: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in mapping if key not in known]
    if unknown:
        raise ValueError(
            f"{where}: unknown option {', '.join(map(repr, unknown))}; there are {', '.join(known)}"
        )


def _check_pattern(pattern: Any, source: str) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{source}: a pattern is a non-empty text, got {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{source}: pattern {pattern!r} is no regular expression: {error}") from None


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a pattern (see `Options`) selects the layer called `name`."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return f".{pattern}." in f".{name}."


@dataclass
class LayerSelection:
    """Applies `Options` to layers by name and remembers what matched, to find dead patterns."""

    options: Options
    seen: list[str] = field(default_factory=list)
    matched: set[str] = field(default_factory=set)

    def select(self, name: str, parts: Iterable[str]) -> LayerOptions | None:
        """Options of one layer, or None when it is ignored.

        name: vLLM's name. parts: checkpoint names of the matrices fused in it (its own, if none).
        Raises ValueError when a pattern selects only some of the fused matrices.
        """
        parts = list(parts)
        self.seen.extend(parts)
        # Every pattern is tried, so that one which names ignored layers only is not called dead.
        ignored = [pattern for pattern in self.options.ignore if self._selects(pattern, name, parts)]
        layer = self.options.layer
        for pattern, changes in self.options.overrides:
            if self._selects(pattern, name, parts):
                try:
                    layer = replace(layer, **changes)
                except ValueError as error:
                    raise ValueError(f"scalesearch: overrides[{pattern!r}] on {name}: {error}") from None
        return None if ignored else layer

    def select_experts(
        self, name: str, w13_parts: Iterable[str], w2_parts: Iterable[str]
    ) -> ExpertOptions | None:
        """Options of a layer of experts, or None when it is ignored.

        name: vLLM's name of the layer. w13_parts, w2_parts: checkpoint names of the gate and up, and
        of the down projections, of all experts. Raises ValueError when a pattern selects only some of
        the experts, and when the two products cannot be run together.
        """
        w13 = self.select(f"{name}.w13", w13_parts)
        w2 = self.select(f"{name}.w2", w2_parts)
        if (w13 is None) != (w2 is None):
            left, other = ("gate and up", "down") if w13 is None else ("down", "gate and up")
            raise ValueError(
                f"scalesearch: option 'ignore' leaves out the {left} projections of {name}, but not the "
                f"{other} projections, which vLLM runs in the same kernel; ignore both or none"
            )
        if w13 is None:
            return None
        if w13.format != w2.format:
            raise ValueError(
                f"scalesearch: option 'overrides' gives {name} format {w13.format!r} for the gate and up "
                f"projections and {w2.format!r} for the down projections, which vLLM runs in the same "
                "kernel; give both the same"
            )
        return ExpertOptions(w13, w2)

    def _selects(self, pattern: str, name: str, parts: list[str]) -> bool:
        hits = [part for part in parts if pattern_matches(pattern, part)]
        if not hits and not pattern_matches(pattern, name):
            return False
        self.matched.add(pattern)
        if hits and len(hits) < len(parts):
            missed = [part for part in parts if part not in hits]
            raise ValueError(
                f"scalesearch: pattern {pattern!r} selects {', '.join(_summarize(hits))} but not "
                f"{', '.join(_summarize(missed))}, which vLLM fuses into {name}; select all of them or none"
            )
        return True

    def check_all_matched(self, matched: set[str], seen: Iterable[str]) -> None:
        """Raise ValueError for patterns that selected no layer, with the names there are.

        matched, seen: those of every pipeline rank together.
        """
        patterns = (*self.options.ignore, *(pattern for pattern, _ in self.options.overrides))
        dead = [pattern for pattern in patterns if pattern not in matched]
        if dead:
            raise ValueError(
                f"scalesearch: {', '.join(map(repr, dead))} matches no layer. "
                f"Layers: {', '.join(_summarize(seen))}"
            )


def _summarize(names: Iterable[str]) -> list[str]:
    """Layer names with the numbers of repeated blocks written once: ``model.layers.{0..29}.q_proj``."""
    number = re.compile(r"(?<=\.)\d+(?=\.|$)")
    spans: dict[str, list[set[int]]] = {}
    for name in names:
        found = [int(digits) for digits in number.findall(name)]
        seen = spans.setdefault(number.sub("{}", name), [set() for _ in found])
        for values, value in zip(seen, found, strict=True):
            values.add(value)
    return [key.format(*map(_span, seen)) for key, seen in spans.items()]


def _span(values: set[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{{{low}..{high}}}"
