"""Quantizing a checkpoint from its folder to a new one, layer by layer, so that it can be stopped and resumed.

Everything is written to ``OUT.partial``: finished shards, the hidden states that go into the next layer, and
`state.json`, which says how far it came and is replaced last. A run that is killed at any point continues
after the last layer that is in it and ends with the same bytes. The folder gets its name when all is there.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_scalesearch.checkpoint import layout
from vllm_scalesearch.checkpoint.files import (
    INDEX,
    CheckpointReader,
    read_json,
    write_json,
    write_tensors,
    writing,
)
from vllm_scalesearch.checkpoint.matrices import Quantized, Recipe, quantize_together
from vllm_scalesearch.checkpoint.model import Group, LayerRunner, ModelSkeleton
from vllm_scalesearch.checkpoint.moments import InputMoments
from vllm_scalesearch.checkpoint.smoothing import smooth_layer
from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.options import pattern_matches
from vllm_scalesearch.search import ScalePolicy, quantize

REPORT = "scalesearch_report.json"
_STATE = "state.json"
_LOADABLE = (torch.bfloat16, torch.float16, torch.float32)
# Tensors outside the layers go to files of about this size.
_OTHER_BYTES = 1 << 30
# Second moments that are gathered in one pass; experts have many.
_MOMENT_BYTES = 4 << 30
# Files of a model's folder that are not copied: weights in any format.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
# Few weights, each of which may send a token elsewhere; vLLM keeps them in full precision (config.py).
_ROUTERS = ("gate", "router", "shared_expert_gate")
# Matrices whose output is added to the hidden states. The norm after them divides by the size of those, so
# an error counts in proportion; without this a few tokens with huge hidden states decide everything.
_TO_RESIDUAL = ("o_proj", "down_proj", "out_proj", "dense", "fc2", "c_proj", "wo", "w2")


@dataclass(frozen=True)
class QuantizeOptions:
    """What is asked for.

    recipe: for every matrix. overrides: patterns (see options.py) and the keys of `Recipe` that differ there;
    later ones win. ignore: patterns of matrices that stay as they are. activations: rule of the search over
    inputs that the calibration assumes, which makes a W4A4 checkpoint; None for W4A16. smooth: strength of
    channel scales (smoothing.py), 0 for none.
    """

    recipe: Recipe = field(default_factory=Recipe)
    overrides: tuple[tuple[str, dict[str, Any]], ...] = ()
    ignore: tuple[str, ...] = ()
    activations: str | None = None
    smooth: float = 0.0

    def __post_init__(self) -> None:
        for pattern, changes in self.overrides:
            try:
                replace(self.recipe, **changes)
            except (TypeError, ValueError) as error:
                raise ValueError(f"--override {pattern}: {error}") from None
        if self.activations is not None:
            ScalePolicy(self.activations).check_format(NVFP4)
        if not 0 <= self.smooth <= 1:
            raise ValueError(f"--smooth {self.smooth}: must lie within 0 to 1")

    def recipe_of(self, name: str) -> Recipe:
        """The recipe of the matrix called `name`."""
        changes: dict[str, Any] = {}
        for pattern, more in self.overrides:
            if pattern_matches(pattern, name):
                changes |= more
        return replace(self.recipe, **changes)

    @property
    def calibrated(self) -> bool:
        """Whether any of it needs calibration text."""
        recipes = [self.recipe, *(replace(self.recipe, **changes) for _, changes in self.overrides)]
        return self.smooth > 0 or self.activations is not None or any(r.calibrated for r in recipes)


class Run:
    """One run of `vllm-scalesearch quantize`.

    model: the folder that is read. out: the folder to make. tokens: (samples, length) calibration token ids,
    or None. device: where it is computed. origin: what is said of all that in the report.
    Raises ValueError for a model that cannot be quantized, an `out` that is there already, and a partial
    folder that is not asked for or of another run.
    """

    def __init__(
        self,
        model: Path,
        out: Path,
        options: QuantizeOptions,
        tokens: torch.Tensor | None,
        device: torch.device,
        resume: bool = False,
        trust_remote_code: bool = False,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.out, self.options, self.device = model, out, options, device
        self.origin = origin or {}
        if options.calibrated and tokens is None:
            raise ValueError(
                "these options need calibration text; give --calibration FILE, or use --metric mse alone"
            )
        self.calibrates = tokens is not None
        self.config = read_json(model / "config.json")
        self.reader = CheckpointReader(model)
        self._check_model()
        self.skeleton = self._skeleton(trust_remote_code)
        vocabulary = self.skeleton.model.get_input_embeddings().weight.shape[0]
        # Without calibration one short sample still shows which matrices read the same input.
        self.tokens = torch.arange(16).remainder(vocabulary).view(1, -1) if tokens is None else tokens
        if int(self.tokens.max()) >= vocabulary:
            raise ValueError(
                f"calibration token {int(self.tokens.max())}: the model has {vocabulary} embeddings"
            )
        self.partial = out.with_name(f"{out.name}.partial")
        self._open(resume)

    # --- before the work ---------------------------------------------------------------------------

    def _check_model(self) -> None:
        files = [file.name for file in self.model.iterdir()]
        found = layout.already_quantized(self.config, files, self.reader.names())
        if found is not None:
            raise ValueError(
                f"{self.model} is quantized already ({found}); vLLM serves it as it is. "
                "Quantize the bf16 checkpoint that it was made from"
            )

    def _skeleton(self, trust_remote_code: bool) -> ModelSkeleton:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.model, trust_remote_code=trust_remote_code)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        return ModelSkeleton(self.reader, config, dtype, self.device, trust_remote_code)

    def _open(self, resume: bool) -> None:
        if self.out.exists():
            raise ValueError(f"{self.out}: is there already; choose another place or remove it")
        fingerprint = self._fingerprint()
        if self.partial.exists():
            if not resume:
                raise ValueError(f"{self.partial}: an unfinished run; continue it with --resume, or remove it")
            self._lock()
            if (self.partial / _STATE).exists():
                self.state = read_json(self.partial / _STATE)
                if self.state.get("fingerprint") != fingerprint:
                    raise ValueError(
                        f"{self.partial}: was begun with other options, another model or another text; "
                        "remove it, or use the same"
                    )
                return
        else:
            try:
                self.partial.mkdir(parents=True)
            except OSError as error:
                raise ValueError(f"{self.partial}: cannot be made ({error.strerror})") from None
            self._lock()
        self.state = {"fingerprint": fingerprint, "layers": 0, "files": {}, "report": []}

    def _lock(self) -> None:
        self._lock_file = open(self.partial / ".lock", "w")  # noqa: SIM115  (held until the end)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.partial}: another run is at work on it") from None

    def _fingerprint(self) -> str:
        text = json.dumps(
            [
                asdict(self.options),
                self.reader.fingerprint(),
                self.config,
                hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest(),
                self.device.type,
                str(self.skeleton.dtype),
            ],
            sort_keys=True,
            default=str,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    # --- the work ------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, progress: Callable[[int, int, str], None] = lambda done, total, name: None) -> dict[str, Any]:
        """Do it, from where it stands. progress: called with steps done, all steps, and what is next.

        Returns the report. Raises ValueError that names what cannot be read, written or quantized.
        """
        layers = self.skeleton.layers
        others = self._other_files()
        total = len(layers) + len(others) + 1
        streams = ["quantized", *(["original"] if self._two_streams() else [])]
        self._check_patterns()
        if self.state["layers"] == 0:
            progress(0, total, "embeddings")
            self._embed(streams)
        else:
            with contextlib.closing(self.skeleton.embedded(self.tokens[:1])) as first:
                next(first)  # learns what the layers are called with
        self._remove_stale(streams)
        for index in range(self.state["layers"], len(layers)):
            progress(1 + index, total, layers[index].name)
            name = self._file_name(index, len(layers) + len(others))
            tensors, entries = self._layer(index, streams)
            write_tensors(self.partial / name, tensors)
            self.state = {
                **self.state,
                "layers": index + 1,
                "files": {**self.state["files"], name: self._sizes(tensors)},
                "report": self.state["report"] + entries,
            }
            write_json(self.partial / _STATE, self.state)
            for stream in streams:
                self._hidden(stream, index).unlink(missing_ok=True)
        for position, names in enumerate(others):
            name = self._file_name(len(layers) + position, len(layers) + len(others))
            if name in self.state["files"]:
                continue
            progress(1 + len(layers) + position, total, names[0])
            tensors = {tensor: self.reader.tensor(tensor) for tensor in names}
            write_tensors(self.partial / name, tensors)
            self.state = {**self.state, "files": {**self.state["files"], name: self._sizes(tensors)}}
            write_json(self.partial / _STATE, self.state)
        report = self._finish(streams)
        progress(total, total, "")
        return report

    def _two_streams(self) -> bool:
        """Whether the unquantized model runs beside the quantized one."""
        recipes = [replace(self.options.recipe, **changes) for _, changes in self.options.overrides]
        return any(recipe.correction > 0 for recipe in (self.options.recipe, *recipes))

    def _check_patterns(self) -> None:
        names = [
            self.skeleton.stored_name(f"{layer.name}.{name}")
            for index, layer in enumerate(self.skeleton.layers)
            for name in LayerRunner(self.skeleton, index).linears
        ]
        for option, patterns in (
            ("--ignore", self.options.ignore),
            ("--override", [pattern for pattern, _ in self.options.overrides]),
        ):
            for pattern in patterns:
                if not any(pattern_matches(pattern, name) for name in [*names, "lm_head"]):
                    raise ValueError(
                        f"{option} {pattern}: matches no matrix, such as {names[0]} or {names[-1]}"
                    )

    def _embed(self, streams: list[str]) -> None:
        with writing(self._hidden("quantized", 0)) as path, open(path, "wb") as file:
            for hidden in self.skeleton.embedded(self.tokens):
                file.write(_bytes(hidden))
        if "original" in streams:
            with writing(self._hidden("original", 0)) as path:
                shutil.copyfile(self._hidden("quantized", 0), path)

    def _hidden(self, stream: str, index: int) -> Path:
        return self.partial / f"hidden.{stream}.{index}"

    def _samples(self, stream: str, index: int) -> Iterator[torch.Tensor]:
        """Hidden states that go into layer `index`, (1, length, hidden), one for each sample."""
        dtype = self.skeleton.dtype
        length = self.tokens.shape[1]
        path = self._hidden(stream, index)
        size = path.stat().st_size // len(self.tokens)
        with open(path, "rb") as file:
            for _ in range(len(self.tokens)):
                data = torch.frombuffer(bytearray(file.read(size)), dtype=dtype)
                yield data.view(1, length, -1).to(self.device)

    def _remove_stale(self, streams: list[str]) -> None:
        """Remove what a killed run left beside what its state knows of."""
        keep = {self._hidden(stream, self.state["layers"]).name for stream in streams}
        keep |= {_STATE, ".lock", *self.state["files"]}
        for file in self.partial.iterdir():
            if file.name not in keep:
                file.unlink()

    def _file_name(self, position: int, count: int) -> str:
        return f"model-{position + 1:05d}-of-{count:05d}.safetensors"

    @staticmethod
    def _sizes(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
        return {name: tensor.numel() * tensor.element_size() for name, tensor in sorted(tensors.items())}

    def _other_files(self) -> list[list[str]]:
        """Names of the tensors outside the layers, in files."""
        prefix = f"{self.skeleton.layers_name}."
        files: list[list[str]] = []
        size = _OTHER_BYTES
        for name in sorted(self.reader.names()):
            if name.startswith(prefix):
                continue
            if size + self.reader.nbytes(name) > _OTHER_BYTES:
                files.append([])
                size = 0
            files[-1].append(name)
            size += self.reader.nbytes(name)
        return files

    # --- one layer -----------------------------------------------------------------------------------

    def _layer(self, index: int, streams: list[str]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Quantize decoder layer `index` and write the hidden states after it.

        Returns the tensors of its file and its entries in the report.
        """
        layer, dtype = self.skeleton.layers[index], self.skeleton.dtype
        runner = LayerRunner(self.skeleton, index)
        stored = self.skeleton.layer_tensors(layer)
        for name, tensor in stored.items():
            if tensor.dtype not in _LOADABLE:
                raise ValueError(f"{layer.name}.{name}: is {tensor.dtype}; expected bf16, fp16 or fp32")
        exact = {name: tensor.float() for name, tensor in stored.items()}
        sample = next(iter(self._samples("quantized", index)))
        current = {name: tensor.to(dtype) for name, tensor in exact.items()}
        groups = [group for group in runner.groups(current, sample) if self._selected(layer.name, group)]
        chosen = {name for group in groups for name in group.names}
        smoothed: list[str] = []
        if self.options.smooth:
            exact, smoothed = self._smoothed(runner, index, exact, groups, sample, stored)
            current = {name: tensor.to(dtype) for name, tensor in exact.items()}
        original = dict(current)
        quantizer = self._input_quantizer(chosen)
        tensors: dict[str, torch.Tensor] = {}
        entries: list[dict[str, Any]] = []
        for batch in self._batches(groups, exact):
            moments = self._moments(runner, index, batch, current, original, quantizer, exact)
            for group in batch:
                weights = {name: exact[f"{name}.weight"] for name in group.names}
                full = {name: self.skeleton.stored_name(f"{layer.name}.{name}") for name in group.names}
                recipes = {full[name]: self.options.recipe_of(full[name]) for name in group.names}
                result = quantize_together(
                    {full[name]: weight for name, weight in weights.items()}, recipes, moments.get(group)
                )
                for name in group.names:
                    found = result[full[name]]
                    tensors |= layout.weight_tensors(full[name], found.weight)
                    if self.options.activations is not None:
                        tensors |= self._input_scale(full[name], group, moments)
                    current[f"{name}.weight"] = found.weight.dequantize(dtype)
                    entries.append(self._entry(full[name], weights[name], found, name in smoothed))
        for name, tensor in stored.items():
            if name.removesuffix(".weight") not in chosen:
                changed = exact[name].to(tensor.dtype)
                tensors[self.skeleton.stored_name(f"{layer.name}.{name}")] = changed
        for stream in streams:
            weights, change = (current, quantizer) if stream == "quantized" else (original, None)
            with writing(self._hidden(stream, index + 1)) as path, open(path, "wb") as file:
                for hidden in self._samples(stream, index):
                    file.write(_bytes(runner.run(weights, hidden, change)))
        return tensors, entries

    def _selected(self, layer: str, group: Group) -> bool:
        """Whether a group is quantized. Raises ValueError where --ignore has only some of it."""
        names = [self.skeleton.stored_name(f"{layer}.{name}") for name in group.names]
        hits = [
            name for name in names if any(pattern_matches(pattern, name) for pattern in self.options.ignore)
        ]
        if hits and len(hits) < len(names):
            missed = ", ".join(name for name in names if name not in hits)
            raise ValueError(
                f"--ignore selects {', '.join(hits)} but not {missed}, which reads the same input and which "
                "vLLM may fuse with it; select all of them or none"
            )
        return not hits and self._reason(names[0]) is None

    def _reason(self, name: str) -> str | None:
        """Why a matrix is left in full precision whatever the options are, or None."""
        if name.rpartition(".")[2] in _ROUTERS:
            return "it chooses experts"
        if self._width(name) % NVFP4.block_size:
            return f"its width {self._width(name)} is not a multiple of {NVFP4.block_size}"
        return None

    def _width(self, name: str) -> int:
        return self.reader.shape(f"{name}.weight")[-1]

    def _input_quantizer(self, chosen: set[str]):
        if self.options.activations is None:
            return None
        last: list[torch.Tensor] = []  # q, k and v read one input

        def quantize_input(name: str, x: torch.Tensor) -> torch.Tensor:
            if name not in chosen:
                return x
            if not last or last[0] is not x:
                last[:] = [x, _fake_quantized(x, self.options.activations)]
            return last[1]

        return quantize_input

    def _smoothed(self, runner, index, exact, groups, sample, stored):
        squares: dict[Group, torch.Tensor] = {}
        count = 0

        def add(group: Group):
            def watched(x: torch.Tensor, _multiplied: torch.Tensor) -> None:
                total = x.float().flatten(0, -2).square().sum(0)
                squares[group] = squares[group] + total if group in squares else total

            return watched

        current = {name: tensor.to(self.skeleton.dtype) for name, tensor in exact.items()}
        plain = [group for group in groups if not group.expert]
        for hidden in self._samples("quantized", index):
            runner.run(current, hidden, watched={group.names[0]: add(group) for group in plain})
            count += hidden.shape[1]
        mean_squares = {group: total / count for group, total in squares.items()}
        dtype = next(iter(stored.values())).dtype
        return smooth_layer(runner, exact, groups, mean_squares, self.options.smooth, sample.float(), dtype)

    def _batches(self, groups: list[Group], exact: dict[str, torch.Tensor]) -> list[list[Group]]:
        """Groups whose moments are gathered in one pass: of one stage, and not too many."""
        batches: list[list[Group]] = []
        size, stage = 0, None
        for group in groups:
            nbytes = exact[f"{group.names[0]}.weight"].shape[1] ** 2 * 8
            if group.stage != stage or size + nbytes > _MOMENT_BYTES:
                batches.append([])
                size, stage = 0, group.stage
            batches[-1].append(group)
            size += nbytes
        return batches

    def _moments(self, runner, index, batch, current, original, quantizer, exact) -> dict[Group, InputMoments]:
        if not self.calibrates:
            return {}
        expert = batch[0].expert
        two = self._two_streams() and not expert
        moments = {
            group: InputMoments(exact[f"{group.names[0]}.weight"].shape[1], self.device, two) for group in batch
        }
        stop = None if expert else len(batch)
        originals = self._samples("original", index) if two else None
        for hidden in self._samples("quantized", index):
            seen: dict[Group, torch.Tensor] = {}
            if two:
                before = next(originals)
                keep = {g.names[0]: functools.partial(_keep, seen, g) for g in batch}
                runner.run(original, before, watched=keep, stop_after=stop)
            watched = {g.names[0]: _adder(moments[g], g, seen.get(g), hidden) for g in batch}
            try:
                runner.run(current, hidden, quantizer, watched, stop)
            except ValueError as error:
                raise ValueError(f"{self.skeleton.layers[index].name}: {error}") from None
        return moments

    def _input_scale(
        self, name: str, group: Group, moments: dict[Group, InputMoments]
    ) -> dict[str, torch.Tensor]:
        amax = moments[group].amax
        if amax == 0 and group.expert:
            # An expert that saw no token gets the largest scale of those that did.
            amax = max(m.amax for m in moments.values())
        return layout.input_tensors(name, amax)

    def _entry(self, name: str, weight: torch.Tensor, found: Quantized, smoothed: bool) -> dict[str, Any]:
        return {
            "name": name,
            "shape": list(weight.shape),
            "weights": found.recipe.weights,
            "metric": found.recipe.metric,
            "gptq": found.recipe.gptq,
            "descent": found.recipe.descent,
            "correction": found.recipe.correction,
            "smoothed": smoothed,
            "absmax_error": found.absmax_error,
            "error": found.error,
            "fallback": found.fallback,
        }

    # --- the end -------------------------------------------------------------------------------------

    def _finish(self, streams: list[str]) -> dict[str, Any]:
        sizes = {name: size for file in self.state["files"].values() for name, size in file.items()}
        weight_map = {name: file for file, names in self.state["files"].items() for name in names}
        done = {entry["name"] for entry in self.state["report"]}
        report = {
            "format": layout.FORMAT,
            "scheme": "w4a16" if self.options.activations is None else "w4a4",
            "options": {**asdict(self.options), **self.origin},
            "error": "relative, of the output" if self.calibrates else "relative, of the weights",
            "not_quantized": self._left_alone(done),
            "layers": self.state["report"],
        }
        config = {**self.config, "quantization_config": layout.quantization_config(
            self._ignored(done), self.options.activations is not None
        )}  # fmt: skip
        for file in sorted(self.model.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and file.name != "config.json":
                with writing(self.partial / file.name) as path:
                    shutil.copyfile(file, path)
        write_json(self.partial / REPORT, report)
        write_json(
            self.partial / INDEX,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))},
        )
        write_json(self.partial / "config.json", config)
        for stream in streams:
            self._hidden(stream, self.state["layers"]).unlink(missing_ok=True)
        (self.partial / _STATE).unlink()
        (self.partial / ".lock").unlink()
        os.rename(self.partial, self.out)
        self._lock_file.close()
        return report

    def _left_alone(self, done: set[str]) -> dict[str, str]:
        """Matrices of the layers that stay as they are, and why."""
        found = {}
        for index, layer in enumerate(self.skeleton.layers):
            for name in LayerRunner(self.skeleton, index).linears:
                full = self.skeleton.stored_name(f"{layer.name}.{name}")
                if full not in done:
                    found[full] = self._reason(full) or "option --ignore"
        return found

    def _ignored(self, done: set[str]) -> list[str]:
        """`ignore` of the quantization config: every matrix that vLLM might take for a quantized one."""
        embedding = self.skeleton.model.get_input_embeddings()
        name_of = {id(module): name for name, module in self.skeleton.model.named_modules()}
        skip = {name_of[id(embedding)]}
        names = {
            name.removesuffix(".weight")
            for name in self.reader.names()
            if name.endswith(".weight") and len(self.reader.shape(name)) == 2
        }
        return sorted((names | {"lm_head"}) - done - skip)


def _keep(seen: dict[Group, torch.Tensor], group: Group, x: torch.Tensor, _multiplied: torch.Tensor) -> None:
    seen[group] = x.flatten(0, -2)


def _adder(moments: InputMoments, group: Group, original: torch.Tensor | None, hidden: torch.Tensor):
    """What adds the input of a group's layers to `moments`; hidden: what the decoder layer was given."""
    weights = None
    if not group.expert and group.names[0].rpartition(".")[2] in _TO_RESIDUAL:
        size = hidden.float().square().mean(-1).flatten()
        weights = 1.0 / size.clamp(min=torch.finfo(torch.float32).tiny)
        weights = weights / weights.mean()

    def watched(x: torch.Tensor, multiplied: torch.Tensor) -> None:
        moments.add(x.flatten(0, -2), multiplied.flatten(0, -2), original, weights)

    return watched


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _fake_quantized(x: torch.Tensor, policy: str) -> torch.Tensor:
    """x (..., K) quantized and dequantized with a tensor scale a row, in x's dtype."""
    if x.device.type == "cuda":
        from vllm_scalesearch.ops.quantize import quantize_values

        values, residual = quantize_values(x, "nvfp4", policy)
        return (values.float() * residual).to(x.dtype)
    return quantize(x, NVFP4, policy, per_row=True).dequantize(x.dtype)
