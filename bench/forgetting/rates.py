"""OP and BWT of the methods by learning rate, and the rate at which each method is compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rkif.continual.display.progress import format_number

Row = Mapping[str, Any]
Runs = dict[tuple[str, int], Row]  # (order, seed) -> row
ByRate = Mapping[float, Runs]  # factor of the config's learning rates -> runs


def first_order(by_rate: ByRate) -> str:
    """The order on which the rate is chosen."""
    return min(order for runs in by_rate.values() for order, _ in runs)


def on_first_order(by_rate: ByRate, metric: str) -> dict[float, float]:
    """Rate -> mean of a metric over the runs on the first order, ascending rates.

    The mean is over the seeds that every rate was run with on this order, if there are any.
    """
    order = first_order(by_rate)
    values = {
        rate: {seed: row[metric] for (one, seed), row in runs.items() if one == order}
        for rate, runs in sorted(by_rate.items())
    }
    of_rates = [of_seed.keys() for of_seed in values.values() if of_seed]
    common = set(of_rates[0]).intersection(*of_rates)
    means = {}
    for rate, of_seed in values.items():
        chosen = [of_seed[seed] for seed in common or of_seed if of_seed[seed] is not None]
        if of_seed and chosen:
            means[rate] = fmean(chosen)
    return means


def best_rate(by_rate: ByRate) -> float:
    """The rate with the highest OP on the first order; the lowest if several are equal."""
    means = on_first_order(by_rate, "op")
    return max(means, key=lambda rate: means[rate])


def table(methods: Mapping[str, ByRate]) -> str:
    """Markdown: a line for each method, OP / BWT on the first order at each rate, the best in bold."""
    rates = sorted({rate for by_rate in methods.values() for rate in by_rate})
    lines = ["| method | " + " | ".join(f"x {rate:g}" for rate in rates) + " |"]
    lines.append("| --- |" + " ---: |" * len(rates))
    for method, by_rate in methods.items():
        op, bwt = on_first_order(by_rate, "op"), on_first_order(by_rate, "bwt")
        cells = []
        for rate in rates:
            cell = "-"
            if rate in op:
                cell = f"{format_number(op[rate])} / {format_number(bwt.get(rate), sign=True)}"
            cells.append(f"**{cell}**" if rate == best_rate(by_rate) else cell)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(suites: Mapping[str, Mapping[str, ByRate]], out: Path) -> None:
    """Draw OP and BWT on the first order by learning rate: a row of two panels for each suite.

    Args:
        suites: name -> method -> rate -> runs.
        out: a PNG file.

    Raises:
        ValueError: there are no runs at several rates.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not suites:
        raise ValueError("no suite has runs at several learning rates")
    figure, axes = pyplot.subplots(
        len(suites), 2, figsize=(9, 0.6 + 3.2 * len(suites)), squeeze=False, layout="constrained"
    )
    for (suite, methods), panels in zip(suites.items(), axes, strict=True):
        for axis, metric in zip(panels, ("op", "bwt"), strict=True):
            for index, (method, by_rate) in enumerate(methods.items()):
                means = on_first_order(by_rate, metric)
                axis.plot(
                    list(means), list(means.values()), marker="os^vDPX*"[index % 8], label=method, linewidth=1
                )
            axis.set_xscale("log", base=2)
            ticks = sorted({rate for by_rate in methods.values() for rate in by_rate})
            axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
            axis.set_title(f"{suite}: {metric.upper()}", fontsize=9)
            axis.set_xlabel("factor of the learning rates", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
        panels[0].set_ylabel("percent", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata={"Software": ""})
    pyplot.close(figure)
