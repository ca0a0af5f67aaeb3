"""The style of the report's plots: sizes, colours, dark mode, and SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INNER, OUTER, BOTH = "#3579b8", "#d9632b", "#3f9460"
RUNS = (INNER, OUTER, BOTH, "#8a63b3", "#b08a1e", "#4aa5b5", "#b5527a", "#7a7f87")
COLOUR_MAP = "viridis"

# Colours that the page's style replaces, so that plots follow its light and dark mode.
INK, GRID, SHADE = "#010203", "#010204", "#010205"
_STYLE = {INK: "currentColor", GRID: "var(--line)", SHADE: "var(--shaded)"}
_RC: Any = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.axisbelow": True,
    # Constant ids, and text that is not converted to paths: the same run gives the same page.
    "svg.hashsalt": "rkif",
    "svg.fonttype": "none",
}

WIDTH = 10.5  # inches
LEFT, RIGHT = 2.05, 0.75  # margins for names and colour bars; the same for all plots over rounds
_ABOVE, _BELOW = 0.35, 0.75  # margins for the tasks' names, and for tick labels and a legend


@contextmanager
def figure(height: float) -> Iterator[Figure]:
    """A figure of :data:`WIDTH` and ``height`` inches; the report's style is active in the block.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'the report draws with matplotlib: pip install ".[report]" in the source folder of rkif'
        ) from error
    with matplotlib.rc_context(_RC):
        yield Figure(figsize=(WIDTH, height))


def round_panels(drawing: Figure, count: int, *, gap: float = 0.4) -> Sequence[Any]:
    """``count`` panels over the same rounds, one below the other, between the margins."""
    height = drawing.get_figheight()
    drawing.subplots_adjust(
        left=LEFT / WIDTH,
        right=1 - RIGHT / WIDTH,
        top=1 - _ABOVE / height,
        bottom=_BELOW / height,
        hspace=gap,
    )
    return list(drawing.subplots(count, 1, squeeze=False, sharex=True)[:, 0])


def colour_bar(drawing: Figure, panel: Any, image: Any, label: str) -> None:
    """A colour bar in the right margin of a panel."""
    place = panel.get_position()
    bar = drawing.add_axes((place.x1 + 0.012, place.y0, 0.01, place.height))
    drawing.colorbar(image, cax=bar, label=label)


def legend(panel: Any, columns: int) -> None:
    """A legend below the panel's axis label."""
    gap = 0.42 / (panel.get_position().height * panel.figure.get_figheight())
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -gap), ncols=columns)


def mark_tasks(panel: Any, tasks: Sequence[str]) -> None:
    """Mark where each task begins with a line and its name; ``tasks`` has a name per round."""
    starts = task_starts(tasks)
    for start in starts:
        panel.axvline(start - 0.5, color=INK, alpha=0.4, linewidth=0.6)
        panel.text(
            start - 0.4,
            1.02,
            plain(tasks[start]),
            fontsize=8,
            rotation=0 if len(starts) <= 6 else 60,
            transform=panel.get_xaxis_transform(),
        )
    # Rounds are numbered from 1; about ten labels fit.
    step = max(1, -(-len(tasks) // 10))
    panel.set_xticks(range(0, len(tasks), step), [str(index + 1) for index in range(0, len(tasks), step)])
    panel.set_xlim(-0.5, len(tasks) - 0.5)


def task_starts(tasks: Sequence[str]) -> list[int]:
    """The rounds in which a task begins."""
    return [place for place, task in enumerate(tasks) if place == 0 or tasks[place - 1] != task]


def plain(text: str) -> str:
    """Escape dollar signs, which begin formulas in matplotlib."""
    return text.replace("$", r"\$")


def svg(drawing: Figure) -> str:
    """The figure as an SVG element with the colours of the page; on a narrow page it scrolls."""
    text = io.StringIO()
    # Without a date, so that the same run gives the same page.
    drawing.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    element = text.getvalue()[text.getvalue().index("<svg") :]
    for colour, replacement in _STYLE.items():
        element = element.replace(colour, replacement)
    # Remove the ids of matplotlib's groups: nothing refers to them, and several plots would repeat them.
    element = re.sub(r' id="[a-zA-Z]\w*_\d+"', "", element)
    return f'<div class="scroll">{element}</div>'
