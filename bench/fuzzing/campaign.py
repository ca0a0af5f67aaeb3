"""A fuzzing campaign: cases of each kind until the time is over, and a summary."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from bench.common import rows as store
from bench.common.machine import commit, device_name
from bench.fuzzing.cases import Outcome, call, kill, mutation
from bench.fuzzing.commandline import import_everything
from bench.fuzzing.subjects import Subjects
from rkif_kernels import require_choice

RESULTS = store.RESULTS / "fuzz.jsonl"
KINDS: dict[str, Callable[[int, Subjects], Outcome]] = {
    "mutation": mutation,
    "call": call,
    "kill": kill,
}


def campaign(
    seconds: float, seed: int, kind: str, cases: int | None, *, write: bool, console: Console
) -> list[str]:
    """Run cases of all kinds, with the seeds from ``seed`` on; the kinds get equal time.

    Args:
        seconds: time after which no case begins.
        kind: one of :data:`KINDS`, or "" for all.
        cases: maximum number of cases of each kind.
        write: whether the summary replaces the committed one.

    Returns:
        The findings, one line each.
    """
    if kind:
        require_choice("--kind", kind, list(KINDS))
    chosen = {name: run for name, run in KINDS.items() if kind in ("", name)}
    spent, done, kills = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0), dict.fromkeys(chosen, 0)
    findings: dict[str, list[str]] = {name: [] for name in chosen}
    threads = torch.get_num_threads()
    import_everything()
    try:
        with tempfile.TemporaryDirectory() as folder:
            subjects = Subjects(Path(folder))
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                open_ = [name for name in chosen if cases is None or done[name] < cases]
                if not open_:
                    break
                name = min(open_, key=spent.__getitem__)  # the kind with the least time so far
                case = seed + done[name]
                started = time.monotonic()
                where, wrong, killed = chosen[name](case, subjects)
                spent[name] += time.monotonic() - started
                done[name] += 1
                kills[name] += killed
                if wrong is not None or cases == 1:
                    console.print(
                        f"{name} {case}: {where}: {wrong or 'no finding'}", highlight=False, markup=False
                    )
                if wrong is not None:
                    findings[name].append(f"{name}, seed {case}: {where}: {wrong}")
    finally:
        torch.set_num_threads(threads)
    for name in chosen:
        counts = f"{done[name]} cases, {kills[name]} kills, {len(findings[name])} findings"
        console.print(f"{name}: {counts}, {spent[name]:.0f} s")
    if write:
        store.write_all(
            RESULTS,
            [
                {
                    "kind": name,
                    "cases": done[name],
                    "kills": kills[name],
                    "findings": len(findings[name]),
                    "first_seed": seed,
                    "seconds": round(spent[name]),
                    "device": device_name(torch.device("cpu")),
                    "versions": store.versions(),
                    "commit": commit(),
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                }
                for name in chosen
            ],
        )
    return [finding for name in chosen for finding in findings[name]]


def markdown() -> str:
    """The committed summary as a table."""
    rows = store.read(RESULTS)
    lines = [
        f"`python -m bench fuzz`, seeds from {rows[0]['first_seed']}, on {rows[0]['device']}, "
        f"at {store.commit_of(rows[0])}.",
        "",
        "| cases | number | kills | findings |",
        "| --- | ---: | ---: | ---: |",
    ]
    texts = {
        "mutation": "one file of a run or of a fused output damaged, then commands that read it",
        "call": "calls of `rkif.fuse` and rounds of a `Fuser`, compared with the reference or refused",
        "kill": "`rkif run`, `rkif fuse` or `rkif rollback` killed up to three times, then continued",
    }
    lines += [
        f"| {texts[row['kind']]} | {row['cases']:,} | {row['kills']} | {row['findings']} |" for row in rows
    ]
    return "\n".join(lines) + "\n"
