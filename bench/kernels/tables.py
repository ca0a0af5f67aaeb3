"""The measurements as tables and a figure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.common import rows
from bench.common.rows import Row

OPERATIONS = ("observe", "threshold", "fuse")
DEVICES = ("cuda", "cpu")
SUMMARY = {
    "llama-2-13b-lora-r8": "LoRA of LLaMA-2-13B, 6.6 M",
    "one-64Mi": "one tensor, 67 M",
}  # shape -> its name


def grouped(measured: Iterable[Row]) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """Rows of the operations by (device, op, shape, dtype), in the order of the operations, then by name."""
    groups: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    measured = [row for row in measured if row["op"] in OPERATIONS]
    for row in sorted(measured, key=lambda row: (row["device"], OPERATIONS.index(row["op"]), row["numel"])):
        key = (row["device"], row["op"], row["shape"], row["dtype"])
        groups.setdefault(key, {})[row["implementation"]] = row
    return groups


def baseline(group: dict[str, Row]) -> str | None:
    """The baseline of speed-ups: the eager transcription, or for thresholds the selection that it uses.

    That is torch.quantile up to its maximum of elements, and torch.kthvalue beyond.
    """
    return next((name for name in ("eager", "torch.quantile", "torch.kthvalue") if name in group), None)


def best(group: dict[str, Row]) -> Row | None:
    """The row of rkif's fastest backend."""
    ours = [row for name, row in group.items() if name.startswith("rkif.")]
    return min(ours, key=lambda row: float(row["ms_median"]), default=None)


def rich_table(measured: Iterable[Row]) -> Table:
    """Every measurement, grouped by operation and shape."""
    table = Table(title="kernels", caption="share: of the bandwidth of a large copy in the same session")
    for heading in (
        "operation, shape, dtype",
        "implementation",
        "ms",
        "p20-p80",
        "GB/s",
        "share",
        "speed-up",
    ):
        table.add_column(heading, justify="left" if heading in _TEXT else "right", no_wrap=True)
    for (device, op, shape, dtype), group in grouped(measured).items():
        against = baseline(group)
        table.add_section()
        title = f"{op}, {shape}, {dtype}\n{device}"
        for name, row in sorted(group.items(), key=lambda item: float(item[1]["ms_median"])):
            ratio = f"{group[against]['ms_median'] / row['ms_median']:.2f}x" if against else "-"
            table.add_row(
                title,
                name,
                milliseconds(row["ms_median"]),
                f"{milliseconds(row['ms_p20'])}-{milliseconds(row['ms_p80'])}",
                f"{row['gbps']:.1f}",
                f"{row['share']:.0%}",
                f"{ratio} {against}" if against else ratio,
                style="green" if name.startswith("rkif.") else None,
            )
            title = ""
    return table


def markdown() -> str:
    """Tables, one per measured device: float32, one line for rkif's fastest backend."""
    measured = [row for device in DEVICES for row in rows.read(rows.results_file(device))]
    parts: dict[str, list[str]] = {}
    for (device, op, shape, dtype), group in grouped(measured).items():
        row = best(group)
        if dtype != "float32" or row is None:
            continue
        lines = parts.setdefault(_heading(device, row), list(_HEADER))
        factors = [
            f"{other['ms_median'] / row['ms_median']:.1f}x {_plain(name)}"
            for name, other in group.items()
            if not name.startswith(("rkif.", "peft."))
        ]
        backend = row["implementation"].removeprefix("rkif.")
        figures = f"{milliseconds(row['ms_median'])} | {row['gbps']:.1f} | {row['share']:.0%}"
        lines.append(f"| {op} | {shape} | {backend} | {figures} | {', '.join(factors)} |")
    return "\n".join(f"{heading}\n\n" + "\n".join(lines) + "\n" for heading, lines in parts.items())


def summary() -> str:
    """The README's table: of the first device with rows, in float32, an adapter and one large tensor."""
    measured = next(filter(None, (list(rows.read(rows.results_file(device))) for device in DEVICES)), [])
    lines, heading = [], ""
    for (device, op, shape, dtype), group in grouped(measured).items():
        row, against = best(group), baseline(group)
        if dtype != "float32" or shape not in SUMMARY or row is None or against is None:
            continue
        heading = f"{device}, torch {row['versions']['torch']}."
        factors = [
            f"{group[name]['ms_median'] / row['ms_median']:.1f}x" if name in group else "-"
            for name in (against, "compiled")
        ]
        lines.append(
            f"| {op} | {SUMMARY[shape]} | {milliseconds(row['ms_median'])} | {row['share']:.0%} | "
            f"{' | '.join(factors)} |"
        )
    header = (
        "| operation | parameters | ms | of a copy's bandwidth | speed-up over eager | over torch.compile |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |"
    )
    return f"{heading}\n\n{header}\n" + "\n".join(lines) + "\n" if lines else ""


def plot(measured: Iterable[Row], out: Path, shapes: Sequence[str] = ()) -> None:
    """Shares of the copy bandwidth in float32 as bars: a panel for each operation, a group for each shape.

    Args:
        measured: rows of one device.
        out: a PNG file.
        shapes: shapes to show; by default the smallest and the largest of an operation.

    Raises:
        ValueError: no row matches, or rows are of several devices.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {key: group for key, group in grouped(measured).items() if key[3] == "float32"}
    shown = {op: shapes or _ends([key[2] for key in groups if key[1] == op]) for op in OPERATIONS}
    groups = {key: group for key, group in groups.items() if key[2] in shown[key[1]]}
    if not groups:
        raise ValueError("no float32 rows of an operation to plot")
    devices = sorted({key[0] for key in groups})
    if len(devices) > 1:
        raise ValueError(f"rows of several devices ({', '.join(devices)}): plot them from separate files")
    panels = [op for op in OPERATIONS if any(key[1] == op for key in groups)]
    heights = [sum(len(group) + 1 for key, group in groups.items() if key[1] == op) for op in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(9, 1.6 + 0.23 * sum(heights) + 0.5 * len(panels)),
        gridspec_kw={"height_ratios": heights},
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for op, axis in zip(panels, axes[:, 0], strict=True):
        _panel(axis, op, {key[2]: group for key, group in groups.items() if key[1] == op})
    axes[-1, 0].set_xlabel(
        "share of the bandwidth of a large copy (minimum of bytes moved / time)",
        fontsize=8,
    )
    row = best(next(iter(groups.values()))) or next(iter(next(iter(groups.values())).values()))
    figure.suptitle(f"float32; {_heading(devices[0], row)}", fontsize=8, wrap=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata={"Software": ""})
    pyplot.close(figure)


def milliseconds(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


_TEXT = ("operation, shape, dtype", "implementation")
_HEADER = (
    "| operation | parameters | backend | ms | GB/s | of a copy | speed-up over |",
    "| --- | --- | --- | ---: | ---: | ---: | --- |",
)


def _heading(device: str, row: Row) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items() if name != "rkif")
    return f"{device}: copies {row['copy_gbps']:.1f} GB/s; commit {row['commit']}; {versions}."


def _plain(name: str) -> str:
    return re.sub(r"^(torch|numpy)\.", "", name)


def _ends(names: Sequence[str]) -> Sequence[str]:
    """The first and the last name."""
    return (*names[:1], *names[-1:])


def _panel(axis: Any, op: str, shapes: dict[str, dict[str, Row]]) -> None:
    axis.set_title(op, loc="left", fontweight="bold", fontsize=10)
    position, ticks, labels = 0.0, [], []
    for shape, group in shapes.items():
        axis.text(0, position, f" {shape}", va="center", fontsize=8, style="italic")
        position += 1
        for name, row in sorted(group.items(), key=lambda item: -float(item[1]["share"])):
            ours = name.startswith("rkif.")
            axis.barh(position, row["share"], height=0.8, color="#1f6fb4" if ours else "#b8b8b8")
            text = f" {row['share']:.0%}, {milliseconds(row['ms_median'])} ms"
            axis.text(row["share"], position, text, va="center", fontsize=7)
            ticks.append(position)
            labels.append(name)
            position += 1
    axis.set_yticks(ticks, labels, fontsize=7)
    axis.set_ylim(position - 0.3, -0.7)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
