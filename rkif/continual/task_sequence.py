"""The loop over a run's tasks: train on each, publish it, and evaluate all tasks after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rkif.continual.config import RunConfig
from rkif.continual.display.progress import RunProgress
from rkif.continual.evaluation.accuracy_table import AccuracyTable, measure
from rkif.continual.evaluation.criteria import hold_out
from rkif.continual.evaluation.evaluate import evaluate
from rkif.continual.evaluation.harness import Harness
from rkif.continual.methods import Context, Sequential
from rkif.continual.models.kept_answers import KeptAnswers
from rkif.continual.models.objective import Objective
from rkif.continual.models.weight_average import WeightAverage
from rkif.continual.rundir.folder import RunFolder
from rkif.continual.rundir.state import RunState
from rkif.continual.rundir.writer import RunWriter
from rkif.continual.tasks.records import Task
from rkif.continual.tasks.replay_memory import ReplayMemory, memory_size
from rkif.continual.tracking import Track, tracked
from rkif.continual.user_metrics import Metric
from rkif.fuser.parameters import parameter_copies, trainable_parameters
from rkif.fuser.state_names import flatten, section
from rkif.ledger.records import parameter_digest

KEPT_ANSWERS = "kept_answers"  # section of the tensors that a task hands on


class TaskSequence:
    """A run's tasks, its model, and the position in the sequence.

    Args:
        config: the run's settings.
        folder: the run's folder.
        method: the class of the config's method.
        tasks: the tasks in the order of learning.
        model: the untrained model; it is trained in place.
        objective: computes the model's loss and answers.
        metrics: the user's metrics by name.
        harness: measures the model on tasks of lm-eval.
        progress: shows the progress.

    Raises:
        ValueError: the gate would set aside all training records of a task, or a task's records differ from
            those at the start of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        method: type[Sequential],
        tasks: Sequence[Task],
        model: nn.Module,
        objective: Objective,
        metrics: Mapping[str, Metric],
        harness: Harness,
        progress: RunProgress,
    ) -> None:
        self._config = config
        self._folder = folder
        self._method = method
        split = [hold_out(task, config) for task in tasks]
        self._tasks = [task for task, _ in split]
        self._held_out = [records for _, records in split]
        self._model = model
        self._objective = objective
        self._metrics = metrics
        self._harness = harness
        self._progress = progress
        self._parameters = trainable_parameters(model)
        self._initial = parameter_copies(self._parameters)
        self._average = WeightAverage(config.ema.decay, self._parameters)
        trainable = sum(parameter.numel() for parameter in self._parameters.values())
        self._table = AccuracyTable(
            config, self._tasks, metrics, harness.tasks.values(), trainable, folder.read_metrics()
        )
        self._table.require_same_data(self._tasks)
        self._track: Track = lambda values, step: None
        self._steps = 0  # number of inner steps in all tasks so far

    def run(self, start: RunState) -> dict[str, Any]:
        """Train from ``start`` to the end of the last task; return the content of ``metrics.json``."""
        with tracked(self._config.tracking, self._folder.path, self._config.model_dump()) as self._track:
            return self._run(start)

    def _run(self, start: RunState) -> dict[str, Any]:
        if start.parameters:
            self.set_parameters(start.parameters)
            self._average.load_tensors(section(start.method, "ema"))
        writer = RunWriter(
            self._folder,
            self._config,
            self._parameters,
            self._model,
            self._objective.tokenizer,
            start.ledger_records,
        )
        if writer.torn_bytes:
            self._progress.warn(
                f"the ledger's last line was incomplete ({writer.torn_bytes} bytes): it was moved to "
                "ledger.jsonl.torn, and its round is repeated"
            )
        if not start.ledger_records:
            writer.record_begin([task.name for task in self._tasks])
            self._warn_of_small_memories()
        if not self._table.begun:
            column, harness = self._measure_all("before training")
            self._table.set_initial(column, harness)
            writer.write_metrics(self._table.content)
            self._track_harness(harness)
        elif not start.ledger_records:
            writer.skip_measured()
        for index in range(len(self._tasks)):
            if index >= start.task:
                from_its_start = RunState(index, 0, 0, start.ledger_records, {}, {})
                self._learn(index, start if index == start.task else from_its_start, writer)
            if self._table.columns <= index:
                self._add_column(index, writer)
            elif index >= start.task - 1:
                writer.skip_measured()
        return self._table.content

    def _learn(self, index: int, start: RunState, writer: RunWriter) -> None:
        """Train on task ``index`` from the state ``start``, and publish it."""
        task, context = self._tasks[index], self.context(index, writer.record)
        memory, validation = context.memory, context.validation
        method = self.method(context, start)
        if method.logs_rounds and len(memory) and not start.step:
            writer.write_round_state(index, 0, 0, self._state({}))
        self._progress.task(index, context.steps, start.step)
        for step in range(start.step, context.steps):
            rounds = writer.rounds
            self._steps = self._table.content["steps"] + step + 1
            loss = method.train_step(step)
            method.end_step(step)
            if (step + 1) % method.period == 0 and step + 1 < context.steps:
                self._average.update(method.period)
            self._progress.advance(loss)
            self._track({"loss": loss}, self._steps)
            if writer.rounds > rounds:
                writer.write_round_state(index, step + 1, method.samples, self._state(method.tensors()))
            if (step + 1) % self._config.checkpoint_every == 0 and step + 1 < context.steps:
                writer.write_checkpoint(index, step + 1, method.samples, self._state(method.tensors()))

        self._progress.stage("saving")
        if method.checkpoint_merge is not None:
            method.checkpoint_merge.finish()
        method.finish()
        self._average.update((context.steps - 1) % method.period + 1)
        memory.add(
            task.name,
            task.instruction,
            task.train,
            fraction=self._config.memory.fraction,
            cap=self._config.memory.cap,
            seed=self._config.seed,
        )
        if held_out := self._held_out[index]:
            validation.add(task.name, task.instruction, held_out, fraction=1.0, seed=self._config.seed)
        kept = KeptAnswers(context.kept_answers, memory)
        if self._config.distillation.keeps_answers:
            kept.add(self._model, self._objective, task.name, memory.by_task[task.name], self._config)
        # Copies: tensors of a method may be the parameters, which have the average's values when published.
        tensors = {
            "importance": parameter_copies(method.importance()),
            "handed_on": parameter_copies({**method.task_state(), **flatten({KEPT_ANSWERS: kept.tensors()})}),
            "rounds": method.rounds(),
        }
        trained = parameter_digest(self._parameters) if self._config.ema.decay else None
        with self._average.published():
            writer.publish_task(
                self._tasks[: index + 1],
                steps=context.steps,
                samples=method.samples,
                tensors=tensors,
                memory=memory,
                validation=validation,
                trained=trained,
            )
        writer.write_checkpoint(index + 1, 0, method.samples, self._state({}))

    def _state(self, method: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The method's tensors and the average's, for a checkpoint."""
        return {**method, **flatten({"ema": self._average.tensors()})}

    def context(self, index: int, record: Callable[[Mapping[str, Any]], None]) -> Context:
        """The inputs of a method for task ``index``; ``record`` appends its ledger records."""
        previous = (index - 1, self._tasks[index - 1].name)
        handed_on = self._folder.read_task_state(*previous) if index else {}
        kept = section(handed_on, KEPT_ANSWERS)
        return Context(
            self._config,
            self._model,
            self._objective,
            self._tasks,
            index,
            memory=self._folder.read_memory(*previous) if index else ReplayMemory(),
            validation=self._folder.read_validation(*previous) if index else ReplayMemory(),
            harness=self._harness,
            previous_task_state={
                name: tensor for name, tensor in handed_on.items() if not name.startswith(f"{KEPT_ANSWERS}.")
            },
            kept_answers=kept,
            initial=self._initial,
            record=record,
            track=lambda values: self._track(
                {f"rkif/{name}": value for name, value in values.items()}, self._steps
            ),
        )

    def method(self, context: Context, start: RunState) -> Sequential:
        """The method in the state ``start``. The parameters are not set: see :meth:`set_parameters`."""
        method = self._method(context)
        if start.step:
            method.load_tensors(start.method)
            method.samples = start.samples
        else:
            method.begin()
        return method

    @torch.no_grad()
    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the trainable parameters.

        Raises:
            ValueError: the names are not those of the trainable parameters.
        """
        if set(values) != set(self._parameters):
            raise ValueError("the checkpoint is of a model with other trainable parameters")
        for name, value in values.items():
            self._parameters[name].copy_(value)

    def _add_column(self, index: int, writer: RunWriter) -> None:
        """Evaluate all tasks after task ``index``, and write ``metrics.json``."""
        column, harness = self._measure_all(f"after {self._tasks[index].name}")
        summaries = [self._folder.read_task(i, self._tasks[i].name) for i in range(index + 1)]
        self._table.add(
            column,
            harness,
            task_aware=self._method.task_aware,
            steps=sum(summary["steps"] for summary in summaries),
            samples=sum(summary["samples"] for summary in summaries),
        )
        if index + 1 == len(self._tasks):
            self._table.summarise(sequential=self._method.sequential)
        writer.write_metrics(self._table.content)
        self._progress.measured(index, self._table.content)
        content = self._table.content
        named = zip(content["tasks"], content["accuracy"], strict=True)
        values = {f"accuracy/{task}": row[index] for task, row in named}
        values |= {key: content[key] for key in ("op", "bwt", "fwt") if content[key] is not None}
        self._track(values, content["steps"])
        self._track_harness(harness)

    def _track_harness(self, harness: Mapping[str, float]) -> None:
        if harness:
            values = {f"harness/{name}": value for name, value in harness.items()}
            self._track(values, self._table.content["steps"])

    def _measure_all(self, when: str) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Accuracy and the user's metrics on every task, and the values of the tasks of lm-eval."""
        self._progress.evaluating(when, len(self._tasks) + len(self._harness.tasks))

        def evaluate_task(task: Task) -> dict[str, float]:
            values = evaluate(self._model, self._objective, task, self._config, self._metrics)
            self._progress.evaluated()
            return values

        with self._average.published():
            column, harness = measure(self._tasks, self._metrics, evaluate_task), {}
            for name in self._harness.tasks:
                harness[name] = self._harness.measure(name)
                self._progress.evaluated()
        return column, harness

    def _warn_of_small_memories(self) -> None:
        """Warn if the memory has fewer records than labels of a task; that of the last task is not used."""
        if not self._method.replays:
            return
        fraction, cap = self._config.memory.fraction, self._config.memory.cap
        sizes = [(task, memory_size(len(task.train), fraction, cap)) for task in self._tasks[:-1]]
        small = [f"{task.name} ({n} for {len(task.labels)})" for task, n in sizes if n < len(task.labels)]
        if small:
            limits = f"memory.fraction {fraction}" + ("" if cap is None else f" and memory.cap {cap}")
            self._progress.warn(f"{limits}: the memory has fewer records than labels of {', '.join(small)}")
