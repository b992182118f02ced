"""Reading NVFP4 checkpoints of both layouts, what is counted in them, and the command `inspect`."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_scalesearch import cli, inspection
from vllm_scalesearch.formats import NVFP4, QuantizedTensor, pack_e2m1
from vllm_scalesearch.inspection import Tensors, inspect, inspect_layer, layer_names, read_layer
from vllm_scalesearch.search import quantize


def by_hand(elements, scale_codes, tensor_scale=1.0) -> QuantizedTensor:
    """A matrix of blocks: elements (N, K) as E2M1 codes, scale_codes (N, K // 16)."""
    return QuantizedTensor(
        pack_e2m1(torch.tensor(elements, dtype=torch.uint8)),
        torch.tensor(scale_codes, dtype=torch.uint8).view(torch.float8_e4m3fn),
        torch.tensor(tensor_scale),
        NVFP4,
    )


def stored(name: str, weight: QuantizedTensor, layout: str) -> dict[str, torch.Tensor]:
    scale = weight.tensor_scale.reshape(1)
    if layout == "compressed-tensors":
        parts = {
            "weight_packed": weight.packed,
            "weight_scale": weight.scales,
            "weight_global_scale": 1 / scale,
        }
    else:
        parts = {"weight": weight.packed, "weight_scale": weight.scales, "weight_scale_2": scale.reshape(())}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


NAMES = ["model.layers.2.mlp.up_proj", "model.layers.10.mlp.up_proj", "model.layers.10.self_attn.q_proj"]


@pytest.fixture
def originals() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(24, 64, generator=generator).bfloat16() for name in NAMES}


@pytest.fixture
def model(tmp_path, originals) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({f"{name}.weight": weight for name, weight in originals.items()}, folder / "model.safetensors")
    return folder


def checkpoint(folder: Path, originals, policy="paper", layout="compressed-tensors") -> Path:
    """In two files, with what is no quantized matrix beside."""
    folder.mkdir()
    tensors = {"model.norm.weight": torch.ones(64), "lm_head.weight": torch.ones(8, 64)}
    for i, (name, weight) in enumerate(originals.items()):
        save_file(
            tensors | stored(name, quantize(weight, NVFP4, policy), layout), folder / f"part-{i}.safetensors"
        )
        tensors = {}
    return folder


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_both_layouts_are_read_to_the_same_values(tmp_path, originals, layout):
    tensors = Tensors(checkpoint(tmp_path / "out", originals, layout=layout))
    assert layer_names(tensors) == NAMES  # by number: 2 before 10
    for name, weight in originals.items():
        expected = quantize(weight, NVFP4, "paper")
        found = read_layer(tensors, name)
        assert torch.equal(found.packed, expected.packed)
        assert torch.equal(found.scales.view(torch.uint8), expected.scales.view(torch.uint8))
        torch.testing.assert_close(found.dequantize(), expected.dequantize(), rtol=1e-6, atol=0)


def test_one_block_by_hand():
    """Scale 2 (code 64) where 12 / 6 gives just that, then 8 clipped at a smaller one, then nothing."""
    row = [12.0] + [0.0] * 15 + [8.0] + [0.0] * 15 + [0.0] * 16
    original = torch.tensor([row])
    codes = [7] + [0] * 15 + [7] + [0] * 15 + [0] * 16
    found = inspect_layer("x", by_hand([codes], [[64, 56, 64]]), original)  # code 56 is 1
    assert found.shape == (1, 48) and found.blocks == 3
    assert found.elements == (46, 0, 0, 0, 0, 0, 0, 2)
    assert found.scale_codes == {56: 1, 64: 2}
    # absmax would take E4M3(8 / 6) = 1.375, code 59; a block of zeros has no offset.
    assert found.offsets == {0: 1, -3: 1}
    assert found.saturated == pytest.approx(1 / 3)  # 8 beyond 7 * 1
    assert found.zero == pytest.approx(1 / 3)
    assert found.error == pytest.approx((8 - 6) ** 2 / (12**2 + 8**2))
    assert found.largest_scale == 0 and not found.rescaled and not found.unrelated


def test_a_value_that_only_rounds_down_to_six_does_not_saturate():
    """6.9 at scale 1 is nearer to 6 than to a step above it: what absmax itself may give."""
    codes = [[7] + [0] * 15]
    near = inspect_layer("x", by_hand(codes, [[56]]), torch.tensor([[6.9] + [0.0] * 15]))
    far = inspect_layer("x", by_hand(codes, [[56]]), torch.tensor([[7.1] + [0.0] * 15]))
    assert (near.saturated, far.saturated) == (0, 1)


def test_absmax_has_offset_zero_and_its_own_error(originals):
    weight = originals[NAMES[0]]
    found = inspect_layer("x", quantize(weight, NVFP4, "absmax"), weight)
    assert found.offsets == {0: found.blocks}
    assert found.ratio == pytest.approx(1)
    assert found.saturated == 0


def test_a_search_is_seen_in_offsets_and_error(originals):
    weight = originals[NAMES[0]].float()
    searched = quantize(weight, NVFP4, "paper")
    found = inspect_layer("x", searched, weight)
    assert set(found.offsets) <= set(range(-2, 7)) and len(found.offsets) > 4
    error = ((searched.dequantize() - weight).square().sum() / weight.square().sum()).item()
    assert found.error == pytest.approx(error, rel=1e-4)
    assert 0.6 < found.ratio < 0.85
    assert sum(found.offsets.values()) == sum(found.scale_codes.values()) == found.blocks


def test_another_tensor_scale_does_not_flatter(originals):
    """absmax is measured under a tensor scale of its own, not under one that makes it saturate."""
    weight = originals[NAMES[0]].float()
    narrow = weight.abs().amax() / (6 * 448) / 1.5
    found = inspect_layer("x", quantize(weight, NVFP4, "paper", tensor_scale=narrow), weight)
    expected = inspect_layer("x", quantize(weight, NVFP4, "absmax"), weight)
    assert found.absmax_error == pytest.approx(expected.error)
    assert found.largest_scale > 0.05 and found.offsets.keys() - set(range(-2, 7)) == set()


def test_folded_channel_scales_are_found(originals):
    weight = originals[NAMES[0]].float()
    generator = torch.Generator().manual_seed(1)
    columns = (0.5 * torch.randn(64, generator=generator)).exp()
    plain = inspect_layer("x", quantize(weight * columns, NVFP4, "paper"), weight * columns)
    found = inspect_layer("x", quantize(weight * columns, NVFP4, "paper"), weight)
    assert found.rescaled and not plain.rescaled
    assert found.error == pytest.approx(plain.error, rel=0.15)
    rows = (0.5 * torch.randn(24, 1, generator=generator)).exp()
    both = inspect_layer("x", quantize(weight * columns * rows, NVFP4, "paper"), weight)
    assert both.rescaled and both.error < 1.2 * plain.error


def test_another_matrix_is_unrelated(originals):
    found = inspect_layer("x", quantize(originals[NAMES[0]], NVFP4, "paper"), originals[NAMES[1]])
    assert found.unrelated and not found.rescaled


def test_zeros_leave_no_error():
    weight = torch.zeros(4, 32)
    found = inspect_layer("x", quantize(weight, NVFP4, "paper"), weight)
    assert (found.error, found.ratio, found.zero, found.offsets) == (0, None, 1, {})


def test_totals_are_of_all_layers(tmp_path, originals, model):
    reports = list(inspect(checkpoint(tmp_path / "out", originals), model))
    assert [report.name for report in reports] == NAMES
    assert sum(inspection.total_offsets(reports).values()) == 3 * 24 * 4
    assert inspection.worst(reports, 1)[0].error == max(report.error for report in reports)
    assert sum(part for _, part in inspection.element_share(reports)) == pytest.approx(1)


class Tables(HTMLParser):
    """The text of a page, the rows of its tables, whether its tags close, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.rows, self.text, self.fetched = [], 0, [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            self.open.append(tag)
        self.rows += tag == "tr"
        self.fetched += [value for key, value in attributes if key in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        self.fetched += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in ("line", "rect", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_command_prints_tables_and_writes_a_page(tmp_path, originals, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = checkpoint(tmp_path / "out", originals)
    cli.main(["inspect", str(out), "--against", str(model), "--json", "layers.json", "--layers"])
    shown = capsys.readouterr().out
    layers = json.loads(Path("layers.json").read_text())["results"]["layers"]
    reports = list(inspect(out, model))
    assert [layer["name"] for layer in layers] == NAMES
    for report in reports:
        line = next(line for line in shown.splitlines() if line.startswith(f"| {report.name} "))
        assert f"{report.error:.5f}" in line and f"{report.absmax_error:.5f}" in line
    shares = dict(re.findall(r"^ +([+-]?\d+) +([\d.]+)%", shown, re.MULTILINE))
    total = inspection.total_offsets(reports)
    assert float(shares["0"]) == pytest.approx(100 * total[0] / sum(total.values()), abs=0.006)

    page = Tables()
    page.feed(Path("out-inspect.html").read_text())
    assert page.open == [] and page.fetched == []
    assert page.rows == (1 + 3) + (1 + 3)  # the worst, and all
    text = " ".join(page.text)
    for report in reports:
        assert report.name in text and f"{report.error:.5f}" in text


def test_without_an_original_nothing_is_compared(tmp_path, originals, capsys):
    out = checkpoint(tmp_path / "out", originals, layout="modelopt")
    cli.main(["inspect", str(out), "--html", str(tmp_path / "page.html")])
    shown = capsys.readouterr().out
    assert "| all " in shown and "offset" not in shown
    assert "absmax" not in (tmp_path / "page.html").read_text().split("</style>")[1]


def test_errors_name_what_is_wrong(tmp_path, originals, model):
    def refuses(arguments, message):
        with pytest.raises(SystemExit, match=message):
            cli.main(["inspect", *map(str, arguments), "--html", str(tmp_path / "page.html")])

    out = checkpoint(tmp_path / "out", originals)
    refuses([tmp_path / "nowhere"], "nowhere: there is no such folder")
    refuses([model], "no NVFP4 weights; expected compressed-tensors' weight_packed")
    refuses([out, "--json", tmp_path / "no" / "x.json"], "--json .*: there is no folder")
    (tmp_path / "empty").mkdir()
    refuses([tmp_path / "empty"], r"there are no \*.safetensors files")
    refuses([out, "--against", tmp_path / "empty"], r"there are no \*.safetensors files")

    other = tmp_path / "other"
    other.mkdir()
    save_file({f"{NAMES[0]}.weight": torch.ones(24, 32)}, other / "model.safetensors")
    refuses([out, "--against", other], r"the original is \(24, 32\) where the checkpoint has \(24, 64\)")
    save_file({"else.weight": torch.ones(24, 32)}, other / "model.safetensors")
    refuses([out, "--against", other], f"there is no tensor {NAMES[0]}.weight")
    refuses(
        [out, "--against", checkpoint(tmp_path / "again", originals, layout="modelopt")], "in 16 or 32 bits"
    )

    broken = stored(NAMES[0], quantize(originals[NAMES[0]], NVFP4, "paper"), "compressed-tensors")
    for part, tensor, message in (
        ("weight_scale", torch.ones(24, 2).to(torch.float8_e4m3fn), r"expected float8_e4m3fn \(24, 4\), got"),
        ("weight_global_scale", torch.zeros(1), "expected one positive number"),
        ("weight_packed", torch.ones(24, 32), "expected a uint8 matrix"),
    ):
        save_file({**broken, f"{NAMES[0]}.{part}": tensor}, other / "model.safetensors")
        refuses([other], message)
    (other / "model.safetensors").write_bytes((out / "part-0.safetensors").read_bytes()[:-100])
    refuses([other], r"model.safetensors cannot be read")
