"""`rkif plan`: the memory of a training, from config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama
from typer.testing import CliRunner

from rkif import cli
from rkif.fuser.snapshot import GROUP_NUMEL
from rkif.plan import OPTIONS, Option, Training, choose
from rkif.plan.bytes import budget
from rkif.plan.model import count_parameters


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_llama(40, 0).config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    return tmp_path


def plan(*arguments: Any) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["plan", "--json", *map(str, arguments)])
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_parameters_are_those_of_the_model(model: Path) -> None:
    real = tiny_llama(40, 0)
    sizes = [p.numel() for p in real.parameters()]
    for path in (model, model / "config.json"):
        found = count_parameters(path)
        assert (found.trainable, found.frozen, found.largest) == (sum(sizes), 0, max(sizes))
    linears = [module for name, module in real.named_modules() if name.endswith(("q_proj", "v_proj"))]
    factors = [3 * size for linear in linears for size in linear.weight.shape]
    adapter = count_parameters(model, rank=3, targets=["q_proj", "v_proj"])
    assert (adapter.trainable, adapter.frozen, adapter.largest) == (sum(factors), sum(sizes), max(factors))


def test_tied_embeddings_count_once(model: Path) -> None:
    text = json.loads((model / "config.json").read_text())
    counts = []
    for tied in (False, True):
        (model / "config.json").write_text(json.dumps(text | {"tie_word_embeddings": tied}))
        counts.append(count_parameters(model).trainable)
    assert counts[0] - counts[1] == text["vocab_size"] * text["hidden_size"]


def test_bytes_are_those_computed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, AdamW, S*U: 4 + 4 + 8 + 8 + base 4 + S, U 8 + 8; inner result 4; fusion 4, no gradients."""
    monkeypatch.setattr("rkif.fuser.snapshot.KEPT_BYTES", 0)
    plain, memory = Training(1000, 0, 1000), 10**9
    assert budget(Option(), plain, memory=memory, reserve=7).phases == {
        "inner": 44_007,
        "outer": 48_007,
        "fusion": 48_007,
    }
    # bfloat16: 2 + 2 + 4 + 4, a master of 4, S alone 4 + 4; 2; no gradients, 4. Turns: the start.
    low = Training(1000, 0, 1000, trainable_bytes=2, uncertainty=False)
    assert budget(Option(), low, memory=memory, reserve=0).phases == {
        "inner": 24_000,
        "outer": 26_000,
        "fusion": 28_000 + 1000 * 2,
    }
    # Offloaded, packed, rounded: 4 + 4 + 8 + 8, S, U 4 + 4, then the mask. Two turns' base and inner result.
    lean = budget(Option(True, True, "bfloat16"), plain, memory=memory, reserve=0)
    assert lean.phases == {"inner": 32_000, "outer": 28_125, "fusion": 24_125 + 1000 * (4 + 2 + 2 * 8)}
    frozen = Training(10, 1000, 10, frozen_bytes=2, optimizer="sgd")
    assert budget(Option(), frozen, memory=memory, reserve=0).phases["inner"] == 2000 + 10 * 28
    shards = Training(800, 80, 800, ranks=8)
    assert budget(Option(), shards, memory=memory, reserve=0).phases["outer"] == 100 * 48 + 10 * 4
    large = Training(10 * GROUP_NUMEL, 0, GROUP_NUMEL + 3)
    assert Option(offload=True).scratch(large) == (GROUP_NUMEL + 3) * (4 + 2 * 8)


def test_small_copies_are_counted_in_every_phase() -> None:
    """As above, with inner result 4 and fusion 4 in each phase."""
    small, memory = Training(1000, 0, 1000), 10**9
    phases = budget(Option(), small, memory=memory, reserve=0).phases
    assert phases == {"inner": 52_000, "outer": 52_000, "fusion": 48_000}
    offloaded = budget(Option(offload=True), small, memory=memory, reserve=0).phases
    assert (offloaded["inner"], offloaded["outer"]) == (40_000, 40_000)


def test_the_first_option_that_fits_is_chosen() -> None:
    training = Training(10**9, 0, 10**6)
    sizes = [budget(option, training, memory=0, reserve=0).bytes for option in OPTIONS]
    assert [option.exact for option in OPTIONS] == [True] * 4 + [False] * 4
    for number, size in enumerate(sizes):
        before = min(sizes[:number], default=None)
        if before is not None and before <= size:
            continue  # never the first option
        for memory, fits in ((size, True), (size - 1, False)):
            budgets, chosen = choose(training, memory=memory, reserve=0)
            assert budgets[number].fits == fits
            assert (chosen is not None and chosen.option == OPTIONS[number]) == fits
    assert choose(training, memory=min(sizes) - 1, reserve=0)[1] is None


def test_the_command_shows_the_plan(model: Path) -> None:
    found = plan("--model", model, "--device-memory", "1GiB", "--reserve", "1KiB")
    assert found["chosen"] == {}
    assert len(found["options"]) == len(OPTIONS)
    least = min(max(one["bytes"].values()) for one in found["options"])
    tight = plan("--model", model, "--device-memory", f"{least}B", "--reserve", "1KiB")
    assert tight["chosen"]
    shards = plan("--model", model, "--ranks", 4, "--dtype", "float32", "--optimizer", "sgd")
    assert shards["options"][0]["bytes_a_parameter"]["inner optimizer"]["inner"] == 0
    shown = CliRunner().invoke(cli.app, ["plan", "--model", str(model), "--device-memory", "9GiB"])
    assert shown.exit_code == 0
    assert "<- chosen" in shown.stdout
    for row in ("defaults ", "pack_inner: true, ", "offload: true, ", "state_dtype: bfloat16 "):
        assert row in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "there is no /nowhere"),
        (["--model", "{model}", "--device-memory", "much"], "--device-memory must be a size"),
        (["--model", "{model}", "--device-memory", "1KiB"], "nothing fits in"),
        (["--model", "{model}", "--lora-r", "4", "--target-modules", "nope"], "nope"),
        (["--model", "{model}", "--target-modules", "q_proj"], "give their rank with --lora-r"),
        (["--model", "{model}", "--dtype", "int8"], "--dtype must be one of"),
        (["--model", "{model}", "--optimizer", "lion"], "--optimizer must be one of"),
        (["--model", "{bad}"], "does not describe a model that transformers has"),
    ],
)
def test_bad_input_is_one_clear_line(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    bad = model / "bad"
    bad.mkdir()
    (bad / "config.json").write_text('{"model_type": "no such thing"}')
    given = [argument.format(model=model, bad=bad) for argument in arguments]
    monkeypatch.setattr("sys.argv", ["rkif", "plan", *given])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rkif: error: ")
    assert message in error
