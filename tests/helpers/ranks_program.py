"""The program of the tests on several processes: `ranks_program.py SCENARIO FOLDER`.

Whole gradients are made from a seed, and every process takes its part. So one process, replicas and shards
have the same gradients, and must end with the same bits.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # otherwise the first use of FSDP2 would import it in every fork
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import rkif
import rkif.distributed.thresholds
import rkif.fuser.round_fusion
from rkif.gate import Criterion, Gate

CONFIGS = {
    "paper": rkif.FusionConfig.paper(),
    "release": rkif.FusionConfig.release(clear_inner=False, clear_outer=True, density=0.3),
    "tensor": rkif.FusionConfig.paper(scope="tensor", density=0.4),
    "packed": rkif.FusionConfig.release(pack_inner=True, offload=True),
    "packed_tensor": rkif.FusionConfig.release(pack_inner=True, scope="tensor"),
    "everything": rkif.FusionConfig.paper(density=1),
    "nothing": rkif.FusionConfig.release(density=0),
    "bf16": rkif.FusionConfig.release(state_dtype="bfloat16"),
    "missing": rkif.FusionConfig.release(missing="zero"),  # the second round has no gradient of two tensors
    "missing_tensor": rkif.FusionConfig.paper(missing="zero", scope="tensor"),
    "adamw": rkif.FusionConfig.release(),  # with rkif.optim.AdamW, whose steps observe
}


def names(kind: str) -> list[str]:
    """The tested configs: all, or a few if the shards differ by replica or by column."""
    return (
        ["release", "tensor", "packed", "missing", "adamw"] if kind in ("columns", "hsdp") else list(CONFIGS)
    )


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with rows that two and three ranks share unevenly, and with tensors that some ranks lack."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1), nn.LayerNorm(1), nn.Linear(1, 5, bias=False)
    ).to(dtype)


def spread(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        for module in model:
            if any(True for _ in module.parameters()):
                fully_shard(module)
        fully_shard(model)
    if kind == "hsdp":  # replicas of shards: every element is on two processes, and counts once
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard"))
        fully_shard(model, mesh=mesh)
    if kind == "columns":  # tensor parallelism also shards weights by columns, and replicates biases
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                how = [Shard(1)] if parameter.dim() == 2 else None
                module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.data, mesh, how)))
    return model


def bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def set_gradients(model: nn.Module, step: int) -> None:
    """Set the same whole gradients in every process; some are coarse, so that scores tie."""
    generator = torch.Generator().manual_seed(step)
    for parameter in bare(model).parameters():
        whole = torch.randn(parameter.shape, generator=generator).mul(4).round().div(4).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        parameter.grad = whole


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Momentum(torch.optim.Optimizer):
    """Gradient descent with momentum, in separate float32 products and sums.

    PyTorch's own rounds 16-bit elements differently in the last few of a tensor than in the others.
    """

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            buffer = self.state[parameter]["momentum_buffer"]
            buffer.mul_(0.9).add_(parameter.grad.float())
            parameter.copy_(parameter.float() - buffer * self.param_groups[0]["lr"])


class Loop:
    """Events 0..2 are inner steps, 3 begins the outer phase, 4 and 5 are outer steps, 6 fuses; and again."""

    def __init__(
        self,
        model: nn.Module,
        config: rkif.FusionConfig,
        *,
        adamw: bool = False,
        ledger: Path | None = None,
    ) -> None:
        self.model, self.adamw = model, adamw
        self.fuser = rkif.Fuser(model, config, ledger=ledger)
        optimizer = partial(rkif.optim.AdamW, fuser=self.fuser) if adamw else Momentum
        self.inner, self.outer = (optimizer(model.parameters(), lr=lr) for lr in (0.05, 0.1))
        self.reports: list[dict[str, object]] = []

    def run(self, events: range) -> None:
        for event in events:
            phase = event % 7
            if phase == 3:
                self.fuser.begin_outer()
            elif phase == 6:
                self.reports.append(self.fuser.fuse().to_dict())
            else:
                optimizer = self.inner if phase < 3 else self.outer
                set_gradients(self.model, event)
                if self.fuser.config.missing == "zero" and 7 <= event < 14:
                    bare(self.model)[0].bias.grad = bare(self.model)[2].weight.grad = None
                if not self.adamw:
                    self.fuser.observe()
                optimizer.step()

    def result(self) -> dict[str, Tensor]:
        found = {name: whole(p) for name, p in bare(self.model).named_parameters()}
        found |= {f"state.{name}": whole(t) for name, t in self.fuser.state_dict().items()}
        for learner in ("inner", "outer"):
            found |= {f"scores.{learner}.{n}": whole(t) for n, t in self.fuser.scores(learner).items()}
            moments = getattr(self, learner).state.values()
            for index, own in enumerate(moments):
                found |= {f"{learner}.{index}.{n}": whole(t) for n, t in own.items() if isinstance(t, Tensor)}
        return found


def keep(folder: Path, name: str, tensors: dict[str, Tensor], reports: object) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_file(tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(reports))


def same_bits(folder: Path) -> None:
    """Three rounds with every config and every sharding; also with samples that do not hold all scores."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    for kind in {1: ["alone"], 2: ["ddp", "fsdp"], 3: ["ddp", "fsdp", "columns"], 4: ["hsdp"]}[world]:
        for name in names(kind):
            for sample in (1 << 18, 8):
                rkif.distributed.thresholds.SAMPLE = sample
                dtype = torch.bfloat16 if name == "bf16" else torch.float32
                ledger = folder / f"{kind}-ledger" if (name, sample) == ("release", 8) else None
                model = spread(make_model(dtype), kind)
                loop = Loop(model, CONFIGS[name], adamw=name == "adamw", ledger=ledger)
                loop.run(range(21))
                keep(folder, f"{kind}-{name}-{sample}", loop.result(), loop.reports)


def training(folder: Path) -> None:
    """Training steps with separate inner and outer batches per rank; all end with the same parameters."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for kind in ("ddp", "fsdp"):
        model = spread(make_model(), kind)
        loop = Loop(model, rkif.FusionConfig.paper())
        for event in range(14):
            phase = event % 7
            if phase in (3, 6):
                loop.run(range(event, event + 1))
                continue
            generator = torch.Generator().manual_seed(100 * event + rank)
            model.zero_grad()
            model(torch.randn(3, 6, generator=generator)).square().mean().backward()
            loop.fuser.observe()
            (loop.inner if phase < 3 else loop.outer).step()
        own = torch.cat([whole(p).flatten() for p in bare(model).parameters()])
        every = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(every, own)
        keep(folder, f"training-{kind}", dict(zip("abcd", every, strict=False)), loop.reports)


def save(folder: Path) -> None:
    """Save in the middle of an outer phase, for a resume on another number of ranks."""
    for kind in ["alone"] if not dist.is_initialized() else ["ddp", "fsdp"]:
        for name in ("release", "packed", "bf16"):
            dtype = torch.bfloat16 if name == "bf16" else torch.float32
            loop = Loop(spread(make_model(dtype), kind), CONFIGS[name])
            loop.run(range(12))
            where = folder / f"{kind}-{name}-middle"
            loop.fuser.save(where / "fuser")
            dcp.save(_rest(loop), checkpoint_id=where / "rest", no_dist=not dist.is_initialized())


def resume(folder: Path) -> None:
    """Resume every saved state with every sharding."""
    for where in sorted(folder.glob("*-middle")):
        name = where.name.split("-")[1]
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        for kind in ["alone"] if not dist.is_initialized() else ["ddp", "fsdp"]:
            loop = Loop(spread(make_model(dtype), kind), CONFIGS[name])
            loop.fuser.load(where / "fuser")
            dcp.load(_rest(loop), checkpoint_id=where / "rest", no_dist=not dist.is_initialized())
            loop.run(range(12, 21))
            keep(folder, f"{where.name}-{kind}", loop.result(), loop.reports)


def _rest(loop: Loop) -> dict[str, Tensor]:
    """Parameters and momentum, not copies."""
    named = dict(bare(loop.model).named_parameters())
    state: dict[str, Tensor] = {name: p.data for name, p in named.items()}
    for which, optimizer in (("inner", loop.inner), ("outer", loop.outer)):
        state |= {f"{which}.{name}": optimizer.state[p]["momentum_buffer"] for name, p in named.items()}
    return state


@contextmanager
def processes() -> Iterator[None]:
    """The process group, where torchrun has started several."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("gloo")
    yield
    end_well()


def end_well() -> None:
    """End this process when all processes have reached this point.

    After torch.distributed.checkpoint, one process in hundreds aborts in PyTorch's own threads during the
    shutdown of the interpreter, so the shutdown is skipped.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def drops_out(folder: Path) -> None:
    """Rank 1 fails in the outer phase; the other ranks are already in the fusion."""
    loop = Loop(spread(make_model(), "fsdp"), CONFIGS["paper"])
    loop.run(range(3))
    with loop.fuser.outer():
        loop.run(range(4, 6))
        if dist.get_rank() == 1:
            raise OSError("the disk with the memory is gone")


def gets_nan(folder: Path) -> None:
    """One element of one shard has a NaN gradient."""
    loop = Loop(spread(make_model(), "fsdp"), CONFIGS["paper"])
    loop.run(range(3))
    loop.fuser.begin_outer()
    set_gradients(loop.model, 4)
    if dist.get_rank() == 1:
        loop.model[0].weight.grad.to_local()[0, 0] = torch.nan
    loop.fuser.observe()
    before = loop.fuser.state_dict()
    try:
        loop.fuser.fuse()
    finally:
        after = loop.fuser.state_dict()
        assert all(torch.equal(whole(before[name]), whole(after[name])) for name in before)
        print("untouched", flush=True)


def fails_in_fuse(folder: Path) -> None:
    """Rank 1 has observed nothing; all ranks abandon the round and continue."""
    loop = Loop(spread(make_model(), "fsdp"), CONFIGS["paper"])
    loop.run(range(3))
    loop.fuser.begin_outer()
    if dist.get_rank() != 1:
        set_gradients(loop.model, 4)
        loop.fuser.observe()
    try:
        loop.fuser.fuse()
    except RuntimeError as error:
        print(f"rank {dist.get_rank()} was told: {error}", flush=True)
    loop.fuser.rollback()
    loop.run(range(7, 14))
    print(f"rank {dist.get_rank()} goes on in round {loop.fuser.round}", flush=True)


def other_config(folder: Path) -> None:
    density = 0.2 + 0.1 * dist.get_rank()
    model = torch.compile(spread(make_model(), "ddp"), backend="eager")
    rkif.Fuser(model, rkif.FusionConfig.paper(density=density))


def other_gate(folder: Path) -> None:
    criterion = Criterion("loss", lambda: 0.0, tolerance=0.1 * dist.get_rank())
    rkif.Fuser(spread(make_model(), "fsdp"), gate=Gate([criterion]))


def replica_gets_nan(folder: Path) -> None:
    """One replica has a NaN element: all ranks refuse the fusion and continue."""
    for nonfinite in ("raise", "skip"):
        loop = Loop(spread(make_model(), "ddp"), rkif.FusionConfig.paper(nonfinite=nonfinite))
        loop.run(range(3))
        loop.fuser.begin_outer()
        set_gradients(loop.model, 4)
        if dist.get_rank() == 1:
            bare(loop.model)[0].weight.grad[0, 0] = torch.nan
        loop.fuser.observe()
        try:
            assert not loop.fuser.fuse().applied
        except RuntimeError as error:
            assert nonfinite == "raise"
            print(f"rank {dist.get_rank()} was told: {error}", flush=True)
            loop.fuser.rollback()
        loop.run(range(7, 14))
        assert loop.reports[-1]["applied"]
        print(f"rank {dist.get_rank()} goes on", flush=True)


def no_memory_to_fuse(folder: Path) -> None:
    """Rank 1 runs out of memory after the thresholds are found; all ranks can continue."""
    fuse = rkif.fuser.round_fusion.grouped_fusion

    def none_left(*arguments: object, **settings: object) -> object:
        if dist.get_rank() == 1 and loop.fuser.round == 0:
            raise torch.OutOfMemoryError("no memory to fuse")
        return fuse(*arguments, **settings)

    rkif.fuser.round_fusion.grouped_fusion = none_left
    loop = Loop(spread(make_model(), "fsdp"), CONFIGS["paper"])
    try:
        loop.run(range(7))
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"rank {dist.get_rank()} was told: {error}", flush=True)
    loop.fuser.rollback()
    loop.run(range(7, 14))
    print(f"rank {dist.get_rank()} goes on in round {loop.fuser.round}", flush=True)


def evaluates(folder: Path) -> None:
    """Evaluate the model without a backward pass after every change of its parameters.

    FSDP2's root module keeps the gathered parameters after such a forward pass.
    """
    kind = "fsdp" if dist.is_initialized() else "alone"
    for how in ("module", "pairs"):
        model = spread(make_model(), kind)
        batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))

        def loss(model: nn.Module = model, batch: Tensor = batch) -> float:
            with torch.no_grad():
                return float(model(batch).square().mean())

        found = [loss()]
        source = model if how == "module" else model.named_parameters()
        gate = Gate([Criterion("loss", loss, higher_is_better=False, tolerance=0.1)], ladder=(0.5,))
        fuser = rkif.Fuser(source, rkif.FusionConfig.paper(density=1), gate=gate)
        optimizer = Momentum(iter(fuser.parameters.values()), 0.05)
        for step in range(12):
            set_gradients(model, step)
            fuser.observe()
            optimizer.step()
            found.append(loss())
            if step == 1:
                fuser.rollback()
                found.append(loss())
            elif fuser.phase == "inner":
                fuser.begin_outer()
            else:
                report = fuser.fuse()
                assert report.gate is not None
                found += [attempt.figures["loss"] for attempt in report.gate.attempts]
                found += [report.gate.factor, loss()]
        keep(folder, f"evaluates-{kind}-{how}", {"losses": torch.tensor(found)}, [])


def other_mesh(folder: Path) -> None:
    """A state that is sharded over another mesh loads like an unsharded state."""
    loops = [Loop(spread(make_model(), kind), CONFIGS["release"]) for kind in ("fsdp", "hsdp")]
    loops[0].run(range(2))
    state = loops[0].fuser.state_dict()
    loops[1].fuser.load_state_dict(state)
    for name, tensor in loops[1].fuser.state_dict().items():
        assert torch.equal(whole(tensor), whole(state[name])), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes():
        globals()[sys.argv[1]](Path(sys.argv[2]))
