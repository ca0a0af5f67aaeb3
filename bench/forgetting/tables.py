"""Rows of ``bench/results/continual.jsonl`` as Markdown: means over orders and seeds, and differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from bench.forgetting import rates
from bench.forgetting.continual import MAIN, rows, variants
from bench.forgetting.rates import ByRate
from rkif.continual.display.progress import format_number
from rkif.continual.methods import METHODS, Sequential
from rkif.continual.methods.rounds import Rounds

Row = Mapping[str, Any]
Runs = dict[tuple[str, int], Row]  # (order, seed) -> row

SUMMARY = ("sequential", "replay", "replay_equal_steps", "average", "recurrent_kif", "recurrent_kif_paper")
SUITES = ("standard-minilm", "long-minilm")  # of the summary
PAPER_SUMMARY = (
    "sequential",
    "replay",
    "replay_distill_both",
    "recurrent_kif",
    "rkif",
    "rkif_weights_1",
    "multi_task",
)
BASELINE = "replay"
BOUND = "multi_task"
ABLATED = "recurrent_kif"  # FusionConfig(), which is the release preset
MINUTES = {"wall_s": "minutes", "cpu_s": "CPU minutes"}  # key of a row -> heading
SHOWN = tuple(name for name in MAIN if name != "recurrent_kif_release")  # the same runs as the default's


def summary() -> str:
    """The README's table: a line for each method, OP and BWT on both suites."""
    by_suite = {config: group for (config, *_), group in _groups().items() if config in SUITES}
    if not by_suite:
        return ""
    groups = [by_suite[suite] for suite in SUITES if suite in by_suite]
    settings, headings = [], ["method"]
    for group in groups:
        every = [row for runs in group.values() for row in runs.values()]
        tasks, training = len(every[0]["tasks"]), every[0]["settings"]["training"]
        records = f"{sum(every[0]['records'])} {every[0]['split']} records"
        error = f"standard error of one run's OP {max(map(_standard_error, every)):.1f}"
        settings.append(f"{tasks} tasks of {training['steps']} steps ({records}, {error})")
        headings += [f"OP, {tasks} tasks", f"BWT, {tasks} tasks", f"runs, {tasks} tasks"]
    lines = []
    for method in SUMMARY:
        cells = [method]
        for group in groups:
            runs = group.get(method, {})
            cells += [_mean(runs, "op"), _mean(runs, "bwt", sign=True), str(len(runs)) if runs else "-"]
        lines.append(cells)
    model = next(iter(next(iter(groups[0].values())).values()))["model"]
    return f"{model}, {'; '.join(settings)}.\n\n{_markdown(headings, lines)}"


def paper_summary() -> str:
    """The README's tables of the suites with the paper's number of steps."""
    parts = []
    for group in _groups(paper=True).values():
        headings = ["method", "OP", "BWT", "OP against replay", "BWT against replay", "runs"]
        lines = []
        for method in (name for name in PAPER_SUMMARY if name in group):
            runs, baseline = group[method], group.get(BASELINE, {})
            cells = [method, _mean(runs, "op"), _mean(runs, "bwt", sign=True)]
            cells += [_difference(runs, baseline), _difference(runs, baseline, "bwt"), str(len(runs))]
            lines.append(cells)
        parts.append(f"{_heading(group)}\n\n{_markdown(headings, lines)}")
    return "\n".join(parts)


def everything() -> str:
    """All methods, with their cost."""
    return "\n".join(_table(group, SHOWN, cost=True) for group in _groups().values())


def tuned() -> str:
    """Baselines with settings that differ from those of the main table."""
    parts = []
    for group in _groups().values():
        names = [name for name in group if name not in MAIN and not _ablates(group[name])]
        if names:
            parts.append(_table(group, [BASELINE, *names, "recurrent_kif"]))
    return "\n".join(parts)


def ablations() -> str:
    """Changes to the release preset, compared at one rate, on the orders and seeds that both have."""
    parts = []
    for methods in by_rate().values():
        group = _at_best_rates(methods)
        names = [name for name in group if name not in MAIN and _ablates(group[name])]
        if not names or ABLATED not in group:
            continue
        several = len({_rate(group[name]) for name in (ABLATED, *names)}) > 1
        headings = ["change", *(["rate"] if several else []), "OP", "BWT", "OP against release"]
        headings += ["BWT against release", "samples", "runs"]
        lines = []
        for name in (ABLATED, *names):
            runs = group[name]
            preset = methods[ABLATED].get(_rate(runs), {})  # at the same rate
            cells = [name, *([f"x {_rate(runs):g}"] if several else [])]
            cells += [_mean(runs, "op"), _mean(runs, "bwt", sign=True)]
            cells += [_difference(runs, preset), _difference(runs, preset, "bwt")]
            lines.append([*cells, _samples(runs), str(len(runs))])
        parts.append(f"{_heading(group)}\n\n{_markdown(headings, lines)}")
    return "\n".join(parts)


def _ablates(runs: Runs) -> bool:
    """Whether the runs are of a variant of Recurrent-KIF, not of a baseline."""
    (name,) = {row["method"] for row in runs.values()}
    return variants().get(name, {}).get("method") in ("recurrent_kif", "adaptive")


def by_rate() -> dict[tuple[str, ...], dict[str, ByRate]]:
    """(config, device) -> method -> rate -> runs. Rows without the field "config" form separate groups."""
    groups: dict[tuple[str, ...], dict[str, dict[float, Runs]]] = {}
    for row in rows():
        key = (row.get("config") or f"{row['order']}-{row['model']}", row["device"])
        runs = groups.setdefault(key, {}).setdefault(row["method"], {}).setdefault(row["rate"], {})
        runs[row["order"], row["seed"]] = row
    return groups  # type: ignore[return-value]


def tuned_suites() -> dict[str, dict[str, ByRate]]:
    """The suites and methods with runs at several learning rates on the suite's first order."""
    suites = {}
    for (config, *_), methods in by_rate().items():
        order = min(map(rates.first_order, methods.values()))
        several = {
            method: runs
            for method, runs in methods.items()
            if rates.first_order(runs) == order and len(rates.on_first_order(runs, "op")) > 1
        }
        if several:
            suites[config] = several
    return suites


def learning_rates() -> str:
    """OP and BWT by learning rate, on the first order of each suite."""
    parts = []
    for config, methods in tuned_suites().items():
        run = next(row for runs in methods.values() for group in runs.values() for row in group.values())
        base = run["settings"]["training"]["learning_rate"] / run["rate"]
        order = min(map(rates.first_order, methods.values()))
        parts.append(
            f"{config}, {order}: OP / BWT at multiples of the learning rate {base:g}.\n\n"
            f"{rates.table(methods)}"
        )
    return "\n".join(parts)


def paper_regime() -> str:
    """All methods and variants of the suites with the paper's number of steps, with their cost."""
    return "\n".join(_table(group, list(group), cost=True) for group in _groups(paper=True).values())


def _groups(*, paper: bool = False) -> dict[tuple[str, ...], dict[str, Runs]]:
    """(config, device) -> method -> its runs at its best learning rate; of the short suites by default."""
    return {
        key: _at_best_rates(methods)
        for key, methods in by_rate().items()
        if key[0].startswith("paper-") == paper
    }


def _at_best_rates(methods: Mapping[str, ByRate]) -> dict[str, Runs]:
    return {method: runs[rates.best_rate(runs)] for method, runs in methods.items()}


def _rate(runs: Runs) -> float:
    """The factor of the learning rates, which is the same for all these runs."""
    (rate,) = {row["rate"] for row in runs.values()}
    return float(rate)


def _table(group: Mapping[str, Runs], methods: Sequence[str], *, cost: bool = False) -> str:
    measured = [row for runs in group.values() for row in runs.values()]
    several = any(row["rate"] != 1 for row in measured)
    headings = ["method", *(["rate"] if several else []), "OP", "BWT", "FWT", "OP against replay", "BWT"]
    headings += ["gap closed"] if BOUND in group else []
    distilled = any(forward_passes(row) > 1 for row in measured)
    headings += ["samples", *(["forward passes per sample"] if distilled else []), "runs"]
    generates = any("perplexity" in row for row in measured)
    headings += ["perplexity"] if generates else []
    minutes = [name for key, name in MINUTES.items() if any(row.get(key) for row in measured)]
    headings += [*minutes, "peak MiB", "in rkif"] if cost else []
    lines = []
    for method in methods:
        if method not in group:
            continue
        runs = group[method]
        cells = [method]
        cells += [f"x {_rate(runs):g}"] if several else []
        cells += [_mean(runs, "op"), _mean(runs, "bwt", sign=True), _mean(runs, "fwt", sign=True)]
        baseline = group.get(BASELINE, {})
        cells += [_difference(runs, baseline), _difference(runs, baseline, "bwt")]
        cells += [_gap_closed(runs, baseline, group[BOUND])] if BOUND in group else []
        cells += [_samples(runs)]
        cells += [f"{median(map(forward_passes, runs.values())):.2f}"] if distilled else []
        cells += [str(len(runs))]
        cells += [_perplexity(runs)] if generates else []
        if cost:
            for key in (key for key, name in MINUTES.items() if name in minutes):
                times = [row[key] / 60 for row in runs.values() if row.get(key)]
                cells += [format_number(median(times) if times else None)]
            peaks = [row["peak_mib"] for row in runs.values() if row.get("peak_mib")]
            shares = [row["rkif_share"] for row in runs.values() if row.get("rkif_share")]
            cells += [
                f"{median(peaks):,.0f}" if peaks else "-",
                f"{100 * median(shares):.1f}%" if shares else "-",
            ]
        lines.append(cells)
    return f"{_heading(group)}\n\n{_markdown(headings, lines)}"


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns after the first have numbers."""
    rule = "| --- |" + " ---: |" * (len(headings) - 1)
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (headings, *lines))
    return "\n".join([first, rule, *others]) + "\n"


def _heading(group: Mapping[str, Runs]) -> str:
    rows_of_group = [row for runs in group.values() for row in runs.values()]
    row = rows_of_group[0]
    training, adapter = row["settings"]["training"], row["settings"]["adapter"]
    trained = f"LoRA of rank {adapter['r']}" if adapter else "all parameters"
    steps = training["steps"] or f"{training['epochs']} epochs of"
    orders = sorted({order for runs in group.values() for order, _ in runs})
    seeds = sorted({seed for runs in group.values() for _, seed in runs})
    error = max(map(_standard_error, rows_of_group))
    many = "s" if len(seeds) > 1 else ""
    commits = sorted({row["commit"].removesuffix("-dirty")[:7] for row in rows_of_group})
    return (
        f"{row['model']}, {len(row['tasks'])} tasks ({', '.join(orders)}), {steps} steps of "
        f"{training['batch_size']} a task, {trained}, {row['settings']['precision']}, "
        f"seed{many} {', '.join(map(str, seeds))}, {sum(row['records'])} {row['split']} records, "
        f"on {row['device']}, at {', '.join(commits)}. The number of records alone gives one run's OP a "
        f"standard error of about {error:.1f} points."
    )


def _standard_error(row: Row) -> float:
    """Standard error of the mean over tasks of binomial accuracies, in points."""
    final = [accuracy[-1] for accuracy in row["accuracy"]]
    variances = [a * (100 - a) / n for a, n in zip(final, row["records"], strict=True)]
    return math.sqrt(sum(variances)) / len(final)


def _mean(runs: Runs, key: str, *, sign: bool = False) -> str:
    """The mean over runs, with the standard deviation if there are several."""
    values = [row[key] for row in runs.values() if row[key] is not None]
    if not values:
        return "-"
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return format_number(fmean(values), sign=sign) + spread


def _difference(runs: Runs, baseline: Runs, metric: str = "op") -> str:
    """The mean difference over the orders and seeds that both have, and its standard error."""
    pairs = [
        runs[key][metric] - baseline[key][metric]
        for key in runs
        if key in baseline and runs[key][metric] is not None
    ]
    if not pairs or runs is baseline:
        return "-"
    spread = f" ± {stdev(pairs) / math.sqrt(len(pairs)):.1f}" if len(pairs) > 1 else ""
    return format_number(fmean(pairs), sign=True) + spread


def _gap_closed(runs: Runs, baseline: Runs, bound: Runs) -> str:
    """The share of the OP gap between baseline and multi-task training, over the runs that all three have."""
    keys = runs.keys() & baseline.keys() & bound.keys()
    gap = sum(bound[key]["op"] - baseline[key]["op"] for key in keys)
    if runs is baseline or runs is bound or gap <= 0:
        return "-"
    return f"{100 * sum(runs[key]['op'] - baseline[key]['op'] for key in keys) / gap:.0f}%"


def forward_passes(row: Row) -> float:
    """Forward passes of records per training sample; 1 without distillation.

    With distillation, the model before the task also answers the batches that have a divergence, all of them
    after the first task. With ``distillation.inputs`` these are batches with new records. With
    ``distillation.memory`` they are batches with memory records, unless their answers are kept. With
    ``inputs``, every new record is also a question of earlier tasks. If the prompts have no instruction, an
    encoder embeds all as one text. If tasks share labels, some are not asked, and this is an upper bound.
    """
    settings, tasks = row["settings"], len(row["tasks"])
    distillation, training = settings.get("distillation", {}), settings["training"]
    on_inputs = bool(distillation.get("inputs"))
    on_memory = bool(distillation.get("memory")) and distillation.get("answers") != "kept"
    if not (on_inputs or on_memory):
        return 1.0
    first: int = row["steps"] // tasks * training["batch_size"]
    new = first * (tasks - 1)
    memory = row["samples"] - first - new
    if _in_rounds(row):  # a batch has new records, or memory records
        answered = new * on_inputs + memory * on_memory
    else:
        answered = (new + memory) * (on_inputs or on_memory)
    prompt = settings["text"]["prompt"] if on_inputs else ""
    separate = on_inputs and not (settings["architecture"] == "encoder" and "{instruction}" not in prompt)
    most = distillation.get("questions", 1)
    asked = [earlier if most is None else min(most, earlier) for earlier in range(tasks)]
    questions = first * sum(asked) if separate else 0
    return float(1 + (answered + 2 * questions) / row["samples"])


def _in_rounds(row: Row) -> bool:
    """Whether a run's method takes separate steps on the memory and on new records."""
    method = variants().get(row["method"], {}).get("method", row["method"])
    return issubclass(METHODS.get(method, Sequential), Rounds)


def _perplexity(runs: Runs) -> str:
    """Before the first task -> after the last, means over the runs that measured it."""
    pairs = [row["perplexity"] for row in runs.values() if "perplexity" in row]
    return " -> ".join(f"{fmean(side):.1f}" for side in zip(*pairs, strict=True)) or "-"


def _samples(runs: Runs) -> str:
    return f"{median(row['samples'] for row in runs.values()):,.0f}"
