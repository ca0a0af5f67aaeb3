"""The report's plots, as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rkif.fuser.parameters import short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RoundStatistics = Mapping[str, Mapping[str, Tensor]]
"""Task -> statistics of its rounds, see rkif.continual.evaluation.history; only tasks with rounds."""

SIDES = ("inner", "outer")


def forgetting_curves(
    tasks: Sequence[str], matrix: Sequence[Sequence[float]], initial: Sequence[float]
) -> str:
    """A panel per task: its accuracy before training and after each task."""
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = _figure(10.5, 2.1 * lines + 0.5)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for i, panel in enumerate(panels):
        if i >= len(tasks):
            panel.set_axis_off()
            continue
        values = [initial[i], *matrix[i]]
        panel.plot(range(len(values)), values, color="#1f5f99", linewidth=1.8)
        panel.axvspan(0, min(i + 1, len(values) - 1), color="#eef1f5", linewidth=0)  # not learned yet
        if i + 1 < len(values):
            panel.plot(i + 1, values[i + 1], "o", color="#c8421f", markersize=6)
        panel.set_title(_plain(tasks[i]), fontsize=10, loc="left")
        panel.set_ylim(0, 102)
        panel.set_xticks(range(0, len(tasks) + 1, max(1, len(tasks) // 5)))
        panel.grid(axis="y", color="#e3e8ee", linewidth=0.7)
    figure.supxlabel("tasks learned", fontsize=9)
    return _svg(figure)


def importance_maps(rounds: RoundStatistics) -> str:
    """A map per learner: parameters from top to bottom, rounds from left to right."""
    names = [
        key.removeprefix("importance.")
        for key in next(iter(rounds.values()))
        if key.startswith("importance.")
    ]
    names.sort(key=_natural)
    values = torch.cat(
        [torch.stack([parts[f"importance.{name}"] for name in names]) for parts in rounds.values()], dim=1
    )  # [tensors, rounds, 2]
    figure = _figure(10.5, min(14.0, 1.6 + 0.17 * len(names)))
    panels = figure.subplots(1, 2, sharey=True)
    for side, panel in enumerate(panels):
        image = values[:, :, side].double().clamp(min=1e-30).log10()
        shown = image[values[:, :, side] > 0]
        low = float(shown.min()) if len(shown) else 0.0
        pixels = image.clamp(min=low).numpy()
        drawn = panel.imshow(pixels, aspect="auto", cmap="magma", interpolation="nearest")
        figure.colorbar(drawn, ax=panel, label="log10 of mean importance", shrink=0.8)
        panel.set_title(f"{SIDES[side]} learner", fontsize=10, loc="left", pad=16)
        panel.set_xlabel("round", fontsize=9)
        _mark_tasks(panel, rounds)
    step = max(1, len(names) // 60)
    panels[0].set_yticks(
        range(0, len(names), step), [_plain(short_name(name)) for name in names[::step]], fontsize=6
    )
    return _svg(figure)


def mask_overlap(rounds: RoundStatistics) -> str:
    """The shares that each learner selected, and intersection over union."""
    counts = torch.cat([_total(parts, "counts.") for parts in rounds.values()]).double()  # [rounds, 4]
    inner_only, outer_only, both = counts.T[:3]
    numel = counts.sum(1).clamp(min=1)
    figure = _figure(10.5, 3.0)
    panel = figure.subplots()
    panel.plot((100 * (inner_only + both) / numel).tolist(), label="selected by inner", color="#1f5f99")
    panel.plot((100 * (outer_only + both) / numel).tolist(), label="selected by outer", color="#c8421f")
    overlap = 100 * both / (inner_only + outer_only + both).clamp(min=1)
    panel.plot(overlap.tolist(), label="overlap", color="#3b7d4f")
    return _finished(figure, panel, "% of parameters", rounds)


def movement(rounds: RoundStatistics) -> str:
    """L2 norms of the task vectors and of the update."""
    norms = torch.cat([parts["norms"] for parts in rounds.values()])  # [rounds, 3]
    figure = _figure(10.5, 3.0)
    panel = figure.subplots()
    for column, (name, color) in enumerate(
        (("inner", "#1f5f99"), ("outer", "#c8421f"), ("update", "#3b7d4f"))
    ):
        panel.plot(norms[:, column].tolist(), label=name, color=color)
    return _finished(figure, panel, "L2 norm", rounds)


def movement_map(rounds: Sequence[Mapping[str, Any]]) -> str:
    """L2 norm of each parameter's change over sqrt(numel): parameters down, the ledger's rounds across."""
    names = sorted(rounds[0]["modules"], key=_natural)
    moved = torch.tensor(
        [
            [
                round_["modules"][name]["moved"] / max(1, round_["modules"][name]["numel"]) ** 0.5
                for round_ in rounds
            ]
            for name in names
        ],
        dtype=torch.float64,
    )
    figure = _figure(10.5, min(14.0, 1.6 + 0.17 * len(names)))
    panel = figure.subplots()
    blank = moved.where(moved > 0, torch.nan).log10()
    drawn = panel.imshow(blank.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(drawn, ax=panel, label="log10 of movement", shrink=0.8)
    panel.set_xlabel("round", fontsize=9)
    step = max(1, len(names) // 60)
    panel.set_yticks(
        range(0, len(names), step), [_plain(short_name(name)) for name in names[::step]], fontsize=6
    )
    _mark_starts(panel, [record["task"] or "" for record in rounds])
    return _svg(figure)


def gate_values(rounds: Sequence[Mapping[str, Any]]) -> str:
    """A panel per criterion: its value after each round, and the refused values."""
    checked = [(place, r["gate"]) for place, r in enumerate(rounds) if r["gate"] and r["gate"]["attempts"]]
    names = list(dict.fromkeys(name for _, gate in checked for name in gate["before"]))
    figure = _figure(10.5, 2.6 * max(1, len(names)) + 0.4)
    panels = figure.subplots(max(1, len(names)), 1, squeeze=False, sharex=True).flat
    for panel, name in zip(panels, names, strict=False):
        places, values, refused = [], [], []
        for place, gate in checked:
            whole, last = gate["attempts"][0], gate["attempts"][-1]
            places.append(place)
            # A refused round leaves the value from before it.
            values.append(float((gate["before"] if gate["factor"] == 0 else last["figures"])[name]))
            if whole["objections"]:
                refused.append((place, float(whole["figures"][name])))
        panel.plot(places, values, color="#1f5f99", linewidth=1.4, marker="o", markersize=3)
        if refused:
            panel.plot(*zip(*refused, strict=True), "x", color="#c8421f", label="refused")
            panel.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        panel.set_ylabel(_plain(name), fontsize=9)
        panel.grid(axis="y", color="#e3e8ee", linewidth=0.7)
        _mark_starts(panel, [record["task"] or "" for record in rounds])
    return _svg(figure)


def _total(parts: Mapping[str, Tensor], prefix: str) -> Tensor:
    return torch.stack([tensor for name, tensor in parts.items() if name.startswith(prefix)]).sum(0)


def _finished(figure: Figure, panel: Any, label: str, rounds: RoundStatistics) -> str:
    panel.set_ylim(bottom=0)
    panel.set_ylabel(label, fontsize=9)
    panel.set_xlabel("round", fontsize=9)
    panel.grid(axis="y", color="#e3e8ee", linewidth=0.7)
    panel.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _mark_tasks(panel, rounds)
    return _svg(figure)


def _mark_tasks(panel: Any, rounds: RoundStatistics) -> None:
    _mark_starts(panel, [task for task, parts in rounds.items() for _ in parts["norms"]])


def _mark_starts(panel: Any, tasks: Sequence[str]) -> None:
    """Mark where each task begins with a line and its name; ``tasks`` has a name per round."""
    starts = [place for place, task in enumerate(tasks) if place == 0 or tasks[place - 1] != task]
    for start in starts:
        panel.axvline(start - 0.5, color="#8896a5", linewidth=0.6)
        panel.text(
            start - 0.4,
            1.01,
            _plain(tasks[start]),
            fontsize=7,
            rotation=0 if len(starts) <= 4 else 60,
            transform=panel.get_xaxis_transform(),
            color="#5d6b7a",
        )
    # Rounds are numbered from 1; about ten labels fit.
    step = max(1, -(-len(tasks) // 10))
    panel.set_xticks(range(0, len(tasks), step), [str(number + 1) for number in range(0, len(tasks), step)])


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _plain(text: str) -> str:
    """Escape dollar signs, which begin formulas in matplotlib."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the report draws with matplotlib: pip install "rkif[report]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    import matplotlib

    text = io.StringIO()
    # No date and constant ids: the same run gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "rkif", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawing = text.getvalue()[text.getvalue().index("<svg") :]
    # Remove the ids of matplotlib's groups: nothing refers to them, and several plots would repeat them.
    return re.sub(r' id="[a-zA-Z]\w*_\d+"', "", drawing)
