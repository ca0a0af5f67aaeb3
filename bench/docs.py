"""The generated parts of README.md and the docs: tables of the committed results, and whole pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.api_reference import api_reference
from bench.checkpoints import peers as checkpoints
from bench.forgetting import delta, ledger, state_precision, task_vector_angles
from bench.forgetting import tables as continual_tables
from bench.fuzzing import campaign as fuzzing
from bench.kernels import launches, roofline
from bench.kernels import tables as kernels
from bench.notebook import notebook
from bench.training import model_memory, overhead, scaling

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
FILES = (README, *sorted(DOCS.rglob("*.md")))  # every page that may have tables


def generated() -> Iterator[tuple[Path, str]]:
    """Yield each file that may have generated parts, and its text."""
    for file in FILES:
        yield file, with_tables(file.read_text(encoding="utf-8"))
    yield DOCS / "reference" / "api.md", api_reference()
    script = DOCS / "examples" / "lora_loop.py"
    yield script.with_suffix(".ipynb"), notebook(script.read_text(encoding="utf-8"))


def with_tables(text: str) -> str:
    """``text`` with new tables between the results markers.

    Raises:
        ValueError: a marker names an unknown table.
    """

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"no such results: {name!r}")
        return f"<!-- results: {name} -->\n{TABLES[name]()}<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


TABLES: dict[str, Callable[[], str]] = {
    "checkpoints": checkpoints.markdown,
    "ablations": continual_tables.ablations,
    "tuned": continual_tables.tuned,
    "continual": continual_tables.summary,
    "continual_all": continual_tables.everything,
    "delta": delta.markdown,
    "learning_rates": continual_tables.learning_rates,
    "paper_regime": continual_tables.paper_regime,
    "paper_summary": continual_tables.paper_summary,
    "fuzz": fuzzing.markdown,
    "task_vector_angles": task_vector_angles.markdown,
    "kernels": kernels.summary,
    "kernels_all": kernels.markdown,
    "launches": launches.markdown,
    "ledger": ledger.markdown,
    "model_memory": model_memory.markdown,
    "overhead": overhead.markdown,
    "roofline": roofline.markdown,
    "scaling": scaling.markdown,
    "state_precision": state_precision.markdown,
}
