"""Commands on the ledger of a run: show and verify it, roll the run back, reproduce a round."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rkif.cli.options import Json, Quiet, Run, announce

if TYPE_CHECKING:
    from rich.table import Table

    from rkif.continual.rundir.folder import RunReader
    from rkif.ledger.chain import LedgerRecord

commands = typer.Typer()

FILTERS = ("--task", "--module", "--verdict")
# Option of `rkif log` -> options with which it can be combined, besides --json.
COMBINED = {
    "--verify": ("--head",),
    "--head": ("--verify",),
    "--explain": ("--task", "--verdict"),
    "--test-result": (),
}


@commands.command("log", rich_help_panel="Inspect")
def log_command(
    run: Run,
    noted: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="With --verify --head: a head that was printed earlier."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Only this task's records.")] = None,
    module: Annotated[
        str | None,
        typer.Option(
            "--module",
            help="Only parameters whose names have these whole parts, summed: layers.1 is not layers.10.",
        ),
    ] = None,
    verdict: Annotated[
        str | None,
        typer.Option("--verdict", help="Only rounds with this verdict: keep, damp, undo, stop, unchecked."),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="MODULE",
            help="Rounds that changed a module, and learners that selected it; named as for --module.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain of records, and every file against its digest.")
    ] = False,
    head: Annotated[
        bool,
        typer.Option(
            "--head",
            help="Print the number of records and the last hash, to store elsewhere; "
            "with --verify, compare the ledger with FILE.",
        ),
    ] = False,
    test_result: Annotated[
        int | None,
        typer.Option(
            metavar="ROUND", help="Print the gate's verdict on a round as an in-toto test result, in JSON."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a line per record, or the result of another option.")
    ] = False,
) -> None:
    """Show the effect of every round of a run, or verify the run against its ledger.

    \b
    Examples:
      rkif log runs/first --task news
      rkif log runs/first --explain layers.3.self_attn
      rkif log runs/first --verify
    """
    given = {
        "--task": task,
        "--module": module,
        "--verdict": verdict,
        "--explain": explain,
        "--verify": verify or None,
        "--head": head or None,
        "--test-result": test_result,
    }
    options = [option for option, value in given.items() if value is not None]
    _require_combination(options)
    if (noted is not None) != (verify and head):
        raise ValueError("--verify --head compares the ledger with a FILE: rkif log RUN --verify --head FILE")
    announce(f"{'Verifying' if verify else 'Reading'} the ledger of {run}")
    from rkif.continual.display import log
    from rkif.continual.display.run_list import print_runs
    from rkif.continual.rundir.folder import RunReader
    from rkif.ledger.records import not_rolled_back

    if not options and not as_json and print_runs(run):
        return
    reader = RunReader(run)
    records = reader.ledger()
    valid = not_rolled_back(records)
    if verify:
        _verify(reader, records, noted, as_json=as_json)
    elif head:
        _print_head(records, as_json=as_json)
    elif test_result is not None:
        from rkif.continual.display.gate_statement import gate_statement

        print(json.dumps(gate_statement(run, records, test_result), indent=1))
    elif explain is not None:
        explained = log.explanation(log.select(valid, task=task, verdict=verdict, module=explain), explain)
        if as_json:
            print(json.dumps(explained))
        else:
            _print_tables(log.explanation_tables(explained))
    else:
        selected = log.select(records, task=task, verdict=verdict, module=module)
        if as_json:
            for record in log.only_module(selected, module):
                print(json.dumps(record))
        else:
            from rkif.continual.display.verdicts import verdict_line

            _print_tables([log.records_table(selected, module, valid)])
            numbers = {record["seq"] for record in valid}
            if verdicts := verdict_line([record for record in selected if record["seq"] in numbers]):
                print(verdicts)


def _require_combination(given: list[str]) -> None:
    """Refuse combinations of options of `rkif log` in which one would be ignored."""
    for option, others in COMBINED.items():
        for other in given if option in given else ():
            if other != option and other not in others:
                raise ValueError(f"{option} and {other} cannot be combined")


def _verify(reader: RunReader, records: list[LedgerRecord], noted: Path | None, *, as_json: bool) -> None:
    """Check a run, and its ledger against a head in the file ``noted``."""
    from rkif.attest.head import read_checkpoint_note
    from rkif.continual.display.log import verified_line
    from rkif.continual.rundir.head import require_head
    from rkif.continual.rundir.verify import require_whole
    from rkif.ledger.chain import LEDGER

    if noted is not None:
        require_head(records, read_checkpoint_note(noted), reader.path / LEDGER, noted)
    checked = require_whole(reader, records)
    if as_json:
        print(json.dumps({**checked, "hash": records[-1]["hash"]}))
        return
    line = verified_line(reader.path, checked, records)
    print(line + (f"; the chain has the head in {noted}" if noted is not None else ""))


def _print_head(records: list[LedgerRecord], *, as_json: bool) -> None:
    from rkif.continual.rundir.head import head_of

    head = head_of(records)
    print(json.dumps(head.model_dump()) if as_json else head.to_checkpoint(), end="\n" if as_json else "")


def _print_tables(tables: list[Table]) -> None:
    from rich.console import Console

    from rkif.continual.display.log import print_tables

    print_tables(Console(), *tables)


@commands.command("rollback", rich_help_panel="Inspect")
def rollback_command(
    run: Run,
    to: Annotated[int, typer.Option("--to", min=0, help="The round's number in `rkif log`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the record and what was deleted.")] = False,
) -> None:
    """Return a run to the state after a round; `rkif run --resume` continues from there.

    This deletes the models of tasks that were learned later, the states after later rounds, and the
    accuracies measured later. Copy the run first to keep them. The ledger keeps all records.

    \b
    Example:
      rkif rollback runs/first --to 12
    """
    announce(f"Rolling {run} back to round {to}")
    from rkif.continual.rundir.rollback import rollback, task_and_state_files

    before = task_and_state_files(run)
    record = rollback(run, to)
    deleted = sorted(before - task_and_state_files(run))
    if as_json:
        print(json.dumps({"record": record, "deleted": deleted}))
        return
    print(f"deleted: {', '.join(deleted) or 'nothing'}")
    print(
        f"{run} is as it was after round {to}, and continues in task {record['task']}; "
        f"SHA-256 of the parameters {record['parameters']['after']}"
    )


@commands.command("reproduce", rich_help_panel="Inspect")
def reproduce_command(
    run: Run,
    round_: Annotated[int, typer.Option("--round", min=1, help="The round's number in `rkif log`.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a round again from an earlier state and compare it with the ledger; writes nothing.

    \b
    Example:
      rkif reproduce runs/first --round 12
    """
    announce(f"Reproducing round {round_} of {run}", quiet=quiet)
    from rich.console import Console

    from rkif.continual.display.progress import RunProgress
    from rkif.continual.replay_round import reproduce

    outcome = reproduce(run, round_, RunProgress(Console(stderr=as_json, quiet=quiet)))
    if as_json:
        print(json.dumps({"round": round_, "start": outcome.start, "differences": outcome.differences}))
    for field, (then, now) in outcome.differences.items():
        print(f"{field}: {then} in the ledger, {now} now", file=sys.stderr)
    if outcome.differences:
        raise ValueError(f"round {round_} was not reproduced: {', '.join(outcome.differences)} differ")
    if as_json or quiet:
        return
    print(
        f"round {round_} of task {outcome.record['task']}, from the state after round {outcome.start}: "
        f"the same data, thresholds, counts and parameters; "
        f"SHA-256 {outcome.record['parameters']['after']}"
    )
