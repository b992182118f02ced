"""One HTML file, with nothing to fetch, that shows what `inspection` found: numbers, plots as SVG, tables."""

from collections import Counter
from collections.abc import Iterable
from html import escape

from vllm_scalesearch import inspection
from vllm_scalesearch.inspection import LayerReport, kind_of

_STYLE = """
:root { --ink: #1c2330; --soft: #5b6575; --line: #d9dee6; --stored: #1f6feb; --absmax: #9aa4b2;
  --bad: #b42318; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink); background: #fff;
  max-width: 1080px; margin: 0 auto; padding: 24px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 76ch; }
p.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 12px;
  margin: 20px 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; }
.tile span { color: var(--soft); font-size: 13px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 16px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--soft); }
svg text.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.key { display: inline-flex; align-items: center; gap: 6px; margin-right: 16px; color: var(--soft); }
.key i { width: 18px; height: 3px; border-radius: 2px; background: var(--stored); }
.key i.absmax { background: var(--absmax); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: right; padding: 3px 10px; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
td svg { width: 132px; height: 22px; margin-left: auto; }
td.bad { color: var(--bad); }
"""


def page(title: str, source: str, reports: list[LayerReport]) -> str:
    """The whole page.

    source: what the checkpoint was compared with, in words. reports: all of them compared, or none.
    """
    compared = reports[0].error is not None
    parts = [
        f"<h1>{escape(title)}</h1><p>NVFP4 weights, {escape(source)}</p>",
        _tiles(reports, compared),
    ]
    if compared:
        parts += [_unrelated(reports), _error_panels(reports), _offset_section(reports)]
    parts.append(_stored_section(reports))
    if compared:
        parts.append(
            "<h2>The ten worst layers</h2><p>By the error of what is stored, the largest first.</p>"
            + _table(inspection.worst(reports))
        )
    parts.append("<h2>All layers</h2>" + _table(reports))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _svg(width: int, height: int, label: str, parts: list[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return f"{head}{''.join(parts)}</svg>"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if value == 0 or value >= 0.5 * 10 ** -(2 + digits) else "&lt; 0.1 %"


def _tiles(reports: list[LayerReport], compared: bool) -> str:
    weights = sum(report.shape[0] * report.shape[1] for report in reports)
    tiles = [(f"{len(reports)}", "quantized matrices"), (f"{weights / 1e6:.1f} M", "weights in them")]
    if compared:
        stored, absmax = (inspection.mean_error(reports, name) for name in ("error", "absmax_error"))
        tiles += [
            (f"{stored:.5f}", "mean error as stored"),
            (f"{absmax:.5f}", "mean error of absmax"),
            (f"{100 * (stored / absmax - 1):+.1f} %" if absmax else "-", "stored against absmax"),
            (_percent(inspection.share(reports, "saturated")), "of blocks saturate"),
        ]
    tiles.append((_percent(inspection.share(reports, "zero")), "of blocks are all zero"))
    return (
        '<div class="tiles">'
        + "".join(f"<div class=tile><b>{b}</b><span>{s}</span></div>" for b, s in tiles)
        + "</div>"
    )


def _unrelated(reports: list[LayerReport]) -> str:
    names = [report.name for report in reports if report.unrelated]
    if not names:
        return ""
    return (
        f'<p class="bad">{len(names)} of {len(reports)} matrices are no approximation of the original '
        f"({escape(names[0])}, ...): rotated or permuted before quantization, or made from another model. "
        "Their errors and offsets mean nothing.</p>"
    )


def _error_panels(reports: list[LayerReport]) -> str:
    kinds: dict[str, list[LayerReport]] = {}
    for report in reports:
        kinds.setdefault(kind_of(report.name), []).append(report)
    top = max(max(report.error, report.absmax_error) for report in reports)
    panels = "".join(_error_panel(kind, members, top) for kind, members in kinds.items())
    return (
        "<h2>Error of the weights</h2>"
        "<p>Squared error over the squared norm of the original, along the depth of the model. A method "
        "that is calibrated on inputs lowers the error of the layer's output, and may raise this one.</p>"
        "<div><span class=key><i></i>as stored</span><span class=key><i class=absmax></i>absmax</span></div>"
        f'<div class="panels">{panels}</div>'
    )


def _error_panel(kind: str, reports: list[LayerReport], top: float) -> str:
    width, height, left, base, upper = 340, 170, 46, 142, 30
    last = max(1, len(reports) - 1)

    def points(values: Iterable[float]) -> list[tuple[float, float]]:
        return [
            (left + (width - left - 12) * i / last, base - (base - upper) * (value / top if top else 0))
            for i, value in enumerate(values)
        ]

    parts = [f'<text class="title" x="{left}" y="16">{escape(kind)}</text>']
    for step in range(5):
        y = base - (base - upper) * step / 4
        parts.append(f'<line x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{top * step / 4:.4f}</text>')
    for label, values in (
        ("absmax", [report.absmax_error for report in reports]),
        ("stored", [report.error for report in reports]),
    ):
        found = points(values)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in found)
        parts.append(f'<polyline points="{path}" fill="none" stroke="var(--{label})" stroke-width="2"/>')
        for (x, y), report, value in zip(found, reports, values, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="var(--{label})">'
                f"<title>{escape(report.name)}, {label}: {value:.5f}</title></circle>"
            )
    parts.append(f'<text x="{left}" y="{base + 18}">first</text>')
    parts.append(f'<text x="{width - 12}" y="{base + 18}" text-anchor="end">last of {len(reports)}</text>')
    return _svg(width, height, f"error of {kind}", parts)


def _offset_section(reports: list[LayerReport]) -> str:
    total = inspection.total_offsets(reports)
    return (
        "<h2>Chosen scales</h2>"
        "<p>How many E4M3 codes a block's scale lies from the one that the block's maximum gives. 0 is absmax; "
        "+4 and +5 map the maximum to 4 instead of 6; below 0 the maximum is clipped for the sake of the "
        "others."
        f"</p>{_bars(_shares(total), 'offset from the absmax code')}"
    )


def _stored_section(reports: list[LayerReport]) -> str:
    codes: Counter = Counter()
    for report in reports:
        codes.update(report.scale_codes)
    elements = [(f"{value:g}", part) for value, part in inspection.element_share(reports)]
    scales = _shares(codes, 0)
    return (
        "<h2>What is stored</h2><p>Magnitudes of the elements, and codes of the block scales (E4M3: eight "
        "codes double the scale, 126 is 448).</p>"
        f'<div class="panels"><div>{_bars(elements, "magnitude of an element", 340)}</div>'
        f"<div>{_bars(scales, 'code of a block scale', 340, labels=False)}</div></div>"
    )


def _shares(counts: Counter, least: float = 0.0005) -> list[tuple[str, float]]:
    """Share of each value from the first to the last that `least` of all have; the rest stands at the ends."""
    whole = sum(counts.values())
    common = [value for value, count in counts.items() if count >= least * whole]
    if not common:
        return []
    low, high = min(common), max(common)
    shares = [(f"{value:d}", counts.get(value, 0) / whole) for value in range(low, high + 1)]
    lower = sum(count for value, count in counts.items() if value < low) / whole
    higher = sum(count for value, count in counts.items() if value > high) / whole
    return [*([("lower", lower)] if lower else []), *shares, *([("higher", higher)] if higher else [])]


def _bars(values: list[tuple[str, float]], axis: str, width: int = 1032, labels: bool = True) -> str:
    if not values:
        return "<p>No block has a value other than zero.</p>"
    height, base, upper, left = 200, 152, 18, 10
    slot = (width - 2 * left) / len(values)
    top = max(part for _, part in values)
    every = max(1, round(34 / slot))
    parts = [f'<line x1="{left}" x2="{width - left}" y1="{base}" y2="{base}" stroke="var(--line)"/>']
    for i, (label, part) in enumerate(values):
        x, tall = left + i * slot, (base - upper) * part / top
        middle = x + slot / 2
        color = "var(--absmax)" if label == "0" and axis.startswith("offset") else "var(--stored)"
        parts.append(
            f'<rect x="{x + slot * 0.12:.1f}" y="{base - tall:.1f}" width="{slot * 0.76:.1f}" '
            f'height="{tall:.1f}" fill="{color}"><title>{label}: {100 * part:.2f} %</title></rect>'
        )
        if i % every == 0:
            parts.append(f'<text x="{middle:.1f}" y="{base + 16}" text-anchor="middle">{label}</text>')
        if labels and slot >= 34 and part >= 0.0005:
            text = f"{100 * part:.1f} %"
            parts.append(f'<text x="{middle:.1f}" y="{base - tall - 5:.1f}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{width / 2}" y="{base + 38}" text-anchor="middle">{escape(axis)}</text>')
    return _svg(width, height, axis, parts)


def _spark(offsets: dict[int, int], low: int, high: int) -> str:
    """A small histogram of one layer's offsets, all layers over the same range."""
    width, height, slot = 132, 22, 132 / (high - low + 1)
    whole, top = sum(offsets.values()), max(offsets.values(), default=1)
    parts = []
    for offset in range(low, high + 1):
        count = offsets.get(offset, 0)
        if count:
            tall = max(0.6, height * count / top)
            color = "var(--absmax)" if offset == 0 else "var(--stored)"
            parts.append(
                f'<rect x="{(offset - low) * slot:.1f}" y="{height - tall:.1f}" width="{slot * 0.8:.1f}" '
                f'height="{tall:.1f}" fill="{color}"><title>{offset:+d}: {count / whole:.1%}</title></rect>'
            )
    return _svg(width, height, "offsets", parts)


def _table(reports: list[LayerReport]) -> str:
    compared = reports[0].error is not None
    header = ["layer", "shape", "tensor scale"]
    if compared:
        header += ["error", "absmax", "against it", "saturated"]
    header += ["zero"]
    if compared:
        # The tails are thin and would make the histograms too small to read.
        low = min(
            (o for report in reports for o, n in report.offsets.items() if n >= 0.001 * report.blocks),
            default=0,
        )
        high = max(
            (o for report in reports for o, n in report.offsets.items() if n >= 0.001 * report.blocks),
            default=0,
        )
        header.append(f"offsets {low:+d} to {high:+d}")
    rows = []
    for report in reports:
        cells = [escape(report.name), f"{report.shape[0]} x {report.shape[1]}", f"{report.tensor_scale:.3g}"]
        if compared:
            against = "-" if report.ratio is None else f"{100 * (report.ratio - 1):+.1f} %"
            cells += [f"{report.error:.5f}", f"{report.absmax_error:.5f}", against, _percent(report.saturated)]
        cells.append(_percent(report.zero))
        if compared:
            cells.append(_spark(report.offsets, low, high))
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in header)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
