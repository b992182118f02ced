"""A transformers model without its weights, whose decoder layers are given theirs one at a time.

The model is built with parameters on the meta device. A decoder layer then runs by
`torch.func.functional_call` with whatever weights are passed to it, so the unquantized and the quantized
layer are one module with two sets of tensors. What a layer is called with besides hidden states (position
embeddings, masks) is recorded once by running the model with recorders in place of its layers.

Experts that transformers keeps as one tensor for all are replaced by a module with one linear layer a
matrix, under the names of the checkpoint, which are also vLLM's.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vllm_scalesearch.checkpoint.files import CheckpointReader

# How checkpoints name the matrices of expert E below its module: gate, up and down.
_EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Modules that transformers names otherwise than checkpoints do (its conversion_mapping.py).
_RENAMED = ((".mlp.", ".block_sparse_moe."),)


class Experts(nn.Module):
    """The experts of one layer as linear layers, called as transformers calls its own (`MixtralExperts`)."""

    def __init__(self, original: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        count, twice, hidden = original.gate_up_proj.shape
        self.names = names
        self.act_fn = original.act_fn
        for index in range(count):
            expert = nn.Module()
            expert.add_module(names[0], nn.Linear(hidden, twice // 2, bias=False, device="meta"))
            expert.add_module(names[1], nn.Linear(hidden, twice // 2, bias=False, device="meta"))
            expert.add_module(names[2], nn.Linear(twice // 2, hidden, bias=False, device="meta"))
            self.add_module(str(index), expert)
        self.count = count

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states (T, H), top_k_index and top_k_weights (T, k): the weighted sum over experts, (T, H)."""
        gate, up, down = self.names
        out = torch.zeros_like(hidden_states)
        for index in range(self.count):
            tokens, place = torch.where(top_k_index == index)
            if not len(tokens):
                continue
            expert, x = getattr(self, str(index)), hidden_states[tokens]
            y = getattr(expert, down)(self.act_fn(getattr(expert, gate)(x)) * getattr(expert, up)(x))
            out.index_add_(0, tokens, (y * top_k_weights[tokens, place, None]).to(out.dtype))
        return out


class _Stop(Exception):
    """Leaves a forward pass once what it was for is there."""


class _Recorder(nn.Module):
    """Stands for a decoder layer: passes hidden states on and keeps what else it was called with."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule: it is only asked for attributes
        self.__dict__["last"] = last
        self.called: tuple[tuple, dict] | None = None
        self.hidden: torch.Tensor | None = None
        self.stops = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.hidden = hidden_states
        if self.called is None:
            self.called = (args, kwargs)
        if self.last or self.stops:
            raise _Stop
        return hidden_states


@dataclass(frozen=True)
class Layer:
    """A decoder layer: its module (on meta), its name, and what it is called with besides hidden states."""

    name: str
    module: nn.Module


class ModelSkeleton:
    """The model of a folder with its weights left on disk.

    reader: the folder's tensors. config: its transformers config. dtype: of the computation.
    Raises ValueError for a model without one list of decoder layers, and for modules whose tensors the
    checkpoint does not have under a name known here.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.reader, self.dtype, self.device = reader, dtype, device
        with _parameters_on_meta():
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
            ).eval()
        self._replace_experts()
        self.layers_name, self._list = self._find_layers(config)
        self.layers = [Layer(f"{self.layers_name}.{i}", module) for i, module in enumerate(self._list)]
        self._move_buffers()

    def _find_layers(self, config: Any) -> tuple[str, nn.ModuleList]:
        count = config.get_text_config().num_hidden_layers
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count and ".layers." not in f"{name}."[:-1]
        ]
        if len(found) != 1:
            names = ", ".join(name for name, _ in found) or "none"
            raise ValueError(
                f"{type(self.model).__name__}: expected one list of {count} decoder layers, found {names}; "
                "this architecture is not supported by calibration"
            )
        return found[0]

    def _replace_experts(self) -> None:
        for name, module in list(self.model.named_modules()):
            gate_up = getattr(module, "gate_up_proj", None)
            if not (isinstance(gate_up, nn.Parameter) and gate_up.ndim == 3):
                continue
            if (
                not isinstance(getattr(module, "down_proj", None), nn.Parameter)
                or list(module.parameters())[2:]
            ):
                raise ValueError(
                    f"{name}: experts of class {type(module).__name__} (with biases?) are not supported"
                )
            stored = self.stored_name(name)
            names = next((n for n in _EXPERT_NAMES if f"{stored}.0.{n[0]}.weight" in self.reader), None)
            if names is None or getattr(module, "is_transposed", False):
                raise ValueError(
                    f"{self.reader.folder}: {stored}: expected the experts' matrices one by one, as "
                    f"{stored}.0.gate_proj.weight or .w1.weight; experts stored as one tensor are not supported"
                )
            parent, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(parent), last, Experts(module, names))

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    raise ValueError(
                        f"{type(module).__name__}.{name}: has no value without weights; not supported"
                    )
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a module or tensor of the model."""
        if self._has(name):
            return name
        for here, there in _RENAMED:
            other = f"{name}.".replace(here, there)[:-1]
            if other != name and self._has(other):
                return other
        return name

    def _has(self, name: str) -> bool:
        return name in self.reader or any(stored.startswith(f"{name}.") for stored in self.reader.names())

    def layer_tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        """A decoder layer's parameters by their name in it, as the checkpoint stores them, on the device.

        Raises ValueError for a tensor that is missing or of another shape than the model's.
        """
        return {
            name: self._load(f"{layer.name}.{name}", parameter.shape)
            for name, parameter in layer.module.named_parameters()
        }

    def _load(self, name: str, shape: torch.Size) -> torch.Tensor:
        stored = self.stored_name(name)
        if stored not in self.reader:
            raise ValueError(
                f"{self.reader.folder}: there is no tensor {stored}, which {name} of the model needs"
            )
        if self.reader.shape(stored) != tuple(shape):
            raise ValueError(
                f"{self.reader.folder}: {stored} is {self.reader.shape(stored)}, but by config.json it must "
                f"be {tuple(shape)}"
            )
        return self.reader.tensor(stored).to(self.device)

    @torch.no_grad()
    def embedded(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Inputs of the first decoder layer, (1, length, hidden), one for each row of tokens (samples, length).

        Also learns what the layers are called with besides (`call`), which all samples share.
        """
        recorders = [_Recorder(layer.module, i + 1 == len(self.layers)) for i, layer in enumerate(self.layers)]
        loaded = {
            name: self._load(name, parameter.shape).to(self.dtype)
            for name, parameter in self.model.named_parameters()
            if not name.startswith(f"{self.layers_name}.") and not self._after_layers(name)
        }
        kept = list(self._list)
        for index, recorder in enumerate(recorders):
            self._list[index] = recorder
        try:
            for index, row in enumerate(tokens):
                with contextlib.suppress(_Stop):
                    torch.func.functional_call(
                        self.model,
                        loaded,
                        kwargs={"input_ids": row.view(1, -1).to(self.device), "use_cache": False},
                    )
                if index == 0:
                    self._calls = [recorder.called for recorder in recorders]
                    recorders[0].stops = True
                yield recorders[0].hidden
        finally:
            for index, module in enumerate(kept):
                self._list[index] = module

    def _after_layers(self, name: str) -> bool:
        """Whether a parameter outside the layers is not needed before them: the head and the last norm."""
        head = self.model.get_output_embeddings()
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return owner is head and owner is not self.model.get_input_embeddings()

    @torch.no_grad()
    def call(self, index: int, parameters: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Run decoder layer `index` with `parameters` (by name in the layer) on hidden (1, length, hidden)."""
        args, kwargs = self._calls[index]
        out = torch.func.functional_call(self.layers[index].module, parameters, (hidden, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty makes tensors on the meta device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made in this block keep their buffers and have parameters that never took memory."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta
    try:
        # Large parameters are made by torch.empty; moving them afterwards would leave holes in the heap.
        with no_init_weights(), _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register


def runs_all(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers in a decoder layer, by name."""
    return [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input; vLLM may fuse them, so they share a tensor scale.

    names: in the decoder layer. stage: groups of one stage do not depend on each other's outputs.
    expert: whether they belong to an expert, which sees the tokens that are sent to it only.
    """

    names: tuple[str, ...]
    stage: int
    expert: bool


class LayerRunner:
    """Runs one decoder layer and watches its linear layers."""

    def __init__(self, skeleton: ModelSkeleton, index: int) -> None:
        self.skeleton, self.index = skeleton, index
        self.module = skeleton.layers[index].module
        self.linears = dict(runs_all(self.module))

    def groups(self, parameters: dict[str, torch.Tensor], hidden: torch.Tensor) -> list[Group]:
        """The linear layers in the order in which they run, grouped by their input; hidden: one sample."""
        order: list[tuple[int, list[str]]] = []
        kept: list[torch.Tensor] = []  # so that no address is used twice

        def record(name: str):
            def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                kept.append(inputs[0])
                key = (inputs[0].data_ptr(), inputs[0].shape, inputs[0].stride())
                if order and order[-1][0] == key:
                    order[-1][1].append(name)
                else:
                    order.append((key, [name]))

            return hook

        experts = self._experts()
        plain = [name for name in self.linears if name not in experts]
        # Expert layers may see no token of this sample; their place is known without running them.
        reached: list[int] = []
        handles = [self.linears[name].register_forward_pre_hook(record(name)) for name in plain]
        handles += [
            module.register_forward_pre_hook(lambda *_: reached.append(len(order)))
            for module in self.module.modules()
            if isinstance(module, Experts)
        ]
        try:
            self.skeleton.call(self.index, parameters, hidden)
        finally:
            for handle in handles:
                handle.remove()
        groups, stage = [], 0
        places = iter([*reached, None])
        place = next(places)
        for position in range(len(order) + 1):
            while place is not None and position == place:
                found = self._expert_groups(stage)
                groups += found
                stage += 2
                place = next(places)
            if position < len(order):
                groups.append(Group(tuple(order[position][1]), stage, False))
                stage += 1
        return groups

    def _experts(self) -> set[str]:
        return {
            f"{prefix}.{name}"
            for prefix, module in self.module.named_modules()
            if isinstance(module, Experts)
            for name, _ in runs_all(module)
        }

    def _expert_groups(self, stage: int) -> list[Group]:
        groups = []
        for prefix, module in self.module.named_modules():
            if isinstance(module, Experts):
                gate, up, down = module.names
                for index in range(module.count):
                    groups.append(Group((f"{prefix}.{index}.{gate}", f"{prefix}.{index}.{up}"), stage, True))
                for index in range(module.count):
                    groups.append(Group((f"{prefix}.{index}.{down}",), stage + 1, True))
        return groups

    def run(
        self,
        parameters: dict[str, torch.Tensor],
        hidden: torch.Tensor,
        quantize_input=None,
        watched: dict[str, Any] | None = None,
        stop_after: int | None = None,
    ) -> torch.Tensor | None:
        """Run the layer on hidden (1, length, hidden).

        quantize_input: ``f(name, x)`` gives what a linear layer multiplies instead of x; None for x.
        watched: ``{name: f}``; ``f(x, multiplied)`` is called with the layer's input as it arrives and as it is
        multiplied. stop_after: leave once this many of the watched were called, and return None.
        """
        watched = watched or {}
        seen = 0

        def watch(name: str):
            def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]):
                nonlocal seen
                x = inputs[0]
                multiplied = x if quantize_input is None else quantize_input(name, x)
                if name in watched:
                    watched[name](x, multiplied)
                    seen += 1
                    if seen == stop_after:
                        raise _Stop
                return (multiplied, *inputs[1:])

            return hook

        names = self.linears if quantize_input is not None else watched
        handles = [self.linears[name].register_forward_pre_hook(watch(name)) for name in names]
        try:
            return self.skeleton.call(self.index, parameters, hidden)
        except _Stop:
            return None
        finally:
            for handle in handles:
                handle.remove()
