"""The methods of docs/adding-a-method.md learn a sequence, resume with the same bits, and pass its test."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from run_inputs import assert_same_files, files, go

from rkif.continual.config import RunConfig
from rkif.continual.display.progress import RunProgress
from rkif.continual.methods import METHODS, Context, Sequential

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
CODE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)

Config = Callable[..., RunConfig]


class Killed(BaseException):
    pass


def names_of_the_page() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "adding_a_method"}
    for code in CODE:
        exec(compile(code, PAGE.name, "exec"), names)
    return names


@pytest.mark.parametrize("kind", ["WiseFt", "Larger"])
def test_the_methods_of_the_page_run_and_resume_to_the_bit(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setitem(METHODS, "of_the_page", names_of_the_page()[kind])  # type: ignore[arg-type]
    settings = config(method="of_the_page")
    metrics = go(settings, tmp_path / "straight")
    assert [len(row) for row in metrics["accuracy"]] == [3, 3, 3]
    steps = 0

    def stop(_: RunProgress, loss: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 12:  # in the second task, after a checkpoint
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunProgress, "advance", stop)
        with pytest.raises(Killed):
            go(settings, tmp_path / "killed")
    go(settings, tmp_path / "killed", resume=True)
    assert_same_files(files(tmp_path / "killed"), files(tmp_path / "straight"), kind)


def test_the_test_of_the_page_passes(config: Config, inputs: Path) -> None:
    names_of_the_page()["test_the_parameters_are_the_mean_of_before_and_after"](config, inputs)


def test_the_method_of_the_page_refuses_a_single_step(config: Config) -> None:
    method = names_of_the_page()["WiseFt"]
    method.require(config())
    with pytest.raises(ValueError, match=r"training\.steps must be at least 2"):
        method.require(config(training={"steps": 1}))


def test_the_merge_of_the_page_takes_the_larger_change() -> None:
    merge = names_of_the_page()["Larger"].merge
    inner, outer = torch.tensor([1.0, -3.0, 2.0, 0.0]), torch.tensor([-2.0, 1.0, -2.0, 0.0])
    assert merge(None, "w", inner, outer).tolist() == [-2.0, -3.0, 2.0, 0.0]


def test_the_page_lists_every_hook_and_attribute() -> None:
    """The page has exactly the hooks and class attributes of the base class, and the inputs of a context."""
    text = PAGE.read_text(encoding="utf-8")
    hooks = set(re.findall(r"`(\w+)\(\w*\)`", text.split("| hook |")[1].split("\n\n")[0]))
    listed = text.split("Class attributes")[1].split("\n## ")[0]
    attributes = set(re.findall(r"^- `(\w+)`", listed, flags=re.MULTILINE))
    public = {name for name in vars(Sequential) if not name.startswith("_")}
    helpers = {"learner", "records", "lr_fraction", "seed"}
    assert hooks | attributes == public - helpers

    table = text.split("| attribute |")[1].split("\n\n")[0]
    inputs = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    derived = {name for name, value in vars(Context).items() if isinstance(value, property)}
    assert inputs == {field.name for field in fields(Context)} | derived
