"""A task sequence end to end: real small models, every method, killed and resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

import rkif
from rkif.continual.config import RunConfig, load_config
from rkif.continual.methods import METHODS, Context, RecurrentKIF
from rkif.continual.model import build
from rkif.continual.progress import RunProgress
from rkif.continual.run import run
from rkif.continual.tasks import load_tasks
from rkif.demo import write_inputs
from rkif.memory import ReplayMemory

TASKS = ["review", "tense", "place"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small tasks, a small Llama and a small T5."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, train=40, dev=8, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    return folder


@pytest.fixture
def config(inputs: Path) -> Callable[..., RunConfig]:
    """Makes configs; keywords change single settings."""

    def make(**changes: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "model": str(inputs / "model"),
            "adapter": {"r": 4, "dropout": 0.1},
            "tasks": {"folder": str(inputs / "tasks"), "order": TASKS},
            "text": {"max_length": 64},
            "method": "recurrent_kif",
            "fusion": {"inner_steps": 3, "outer_steps": 2},
            "training": {"steps": 7, "batch_size": 4, "learning_rate": 1e-2},
            "outer": {"batch_size": 4, "learning_rate": 1e-2},
            "memory": {"fraction": 0.1},
            "checkpoint_every": 2,
            "threads": 1,
            "seed": 3,
        }
        return RunConfig.model_validate(settings | changes)

    return make


def go(config: RunConfig, out: Path, *, resume: bool = False) -> dict[str, Any]:
    with open(os.devnull, "w") as nowhere:
        return run(config, out, resume=resume, progress=RunProgress(Console(file=nowhere)))


def files(folder: Path) -> dict[str, bytes]:
    """What a run left, byte for byte, but for peft's files: it lists modules in another order each time."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in [name for name in found if name.endswith("adapter_config.json")]:
        settings = json.loads(found[name])
        settings["target_modules"].sort()
        found[name] = json.dumps(settings, sort_keys=True).encode()
    return {name: content for name, content in found.items() if not name.endswith("README.md")}


def assert_same_files(got: dict[str, bytes], expected: dict[str, bytes], when: str = "") -> None:
    assert set(got) == set(expected), when
    assert [name for name in expected if got[name] != expected[name]] == [], when


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_whole_run(
    config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    metrics = go(config(method=method), tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    accuracy = metrics["accuracy"]
    assert [len(row) for row in accuracy] == [3, 3, 3]
    assert metrics["op"] == pytest.approx(sum(row[-1] for row in accuracy) / 3)
    assert metrics["bwt"] == pytest.approx(sum(accuracy[i][-1] - accuracy[i][i] for i in range(2)) / 2)
    assert metrics["fwt"] == pytest.approx(
        sum(accuracy[i][i - 1] - metrics["initial"][i] for i in (1, 2)) / 2
    )
    assert metrics["steps"] == 21
    assert load_config(tmp_path / "config.yaml").method == method
    for index, task in enumerate(TASKS):
        folder = tmp_path / "tasks" / f"{index + 1:02d}-{task}"
        memory = ReplayMemory.load(folder / "memory.jsonl")
        assert {name: len(ids) for name, ids in memory.ids.items()} == dict.fromkeys(TASKS[: index + 1], 4)
        assert (folder / "importance.safetensors").exists() == (method == "recurrent_kif" and index > 0)
    assert not list(tmp_path.rglob("*.tmp"))


def test_replay_and_recurrent_kif_see_the_same_number_of_samples(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    training = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2}  # two full rounds: Q = 3, M = 2
    seen = {
        method: go(config(method=method, training=training), tmp_path / method)["samples"]
        for method in METHODS
    }
    # 3 tasks of 6 steps of 4; two of them with 2 rounds of 2 outer steps of 4 memory records
    assert seen == {"sequential": 72, "replay": 72 + 32, "recurrent_kif": 72 + 32}


def test_adapters_reload_to_the_same_logits_and_are_what_the_next_task_starts_from(
    config: Callable[..., RunConfig], inputs: Path, tmp_path: Path
) -> None:
    """The released code saves empty adapters, silently: each task then starts from none."""
    settings = config()
    go(settings, tmp_path)
    tokens = torch.arange(3, 23)[None]
    logits = []
    for index, task in enumerate(TASKS):
        folder = tmp_path / "tasks" / f"{index + 1:02d}-{task}"
        saved = load_file(folder / "adapter_model.safetensors")
        assert len(saved) == 8  # 2 layers, q and v, A and B
        assert all(tensor.norm() > 0 for tensor in saved.values())
        base = AutoModelForCausalLM.from_pretrained(inputs / "model")
        reloaded = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            logits.append(reloaded(input_ids=tokens).logits)
        if index + 1 == len(TASKS):
            last = read_parameters(tmp_path)
            names = {n: p for n, p in reloaded.named_parameters() if "lora_" in n}
            assert set(names) == set(last)
            assert all(torch.equal(names[name], last[name]) for name in last)
    assert not torch.equal(logits[0], logits[1])

    # Task by task by hand: after task 1 the run's parameters are the file's, byte for byte.
    model, encoder = build(settings)
    tasks = load_tasks(inputs / "tasks", TASKS)
    first = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(inputs / "model"), tmp_path / "tasks" / "01-review"
    )
    method = METHODS["recurrent_kif"](Context(settings, model, encoder, tasks[0], ReplayMemory()))
    for step in range(7):
        method.train_step(step)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(input_ids=tokens).logits, first.eval()(input_ids=tokens).logits)
    assert torch.equal(model(input_ids=tokens).logits, logits[0])


def read_parameters(folder: Path) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "checkpoint.safetensors")
    return {n.removeprefix("parameters."): t for n, t in stored.items() if n.startswith("parameters.")}


class Killed(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a kill."""


def kill_after(monkeypatch: pytest.MonkeyPatch, events: int) -> list[int]:
    """Die at the given event: every rename, before and after it, and every training step is one."""
    count = [0]
    rename = os.replace

    def tick() -> None:
        count[0] += 1
        if count[0] == events:
            raise Killed

    def dying_rename(*args: Any) -> None:
        tick()
        rename(*args)
        tick()

    monkeypatch.setattr(os, "replace", dying_rename)
    advance = RunProgress.advance

    def dying_advance(self: RunProgress, loss: float) -> None:
        advance(self, loss)
        tick()

    monkeypatch.setattr(RunProgress, "advance", dying_advance)
    return count


def test_killed_at_any_event_and_resumed_ends_with_the_same_bytes(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    settings = config(tasks=config().tasks.model_dump() | {"order": TASKS[:2]})
    with pytest.MonkeyPatch.context() as patch:
        count = kill_after(patch, -1)
        go(settings, tmp_path / "straight")
    expected = files(tmp_path / "straight")
    assert count[0] > 40
    for event in range(1, count[0] + 1):
        out = tmp_path / f"{event}"
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, event)
            with pytest.raises(Killed):
                go(settings, out)
        go(settings, out, resume=True)
        assert_same_files(files(out), expected, f"killed at event {event}")
        shutil.rmtree(out)


def test_killed_again_and_again(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Every resumption dies a little later; none may lose or repeat a step."""
    settings = config(tasks=config().tasks.model_dump() | {"order": TASKS[:2]})
    go(settings, tmp_path / "straight")
    out = tmp_path / "killed"
    for attempt in range(60):
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, 5 + attempt % 7)
            try:
                go(settings, out, resume=attempt > 0)
                break
            except Killed:
                pass
    else:
        pytest.fail("sixty lives were not enough")
    assert attempt > 3
    assert_same_files(files(out), files(tmp_path / "straight"))


def test_killed_by_the_system(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The real thing: SIGKILL to the command, wherever it happens to be."""
    settings = config(training={"steps": 12, "batch_size": 4, "learning_rate": 1e-2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    go(settings, tmp_path / "straight")
    command = [
        sys.executable,
        "-m",
        "rkif",
        "run",
        str(tmp_path / "config.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_files(files(tmp_path / "out"), files(tmp_path / "straight"))


def test_old_training_data_need_not_stay(
    config: Callable[..., RunConfig], inputs: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(inputs / "tasks", data)
    settings = config(tasks={"folder": str(data), "order": TASKS})
    go(settings, tmp_path / "straight")

    out = tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        steps = [0]

        def stop(self: RunProgress, loss: float) -> None:
            steps[0] += 1
            if steps[0] == 10:  # in the second task
                raise Killed

        patch.setattr(RunProgress, "advance", stop)
        with pytest.raises(Killed):
            go(settings, out)
    train = data / "train.jsonl"
    lines = [line for line in train.read_text().splitlines(keepends=True) if '"task": "review"' not in line]
    train.write_text("".join(lines))
    go(settings, out, resume=True)
    assert_same_files(files(out), files(tmp_path / "straight"))


def test_a_finished_run_is_only_read(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    metrics = go(config(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert go(config(), tmp_path, resume=True) == metrics
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_all_parameters_of_a_model_can_be_trained(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    go(config(adapter=None), tmp_path)
    last = read_parameters(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tasks" / "03-place")
    assert all(torch.equal(p, last[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("scoring", ["likelihood", "generation"])
def test_seq2seq_models(config: Callable[..., RunConfig], inputs: Path, tmp_path: Path, scoring: str) -> None:
    settings = config(
        model=str(inputs / "t5"),
        architecture="seq2seq",
        adapter={"r": 4, "target_modules": ["q", "v"]},
        text={"max_length": 64, "target": "{output}"},
        evaluation={"scoring": scoring, "max_new_tokens": 3},
    )
    go(settings, tmp_path)
    base = AutoModelForSeq2SeqLM.from_pretrained(inputs / "t5")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "tasks" / "03-place")
    last = read_parameters(tmp_path)
    assert last
    assert all(torch.equal(p, last[n]) for n, p in reloaded.named_parameters() if n in last)


def one_task(settings: RunConfig, inputs: Path) -> RecurrentKIF:
    """Recurrent-KIF at the start of its second task."""
    tasks = load_tasks(inputs / "tasks", TASKS)
    memory = ReplayMemory()
    memory.add(TASKS[0], tasks[0].instruction, tasks[0].train, fraction=0.1, seed=0)
    model, encoder = build(settings)
    return RecurrentKIF(Context(settings, model, encoder, tasks[1], memory))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_outer_learner_moves_by_its_own_learning_rate(
    config: Callable[..., RunConfig], inputs: Path, precision: str
) -> None:
    """In the released code the outer optimizer is never stepped, or at rate zero: nothing depends on it."""
    norms = {}
    for rate in (1e-3, 1e-2):
        method = one_task(config(precision=precision, outer={"learning_rate": rate}), inputs)
        for step in range(3):
            method.train_step(step)
        assert method.fuser is not None
        report = method.fuser.last_report
        assert report is not None
        norms[rate] = report.norms
    assert norms[1e-3]["inner"] == norms[1e-2]["inner"]
    # Adam's first steps are as long as the rate says.
    assert norms[1e-2]["outer"] / norms[1e-3]["outer"] == pytest.approx(10, rel=0.2)


def test_the_last_round_of_a_task_is_fused_too(config: Callable[..., RunConfig], inputs: Path) -> None:
    method = one_task(config(), inputs)
    rounds = []
    assert method.fuser is not None
    for step in range(7):  # Q = 3: rounds end after steps 3, 6 and, with one step, 7
        method.train_step(step)
        rounds.append(method.fuser.round)
    assert rounds == [0, 0, 1, 1, 1, 2, 3]


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_micro_batches_give_the_gradient_of_the_batch(
    config: Callable[..., RunConfig], inputs: Path, architecture: str
) -> None:
    """Answers differ in length, so the mean over the batch's tokens is not the mean of micro-batch means."""
    gradients = []
    for size in (None, 3, 1):
        settings = config(
            model=str(inputs / ("model" if architecture == "llama" else "t5")),
            architecture="causal" if architecture == "llama" else "seq2seq",
            adapter=None,
            training={"steps": 1, "micro_batch_size": size, "max_grad_norm": 1e9},
        )
        method = one_task(settings, inputs)
        items = method.batch(0)
        items = [
            (text, type(r)(r.task, r.id, r.input, f"{r.output} " * (i + 1)))
            for i, (text, r) in enumerate(items)
        ]
        parameters = list(method.context.model.parameters())
        method.context.model.eval()
        kept: list[torch.Tensor] = []
        method.inner.step(
            items,
            lr_fraction=1.0,
            seed=0,
            before_step=lambda kept=kept, ps=parameters: kept.extend(p.grad.clone() for p in ps),
        )
        gradients.append(torch.cat([g.flatten() for g in kept]))
    assert gradients[0].norm() > 0
    tolerance = 1e-5 * gradients[0].abs().max().item()
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=tolerance)


def test_gradient_checkpointing_gives_the_same_bits(config: Callable[..., RunConfig], inputs: Path) -> None:
    weights = []
    for checkpointing in (False, True):
        training = {"steps": 7, "gradient_checkpointing": checkpointing}
        method = one_task(config(training=training), inputs)
        for step in range(4):
            method.train_step(step)
        weights.append([p.detach().clone() for p in method.context.model.parameters()])
    assert all(map(torch.equal, *weights))


def test_the_schedule_warms_up_and_never_reaches_zero(config: Callable[..., RunConfig], inputs: Path) -> None:
    method = one_task(config(training={"steps": 10, "warmup_steps": 4}), inputs)
    fractions = [method.lr_fraction(step) for step in range(10)]
    assert fractions == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_epochs_are_rounded_up_to_steps(config: Callable[..., RunConfig], inputs: Path) -> None:
    for epochs, steps in ((1, 14), (0.1, 2), (2.5, 34)):  # 40 records in batches of 3
        method = one_task(config(training={"epochs": epochs, "batch_size": 3}), inputs)
        assert method.context.steps == steps == math.ceil(epochs * 40 / 3)


def test_every_record_is_seen_once_an_epoch(config: Callable[..., RunConfig], inputs: Path) -> None:
    method = one_task(config(training={"steps": 9, "batch_size": 10}), inputs)
    epochs = [[r.id for step in range(4 * e, 4 * e + 4) for _, r in method.batch(step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(r.id for r in method.context.task.train)
    assert epochs[0] != epochs[1]


def test_learning_a_task_works(config: Callable[..., RunConfig], inputs: Path, tmp_path: Path) -> None:
    """Not how well: that the loss of what is trained on falls to nearly nothing."""
    settings = config(adapter=None, training={"steps": 60, "batch_size": 8, "learning_rate": 3e-3})
    method = one_task(settings, inputs)
    losses = [method.inner.step(method.batch(0), lr_fraction=1.0, seed=step) for step in range(60)]
    assert losses[0] > 1
    assert losses[-1] < 0.05


def test_tokenizer_of_the_inputs_knows_the_answers(inputs: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    assert (
        tokenizer.unk_token_id not in tokenizer("good bad past present future kitchen Answer:")["input_ids"]
    )


def test_recurrent_kif_is_a_plain_loop_with_a_fuser(config: Callable[..., RunConfig], inputs: Path) -> None:
    """Seven steps against the same written out: batches, rates, clipping, optimizers, rounds."""
    settings = config(
        training={"steps": 7, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1,
                  "max_grad_norm": 0.5},
        outer={"batch_size": 3, "learning_rate": 3e-2},
        fusion={"preset": "paper", "density": 0.3, "inner_steps": 3, "outer_steps": 2, "scope": "tensor"},
    )  # fmt: skip
    method = one_task(settings, inputs)
    plain = one_task(settings, inputs).context
    model, parameters = plain.model, [p for p in plain.model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    outer = torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.1)
    fuser = rkif.Fuser(model, rkif.FusionConfig.paper(density=0.3, scope="tensor"))
    norms = []

    def step(optimizer: torch.optim.Optimizer, items: Any, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        model.train()
        model(**plain.encoder.training_batch(items)).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.5).item())
        fuser.observe()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

    fractions = [1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4, 0.2]
    walk = 0
    for index, fraction in enumerate(fractions):
        step(inner, method.batch(index), 1e-2 * fraction, method.seed("inner", index))
        if index in (2, 5, 6):
            with fuser.outer():
                for _ in range(2):
                    items = plain.memory.batch(walk, 3, seed=method.seed("memory"))
                    step(outer, items, 3e-2 * fraction, method.seed("outer", walk))
                    walk += 1
        method.train_step(index)
    assert max(norms) > 0.5 > 0  # the clipping did something
    trained = [p for p in method.context.model.parameters() if p.requires_grad]
    assert all(map(torch.equal, trained, parameters))
    assert method.samples == 7 * 4 + 6 * 3
    scores = fuser.scores("outer")
    assert all(torch.equal(method.importance()[name], scores[name]) for name in scores)


def test_replay_mixes_the_memory_into_every_batch(config: Callable[..., RunConfig], inputs: Path) -> None:
    settings = config(fusion={"inner_steps": 3, "outer_steps": 2}, outer={"batch_size": 4})
    context = one_task(settings, inputs).context
    replay = METHODS["replay"](context)
    batches = [replay.batch(step) for step in range(6)]
    remembered = [item for items in batches for item in items[4:]]
    assert [len(items) for items in batches] == [6, 7, 7] * 2  # 8 memory records in 3 steps
    assert {record.task for _, record in remembered} == {TASKS[0]}
    assert sorted(record.id for _, record in remembered[:4]) == sorted(context.memory.ids[TASKS[0]])
    assert all(record.task == TASKS[1] for items in batches for _, record in items[:4])


def test_dropout_differs_from_step_to_step(config: Callable[..., RunConfig], inputs: Path) -> None:
    method = one_task(config(adapter={"r": 4, "dropout": 0.5}), inputs)
    items = method.batch(0)
    seeds = [method.seed("inner", 0), method.seed("inner", 1), method.seed("outer", 0)]
    assert len(set(seeds)) == 3
    for _ in range(2):  # B starts at zero: dropout has no effect before it has moved
        method.inner.step(items, lr_fraction=1.0, seed=0)
    losses = [method.inner.step(items, lr_fraction=0.0, seed=seed) for seed in (*seeds, seeds[0])]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_autocast_changes_what_is_computed(config: Callable[..., RunConfig], inputs: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        method = one_task(config(precision=precision, adapter=None), inputs)
        losses[precision] = method.inner.step(method.batch(0), lr_fraction=1.0, seed=0)
        assert all(p.dtype == torch.float32 for p in method.context.model.parameters())
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.02)


def test_limits_of_tasks_and_memory_are_kept(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    tasks = config().tasks.model_dump() | {"train_limit": 20, "dev_limit": 6}
    metrics = go(config(tasks=tasks, memory={"fraction": 0.5, "cap": 3}), tmp_path)
    assert metrics["records"] == [6, 6, 6]
    memory = ReplayMemory.load(tmp_path / "tasks" / "03-place" / "memory.jsonl")
    assert {task: len(ids) for task, ids in memory.ids.items()} == dict.fromkeys(TASKS, 3)
