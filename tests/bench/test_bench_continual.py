"""The suite that compares methods: its runs, rows and tables."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from bench_rows import continual_row as row
from rich.console import Console
from run_inputs import TASKS, make_config
from typer.testing import CliRunner

from bench.__main__ import app
from bench.common import rows
from bench.forgetting import continual
from bench.forgetting import tables as continual_tables
from bench.forgetting.continual import MAIN, SUITES, Job, compare
from bench.forgetting.instrument import CONFIGS, seconds_by_part
from rkif.config import FusionConfig, merge_weights
from rkif.continual.config import RunConfig, load_config
from rkif.continual.config_fusion import fusion_config
from rkif.continual.methods import METHODS

VARIANTS = yaml.safe_load((CONFIGS / "variants.yaml").read_text())


def test_a_config_accepts_every_method_and_the_results_describe_it() -> None:
    settings = load_config(sorted(CONFIGS.glob("*-*.yaml"))[0]).model_dump()
    for method in METHODS:
        assert RunConfig.model_validate(settings | {"method": method}).method == method
    page = (Path(__file__).parents[2] / "docs" / "results" / "continual.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert described == list(METHODS)


def test_ablations_of_the_preset_rkif_change_one_part() -> None:
    """Those with their settings written out, too."""

    def of(variant: str) -> RunConfig:
        return Job(CONFIGS / "standard-minilm.yaml", "standard", "standard-1", variant, 1, Path()).settings()

    preset, fixed = of("rkif"), of("rkif_weights_1")
    named = load_config(CONFIGS / "standard-minilm.yaml", ["method=recurrent_kif", "fusion.preset=rkif"])
    assert (fusion_config(preset.fusion), preset.distillation) == (FusionConfig.rkif(), named.distillation)
    weights = {
        "rkif_no_memory_distillation": (0.0, 4.0),
        "rkif_no_inputs_distillation": (4.0, 0.0),
        "rkif_no_distillation": (0.0, 0.0),
        "rkif_weights_1": (1.0, 1.0),
    }
    for name, expected in weights.items():
        assert (of(name).distillation.memory, of(name).distillation.inputs) == expected
        if name != "rkif_weights_1":
            assert of(name).fusion == preset.fusion
    assert merge_weights(fusion_config(fixed.fusion).rule) == merge_weights("sum")
    assert replace(fusion_config(fixed.fusion), rule="sum") == fusion_config(preset.fusion)
    for name, whole in (("rkif", preset), ("rkif_weights_1", fixed)):
        without = of(f"{name}_no_identification")
        assert without.distillation == whole.distillation
        rule = fusion_config(without.fusion).rule
        assert set(merge_weights(rule).cases) == {(1.0, 1.0)}
        assert replace(fusion_config(without.fusion), rule="sum") == fusion_config(preset.fusion)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-*.yaml")), ids=lambda path: path.stem)
def test_every_committed_config_and_variant_is_valid(path: Path) -> None:
    order = load_config(path).tasks.order
    assert order in SUITES[max((suite for suite in SUITES if path.stem.startswith(suite)), key=len)]
    presets = {"recurrent_kif_paper": FusionConfig.paper(), "recurrent_kif_release": FusionConfig.release()}
    for method in [*MAIN, *VARIANTS]:
        settings = Job(path, "standard", "standard-3", method, 7, Path("out")).settings()
        assert (settings.tasks.order, settings.seed) == ("standard-3", 7), method
        if method in presets:
            assert fusion_config(settings.fusion) == presets[method]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-*.yaml")), ids=lambda path: path.stem)
def test_every_committed_row_has_the_settings_that_its_name_has_now(path: Path) -> None:
    """A variant that is changed needs another name, or new runs."""
    for found in continual.rows():
        if found.get("config") == path.stem:
            names = (found[key] for key in ("suite", "order", "method", "seed"))
            job = Job(path, *names, Path(), found["rate"])
            assert continual._settings(found, job.settings()) == job.settings(), found["method"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-*.yaml")), ids=lambda path: path.stem)
def test_variants_change_what_they_name(path: Path) -> None:
    base = Job(path, "standard", "standard-1", "recurrent_kif_release", 1, Path())
    inner, outer = base.settings().training.learning_rate, base.settings().outer.learning_rate
    seen = {base.settings().model_dump_json()}
    for name in VARIANTS:
        if name not in MAIN:
            settings = Job(base.config, base.suite, base.order, name, 1, base.out).settings()
            dump = settings.model_dump_json()
            assert dump not in seen, name
            seen.add(dump)
            factor = {"half": 0.5, "double": 2.0}.get(name.rpartition("_")[2], 1.0)
            wanted = inner if name.startswith("outer") else factor * inner
            assert settings.training.learning_rate == pytest.approx(wanted)
            wanted = factor * outer if name.startswith(("outer", "both_rates")) else outer
            assert settings.outer.learning_rate == pytest.approx(wanted)


@pytest.fixture
def job(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(continual, "RESULTS", tmp_path / "rows.jsonl")
    config = make_config(inputs, tasks={"folder": str(inputs / "tasks"), "order": "demo"})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return Job(tmp_path / "tiny.yaml", "demo", "demo", "recurrent_kif", 1, tmp_path / "runs")


def test_a_suite_writes_rows_and_repeats_no_run(job: Job, tmp_path: Path) -> None:
    other = Job(job.config, job.suite, job.order, "sequential", 2, job.out)
    shown = Console(file=io.StringIO())
    compare([job, other], 1, shown)
    rows = continual.rows()
    assert [(row["method"], row["seed"]) for row in rows] == [("recurrent_kif", 1), ("sequential", 2)]
    fused, plain = rows
    keys = {"suite", "order", "method", "seed", "op", "bwt", "fwt", "samples", "steps", "wall_s", "model"}
    assert keys | {"trainable", "split", "device", "commit"} <= set(fused)
    assert 0 < fused["rkif_share"] < 1
    assert plain["rkif_share"] is None
    assert fused["peak_mib"] > 100
    assert fused["cpu_s"] > 0
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    compare([job, other], 1, shown)
    assert "2 of 2 runs have been done" in shown.file.getvalue()
    after = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(before) == len(after)
    # The same run with other settings replaces the row.
    job.config.write_text(job.config.read_text().replace("steps: 7", "steps: 5"))
    again = Job(job.config, job.suite, job.order, "sequential", 2, tmp_path / "again", timed=False)
    compare([again], 1, shown)
    untimed = continual.rows()[1]
    assert (plain["wall_s"] > 0, untimed["wall_s"]) == (True, None)
    assert untimed["cpu_s"] > 0
    assert untimed["peak_mib"] > 100
    assert [(row["method"], row["steps"]) for row in continual.rows()] == [
        ("recurrent_kif", fused["steps"]),
        ("sequential", 5 * len(fused["tasks"])),
    ]
    assert TASKS[0] in fused["tasks"]


def test_a_failed_run_does_not_stop_the_others(job: Job, tmp_path: Path) -> None:
    out = Job(job.config, job.suite, job.order, "sequential", 3, job.out)
    out.folder.mkdir(parents=True)
    (out.folder / "something").touch()  # no run
    with (
        (tmp_path / "shown").open("w") as file,
        pytest.raises(
            ValueError, match="1 of 2 runs failed, the first: demo sequential rate 1 seed 3: ValueError"
        ),
    ):
        compare([out, Job(job.config, job.suite, job.order, "sequential", 4, job.out)], 1, Console(file=file))
    assert [row["seed"] for row in continual.rows()] == [4]


@pytest.mark.parametrize("change", ["dev_limit", "model", "steps", "none"])
def test_a_row_is_identified_by_settings_data_and_model(job: Job, tmp_path: Path, change: str) -> None:
    content = yaml.safe_load(job.config.read_text())
    config = job.settings()
    rows.write_all(
        continual.RESULTS,
        [
            {
                "config": job.config.stem,
                "order": job.order,
                "method": job.method,
                "rate": job.rate,
                "seed": job.seed,
                "model": Path(config.model).name,
                "settings": config.model_dump(mode="json", exclude={**continual.NAMED, "ewc": True}),
            }
        ],
    )
    if change == "dev_limit":
        content["tasks"]["dev_limit"] = 3
    if change == "steps":
        content["training"]["steps"] += 1
    if change == "model":
        content["model"] = content["model"].replace("model", "t5")
    job.config.write_text(yaml.safe_dump(content))
    assert continual._has_row(job) == (change == "none")


def test_runs_of_a_busy_machine_have_their_cpu_time_in_a_column_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row("replay", "s-1", 1, 60.0, cpu_s=120.0),
        row("recurrent_kif", "s-1", 1, 63.0, cpu_s=150.0, wall_s=None),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    monkeypatch.setattr(continual, "RESULTS", tmp_path / "rows.jsonl")
    text = continual_tables.everything()
    assert "| runs | minutes | CPU minutes | peak MiB | in rkif |" in text
    assert "| 1 | 1.5 | 2.0 | 512 | - |" in text
    assert "| 1 | - | 2.5 | 512 | - |" in text


def test_tables_are_means_and_paired_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row("replay", "s-1", 1, 60.0),
        row("replay", "s-2", 1, 64.0),
        row("recurrent_kif", "s-1", 1, 63.0, rkif_share=0.0123),
        row("recurrent_kif", "s-2", 1, 65.0, rkif_share=0.0123),
        row("recurrent_kif_release", "s-1", 1, 63.0),
        row("replay_rate_half", "s-1", 1, 65.0),
        row("density_0", "s-1", 1, 60.5),
        row("replay", "s-1", 1, 50.0, adapter=None, config="s-full"),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    monkeypatch.setattr(continual, "RESULTS", tmp_path / "rows.jsonl")
    text = continual_tables.everything()
    assert "| replay | 62.0 ± 2.8 | +2.0 ± 2.8 | +1.0 ± 0.0 | - | - | 1,000 | 2 | 1.5 | 512 | - |" in text
    release = "| recurrent_kif | 64.0 ± 1.4 | +4.0 ± 1.4 | +1.0 ± 0.0 | +2.0 ± 1.0 | +2.0 ± 1.0 | 1,000 | 2 |"
    assert f"{release} 1.5 | 512 | 1.2% |" in text
    heading = "m, 2 tasks (s-1, s-2), 3 steps of 2 a task, LoRA of rank 4, float32, seed 1, 200 dev records"
    assert f"{heading}, on d, at 0123456." in text
    assert "m, 2 tasks (s-1), 3 steps of 2 a task, all parameters, float32, seed 1, 200 dev records" in text
    # sqrt(2 * 60 * 40 / 100) / 2
    assert "about 3.5 points" in text
    assert "| density_0 | 60.5 | +0.5 | -2.5 | -2.5 | 1,000 | 1 |" in continual_tables.ablations()
    assert "recurrent_kif_release" not in text  # the default has a row of its own
    tuned = continual_tables.tuned()
    assert "| replay_rate_half | 65.0 | +5.0 | +1.0 | +5.0 | +5.0 | 1,000 | 1 |" in tuned
    assert "density_0" not in tuned
    assert "replay_rate_half" not in continual_tables.ablations()


def test_an_invalid_suite_is_refused_before_any_run(tmp_path: Path) -> None:
    failed = CliRunner().invoke(app, ["continual", "--suite", "short"])
    assert "--suite must be one of standard, long, paper-standard, paper-long; got 'short'" in str(
        failed.exception
    )
    failed = CliRunner().invoke(app, ["continual", "--method", "magic", "--out", str(tmp_path / "runs")])
    assert "no such method or variant: 'magic'" in str(failed.exception)
    assert not (tmp_path / "runs").exists()


def test_a_timed_part_is_without_the_parts_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 10.0])  # outer begins, inner begins, inner ends, outer ends
    monkeypatch.setattr("bench.forgetting.instrument.time.perf_counter", lambda: next(clock))

    class Method:
        def outer(self) -> None:
            self.inner()

        def inner(self) -> None: ...

    with seconds_by_part(((Method, "outer", "steps"), (Method, "inner", "ledger"))) as spent:
        Method().outer()
    assert spent == {"steps": 8.0, "ledger": 2.0}
