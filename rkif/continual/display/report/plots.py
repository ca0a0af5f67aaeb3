"""The report's plots, as SVG text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkif.continual.display.report.figure import (
    BOTH,
    COLOUR_MAP,
    GRID,
    INNER,
    OUTER,
    RUNS,
    SHADE,
    colour_bar,
    figure,
    legend,
    mark_tasks,
    plain,
    round_panels,
    svg,
    task_starts,
)
from rkif.fuser.parameters import short_name
from rkif.fuser.state_names import section

RoundStatistics = Mapping[str, Mapping[str, Tensor]]
"""Task -> statistics of its rounds, see rkif.continual.evaluation.history; only tasks with rounds."""

SIDES = ("inner", "outer")
_MAX_NAMES = 60  # maximum number of tensors' names beside a map


class Accuracy(NamedTuple):
    """The accuracies of a run: ``initial[i]`` before training, ``matrix[i][j]`` after task j."""

    initial: Sequence[float]
    matrix: Sequence[Sequence[float]]


def forgetting_curves(tasks: Sequence[str], runs: Mapping[str, Accuracy]) -> str:
    """A panel per task: its accuracy before training and after each task, a line per run."""

    def draw(i: int, panel: Any, name: str, colour: str) -> None:
        initial, matrix = runs[name]
        values = [initial[i], *matrix[i]]
        panel.plot(range(len(values)), values, color=colour, linewidth=1.8, label=plain(name))
        if i + 1 < len(values):
            panel.plot(i + 1, values[i + 1], "o", color=colour, markersize=5, clip_on=False)
        panel.set_ylim(0, 102)

    return _task_curves(tasks, len(tasks), list(runs), draw, learned=True)


def harness_curves(tasks: int, runs: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A panel per task of lm-eval: its value before training and after each task, a line per run.

    Args:
        tasks: number of tasks that the runs learn.
        runs: name of a run -> task of lm-eval -> its values; the runs have the same tasks.
    """
    names = list(next(iter(runs.values())))

    def draw(i: int, panel: Any, run: str, colour: str) -> None:
        values = runs[run][names[i]]
        panel.axhline(values[0], color=colour, linewidth=0.8, linestyle="dashed")
        panel.plot(range(len(values)), values, color=colour, linewidth=1.8, label=plain(run))

    return _task_curves(names, tasks, list(runs), draw, learned=False)


def _task_curves(
    tasks: Sequence[str],
    count: int,
    runs: Sequence[str],
    draw: Callable[[int, Any, str, str], None],
    *,
    learned: bool,
) -> str:
    """A panel per task over the number of learned tasks.

    Args:
        tasks: the panels' titles.
        count: number of tasks that the runs learn.
        runs: names of the lines.
        draw: draws a line; takes the index of the task, the panel, the run and its colour.
        learned: whether the panels' tasks are those that the runs learn; then all have one scale.
    """
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    height = 1.9 * lines + 0.5 + (0.3 if len(runs) > 1 else 0)
    with figure(height) as drawing:
        drawing.subplots_adjust(
            left=0.04,
            right=0.99,
            top=1 - 0.25 / height,
            bottom=(height - 1.9 * lines) / height,
            hspace=0.35,
            wspace=0.08 if learned else 0.2,
        )
        panels = drawing.subplots(lines, columns, sharex=True, sharey=learned, squeeze=False).flat
        for i, panel in enumerate(panels):
            if i >= len(tasks):
                panel.set_axis_off()
                continue
            if learned:
                panel.axvspan(0, i + 1, color=SHADE, linewidth=0)  # not learned yet
            for run, colour in zip(runs, RUNS * len(runs), strict=False):
                draw(i, panel, run, colour)
            panel.set_title(plain(tasks[i]), loc="left")
            panel.set_xlim(0, count)
            panel.set_xticks(range(0, count + 1, max(1, count // 5)))
            panel.grid(axis="y", color=GRID, linewidth=0.7)
        drawing.supxlabel("tasks learned", fontsize=8.5, y=(0.32 if len(runs) > 1 else 0.02) / height)
        if len(runs) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            drawing.legend(handles, labels, loc="lower center", ncols=min(6, len(runs)))
        return svg(drawing)


def importance_maps(rounds: RoundStatistics) -> str:
    """A map per learner: parameters from top to bottom, rounds from left to right."""
    means = [section(statistics, "importance") for statistics in rounds.values()]
    names = sorted(means[0], key=_natural)
    values = torch.cat([torch.stack([task[name] for name in names]) for task in means], dim=1)
    # [tensors, rounds, 2]
    return "".join(
        _map(
            values[:, :, side].double(),
            names,
            _tasks(rounds),
            title=f"{SIDES[side]} learner",
            label="log10 of mean importance",
        )
        for side in (0, 1)
    )


def movement_map(rounds: Sequence[Mapping[str, Any]]) -> str:
    """L2 norm of each parameter's change over sqrt(numel): parameters down, the ledger's rounds across."""
    names = sorted(rounds[0]["modules"], key=_natural)
    modules = [record["modules"] for record in rounds]
    moved = [[one[name]["moved"] / max(1, one[name]["numel"]) ** 0.5 for one in modules] for name in names]
    tasks = [record["task"] or "" for record in rounds]
    return _map(torch.tensor(moved, dtype=torch.float64), names, tasks, label="log10 of change")


def mask_overlap(rounds: RoundStatistics) -> str:
    """Bands: the shares selected by the inner learner alone, by both, and by the outer learner alone."""
    by_tensor = [list(section(statistics, "counts").values()) for statistics in rounds.values()]
    counts = torch.cat([torch.stack(task).sum(0) for task in by_tensor]).double()  # [rounds, 4]
    shares = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).T.tolist()
    inner_only, outer_only, both = shares[:3]
    with figure(3.2) as drawing:
        (panel,) = round_panels(drawing, 1)
        panel.stackplot(
            range(len(both)),
            inner_only,
            both,
            outer_only,
            labels=["inner learner alone", "both", "outer learner alone"],
            colors=[INNER, BOTH, OUTER],
            alpha=0.75,
            linewidth=0,
        )
        panel.set_ylabel("% of parameters")
        return _over_rounds(drawing, panel, _tasks(rounds), columns=3)


def movement(rounds: RoundStatistics) -> str:
    """L2 norms of the task vectors and of the update."""
    norms = torch.cat([statistics["norms"] for statistics in rounds.values()])  # [rounds, 3]
    tasks = _tasks(rounds)
    with figure(3.2) as drawing:
        (panel,) = round_panels(drawing, 1)
        for column, (name, colour) in enumerate(
            (("inner task vector", INNER), ("outer task vector", OUTER), ("update", BOTH))
        ):
            values: list[float] = norms[:, column].tolist()
            _line(panel, list(range(len(values))), values, tasks, colour, label=name)
        panel.set_ylabel("L2 norm")
        panel.set_ylim(bottom=0)
        return _over_rounds(drawing, panel, tasks, columns=3)


def gate_values(rounds: Sequence[Mapping[str, Any]]) -> str:
    """A panel per criterion: its value after each round, and the refused values."""
    checked = [(place, r["gate"]) for place, r in enumerate(rounds) if r["gate"] and r["gate"]["attempts"]]
    names = list(dict.fromkeys(name for _, gate in checked for name in gate["before"]))
    tasks = [record["task"] or "" for record in rounds]
    with figure(2.1 * max(1, len(names)) + 0.8) as drawing:
        panels = round_panels(drawing, max(1, len(names)))
        for panel, name in zip(panels, names, strict=False):
            places, values, refused = [], [], []
            for place, gate in checked:
                whole, last = gate["attempts"][0], gate["attempts"][-1]
                places.append(place)
                # A refused round leaves the value from before it.
                values.append(float((gate["before"] if gate["factor"] == 0 else last["figures"])[name]))
                if whole["objections"]:
                    refused.append((place, float(whole["figures"][name])))
            _line(panel, places, values, tasks, INNER, label="after the round", marker="o")
            if refused:
                panel.plot(*zip(*refused, strict=True), "x", color=OUTER, label="whole step, refused")
            panel.set_ylabel(plain(name))
            panel.grid(axis="y", color=GRID, linewidth=0.7)
        for panel in panels[:-1]:
            mark_tasks(panel, tasks)
        return _over_rounds(drawing, panels[-1], tasks, columns=2)


def _map(values: Tensor, names: Sequence[str], tasks: Sequence[str], *, label: str, title: str = "") -> str:
    """A map of positive values [names, rounds] on a logarithmic scale; other values are blank."""
    with figure(min(14.0, 1.1 + 0.19 * len(names))) as drawing:
        (panel,) = round_panels(drawing, 1)
        shown = values.where(values > 0, torch.nan).log10().numpy()
        image = panel.imshow(shown, aspect="auto", cmap=COLOUR_MAP, interpolation="nearest")
        colour_bar(drawing, panel, image, label)
        step = max(1, len(names) // _MAX_NAMES)
        panel.set_yticks(
            range(0, len(names), step), [plain(short_name(name)) for name in names[::step]], fontsize=7.5
        )
        if title:
            above = drawing.get_figheight() - 0.02
            drawing.text(0.005, above / drawing.get_figheight(), title, va="top", fontsize=9.5)
        panel.set_xlabel("round")
        mark_tasks(panel, tasks)
        return svg(drawing)


def _line(
    panel: Any,
    places: Sequence[int],
    values: Sequence[float],
    tasks: Sequence[str],
    colour: str,
    *,
    label: str,
    **more: Any,
) -> None:
    """A line that is broken where a task begins."""
    starts = [*task_starts(tasks), len(tasks)]
    for start, stop in pairwise(starts):
        part = [(place, value) for place, value in zip(places, values, strict=True) if start <= place < stop]
        if part:
            panel.plot(
                *zip(*part, strict=True), color=colour, linewidth=1.4, markersize=3, label=label, **more
            )
            label = "_"  # named once


def _over_rounds(drawing: Any, panel: Any, tasks: Sequence[str], *, columns: int) -> str:
    panel.set_xlabel("round")
    panel.grid(axis="y", color=GRID, linewidth=0.7)
    mark_tasks(panel, tasks)
    legend(panel, columns)
    return svg(drawing)


def _tasks(rounds: RoundStatistics) -> list[str]:
    """The task of every round."""
    return [task for task, statistics in rounds.items() for _ in statistics["norms"]]


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
