"""The YAML file that describes a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    ByteSize,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from rkif.config import stored_settings
from rkif.continual.config_base import Settings
from rkif.continual.config_errors import settings_problems
from rkif.continual.config_evaluation import GATE_METRICS, EvaluationSettings, GateSettings, require_function
from rkif.continual.config_file import locate_model, read_settings
from rkif.continual.config_fusion import RKIF_DISTILLATION, fusion_config
from rkif.continual.spelling import did_you_mean
from rkif.continual.tasks.records import require_task_name
from rkif.continual.tasks.text import TextFormat
from rkif.continual.tracking import Tracker
from rkif.continual.user_metrics import locate, metric_name


class AdapterSettings(Settings):
    """LoRA (Hu et al., 2021), through peft."""

    r: int = Field(8, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = Field(["q_proj", "v_proj"])


class TaskSettings(Settings):
    """The tasks' folder and their order. The limits are maximum record counts per task."""

    folder: str
    order: str | list[Annotated[str, AfterValidator(require_task_name)]]
    train_limit: int | None = Field(None, ge=1)
    dev_limit: int | None = Field(None, ge=1)


class TextSettings(Settings):
    """How records become tokens. The middle of a prompt is cut to fit ``max_length`` tokens."""

    max_length: int = Field(512, ge=32)
    prompt: str = TextFormat.prompt
    target: str = TextFormat.target

    @model_validator(mode="after")
    def _templates(self) -> TextSettings:
        TextFormat(self.prompt, self.target)
        return self


class TrainingSettings(Settings):
    """The inner learner: its length in ``steps`` or in ``epochs`` per task, and its AdamW.

    ``schedule`` of the learning rate: "linear" rises over ``warmup_steps`` and then falls to the end of each
    task. "constant" rises in the first task only, and then stays constant.
    """

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(8, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["linear", "constant"] = "linear"
    # For both learners: torch.optim.AdamW, or rkif.optim.AdamW, whose step also updates the importance.
    optimizer: Literal["adamw", "rkif_adamw"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSettings:
        if (self.steps is None) == (self.epochs is None):
            got = "neither" if self.steps is None else f"steps {self.steps} and epochs {self.epochs}"
            raise ValueError(f"give either steps or epochs; got {got}")
        return self


class OuterSettings(Settings):
    """The outer learner: a second AdamW, on the replay memory, with the inner learner's schedule."""

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(8, ge=1)


class MemorySettings(Settings):
    """The fraction of each task's training records in the replay memory, and their maximum number."""

    fraction: float = Field(0.02, gt=0, le=1)
    cap: int | None = Field(None, ge=1)


class RoundsSettings(Settings):
    """The recurrent loop; the numbers of steps are settings of ``fusion``.

    ``observe``: whether importance is updated before the optimizer step, or after it with the new weights and
    the old gradient. ``optimizers``: whether both learners keep or reset their moments after a fusion.
    """

    observe: Literal["before", "after"] = "before"
    optimizers: Literal["keep", "reset"] = "keep"


class RoundStateSettings(Settings):
    """``budget``: disk space for the states after rounds, such as 500MB; 0 keeps none.

    See :mod:`rkif.continual.rundir.round_states`.
    """

    budget: ByteSize = ByteSize(2**30)


class DistillationSettings(Settings):
    """Terms of the loss that preserve the answers of the model before the task.

    ``memory``: weight of the divergence on memory records. ``answers``: whether their answers are computed by
    the model before the new task, or kept from the end of their own task. ``inputs``: weight of the
    divergences on inputs of the new task, posed as questions of earlier tasks. ``questions``: maximum number
    of earlier tasks for each input; None for no maximum. ``temperature``: that of all distributions. See
    :mod:`rkif.continual.models.distillation`.
    """

    memory: float = Field(0.0, ge=0)
    answers: Literal["before_task", "kept"] = "before_task"
    inputs: float = Field(0.0, ge=0)
    questions: int | None = Field(1, ge=1)
    temperature: float = Field(1.0, gt=0)

    @property
    def used(self) -> bool:
        return self.memory > 0 or self.inputs > 0

    @property
    def keeps_answers(self) -> bool:
        return self.memory > 0 and self.answers == "kept"

    @model_validator(mode="after")
    def _kept_of_memory(self) -> DistillationSettings:
        if self.answers == "kept" and not self.memory:
            raise ValueError("answers: kept needs distillation.memory above 0; it is 0")
        return self


class CheckpointMergeSettings(Settings):
    """The merge of a task's last checkpoints; see :mod:`rkif.continual.models.checkpoint_merge`.

    ``window``: share of the task's steps that the merged checkpoints span; 0 merges none. ``checkpoints``:
    their number after the first. ``shape``: decay of the learning rate that the merge emulates.
    """

    window: float = Field(0.0, ge=0, lt=1)
    checkpoints: int = Field(12, ge=1)
    shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt"


class WeightAverageSettings(Settings):
    """The exponential moving average of the parameters; see :mod:`rkif.continual.models.weight_average`.

    ``decay``: decay of the average per inner step; with 0, the parameters themselves are evaluated and
    published.
    """

    decay: float = Field(0.0, ge=0, lt=1)


class EwcSettings(Settings):
    """``strength``: factor of the quadratic penalty, whose Fisher information has mean 1 per task."""

    strength: float = Field(1.0, ge=0)


class OLoraSettings(Settings):
    """``strength``: weight of the overlap between the tasks' subspaces in the loss."""

    strength: float = Field(0.5, ge=0)


class MerSettings(Settings):
    """``every``: steps between interpolations. ``rate``: share of the steps' update that is kept."""

    every: int = Field(8, ge=1)
    rate: float = Field(0.1, gt=0, le=1)


class ForeverSettings(Settings):
    """``day``: steps of the first model day. ``epochs``: passes over the memory in each replay.

    ``pull``: factor of the squared distance to the weights before the task. ``gamma``: effect of the update
    norm on the pull. See :mod:`rkif.continual.methods.forever`.
    """

    day: int = Field(24, ge=1)
    epochs: int = Field(2, ge=1)
    pull: float = Field(1e-3, ge=0)
    gamma: float = Field(1.0, ge=0)


class AdaptiveSettings(Settings):
    """``temperature``: that of the softmax over both learners' importance, which is scaled to [0, 1]."""

    temperature: float = Field(0.1, gt=0)


class RunConfig(Settings):
    """All settings of a run: model, tasks, method, training and evaluation.

    ``model``: a folder or a name on the Hub. Relative paths start at the config file's folder. ``adapter:
    null`` trains all parameters. ``precision: bfloat16`` computes under autocast and stores frozen weights in
    bfloat16; trained parameters stay float32. ``threads``: PyTorch's threads on a CPU. Their number affects
    the order of sums and so the last bits; set it to repeat a run exactly. ``metrics``: each is a
    ``module:function``; the module is importable or a file beside the config, see
    :mod:`rkif.continual.user_metrics`. ``method``: a name in :data:`rkif.continual.methods.METHODS`; it is
    checked when the run starts. ``fusion``: see :mod:`rkif.continual.config_fusion`; with ``preset: rkif``,
    the method recurrent_kif also distils. ``gate``: for the method recurrent_kif only. ``tracking``: an
    experiment tracker, see :mod:`rkif.continual.tracking`.
    """

    model: str
    architecture: Literal["causal", "seq2seq", "encoder"] = "causal"
    adapter: AdapterSettings | None = AdapterSettings()
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    tasks: TaskSettings
    text: TextSettings = TextSettings()
    method: str = "recurrent_kif"
    fusion: dict[str, Any] = Field({})
    training: TrainingSettings
    outer: OuterSettings = OuterSettings()
    memory: MemorySettings = MemorySettings()
    distillation: DistillationSettings = DistillationSettings()
    merge: CheckpointMergeSettings = CheckpointMergeSettings()
    ema: WeightAverageSettings = WeightAverageSettings()
    gate: GateSettings | None = None
    rounds: RoundsSettings = RoundsSettings()
    snapshots: RoundStateSettings = RoundStateSettings()
    ewc: EwcSettings = EwcSettings()
    o_lora: OLoraSettings = OLoraSettings()
    adaptive: AdaptiveSettings = AdaptiveSettings()
    mer: MerSettings = MerSettings()
    forever: ForeverSettings = ForeverSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    metrics: list[str] = Field([])
    tracking: Tracker | None = None
    checkpoint_every: int = Field(50, ge=1)
    threads: int | None = Field(None, ge=1)
    seed: int = Field(42, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _distillation_of_preset(cls, values: Any) -> Any:
        given = values if isinstance(values, dict) else {}
        fusion, distillation = given.get("fusion"), given.get("distillation") or {}
        recurrent = given.get("method", cls.model_fields["method"].default) == "recurrent_kif"
        preset = fusion.get("preset") if isinstance(fusion, dict) else None
        if recurrent and preset == "rkif" and isinstance(distillation, dict):
            return {**given, "distillation": RKIF_DISTILLATION | distillation}
        return values

    @model_validator(mode="after")
    def _criteria_of_harness(self) -> RunConfig:
        harness = self.evaluation.harness
        names = [*GATE_METRICS, *([] if harness is None else harness.tasks)]
        for index, criterion in enumerate([] if self.gate is None else self.gate.criteria):
            if not criterion.of_harness:
                continue
            where, metric = f"gate.criteria.{index}", criterion.metric
            if metric not in names:
                hint = did_you_mean(metric, names) or "; list tasks of lm-eval in evaluation.harness as well"
                raise ValueError(
                    f"{where}.metric: must be {', '.join(names)} or module:function; got {metric!r}{hint}"
                )
            if {"floor", "tolerance"}.isdisjoint(criterion.model_fields_set):
                raise ValueError(f"{where}: {metric} needs a tolerance or a floor, in the unit of its metric")
        return self

    @model_validator(mode="after")
    def _observed_by_the_step(self) -> RunConfig:
        if self.training.optimizer == "rkif_adamw" and self.rounds.observe == "after":
            raise ValueError(
                "rounds.observe: training.optimizer rkif_adamw updates the importance before the weights; "
                "observe: after needs optimizer adamw"
            )
        return self

    @model_validator(mode="after")
    def _one_average(self) -> RunConfig:
        if self.merge.window and self.ema.decay:
            raise ValueError(
                f"merge.window {self.merge.window:g} and ema.decay {self.ema.decay:g}: each publishes an "
                "average of its own; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _encoder_chooses(self) -> RunConfig:
        if self.architecture == "encoder" and self.evaluation.scoring == "generation":
            raise ValueError("evaluation.scoring: an encoder cannot generate; it chooses the nearest label")
        if self.architecture == "encoder" and self.evaluation.harness is not None:
            raise ValueError("evaluation.harness: lm-eval needs a language model, which an encoder is not")
        return self

    @field_validator("metrics", mode="before")
    @classmethod
    def _metrics(cls, value: Any) -> Any:
        specs = [value] if isinstance(value, str) else value
        if isinstance(specs, list):
            names = [metric_name(str(spec)) for spec in specs]
            for spec, name in zip(specs, names, strict=True):
                require_function(str(spec))
                if names.count(name) > 1 or name == "accuracy":
                    raise ValueError(f"two metrics are named {name!r}")
        return specs

    @field_validator("fusion")
    @classmethod
    def _fusion_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            if fusion_config(value).pack_inner:
                raise ValueError("pack_inner: report and ledger of a run need the scores that it discards")
        except TypeError as error:
            raise ValueError(str(error)) from error
        return value


def load_config(path: Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read and validate a config file, with changes such as "training.steps=20".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, or settings are unknown, missing or out of range; the message names
            them in one line.
    """
    content = read_settings(path, changes)
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {settings_problems(error, RunConfig)}") from None
    here = path.parent.resolve()
    tasks = config.tasks.model_copy(update={"folder": str(here / config.tasks.folder)})
    model = locate_model(config.model, here)
    metrics = [locate(spec, here) for spec in config.metrics]
    gate = config.gate
    if gate is not None:
        located = [
            criterion.model_copy(update={"metric": locate(criterion.metric, here)})
            for criterion in gate.criteria
        ]
        gate = gate.model_copy(update={"criteria": located})
    evaluation = config.evaluation
    if (harness := evaluation.harness) is not None and harness.include_path is not None:
        harness = harness.model_copy(update={"include_path": str(here / harness.include_path)})
        evaluation = evaluation.model_copy(update={"harness": harness})
    changed = {"tasks": tasks, "model": model, "metrics": metrics, "gate": gate, "evaluation": evaluation}
    return config.model_copy(update=changed)


def dump_config(config: RunConfig) -> str:
    """The config as YAML with all defaults, also those of the fusion, for ``RUN/config.yaml``."""
    content = config.model_dump(mode="json")
    fusion = stored_settings(fusion_config(config.fusion))
    if isinstance(fusion["rule"], dict):
        fusion["rule"] = {case: list(pair) for case, pair in fusion["rule"].items()}
    content["fusion"] = fusion | {"state_dtype": str(fusion["state_dtype"]).removeprefix("torch.")}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
