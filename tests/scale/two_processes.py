"""Run by torchrun in two processes: the same run under DDP and FSDP2, and attribution beside that of one process."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import EPOCHS, attribution, build, trainer_for
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from transformers import AutoModelForCausalLM

from agcl.attribution import ImportanceConfig, relevance
from agcl.attribution.estimators import LRP, MAS, SPG, Change, Evidence, Wanda
from agcl.attribution.importance import Parts, normalise
from agcl.attribution.passes import Sample
from agcl.callbacks import Directions, StopOnSignal
from agcl.cli import main as agcl
from agcl.errors import AgclError
from agcl.ranks import ALONE, Ranks

LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
CASES = [
    (LRP(), {}),
    (LRP(score="sensitivity"), {"top_k": 2, "top_k_method": "exact"}),
    (LRP("cplrp"), {"top_k": 2, "scope": "model"}),
    (LRP(), {"normalisation": "log", "sign": "positive", "scope": "row"}),
    (MAS(), {"normalisation": "rank", "scope": "layer"}),
    (SPG(), {"normalisation": "none"}),
]


def check_ranks(ranks):
    """Parts make up the whole again, whatever the shape; another tensor at the same time is refused by all."""
    for shape in ((5, 3), (4,), (1, 2), ()):
        whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
        assert torch.equal(ranks.whole(ranks.part(whole), shape), whole)
        received = ranks.exchange("weight", whole * 10**ranks.rank)
        assert all(torch.equal(piece, ranks.part(whole) * 10**rank) for rank, piece in enumerate(received))
        own = whole + ranks.rank
        ranks.agree_on(own)
        assert torch.equal(own, whole)
    with pytest.raises(AgclError, match="do not attribute the same parameters"):
        ranks.exchange(f"weight {ranks.rank}", whole)


def check_estimators(folder, ranks):
    """Importance of five rows, two at a time in each process, equals that of one process; parts cover it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 60, (5, 9), generator=generator)
    passed = []
    model.register_forward_pre_hook(lambda module, args, kwargs: passed.extend(kwargs["input_ids"]), with_kwargs=True)
    samples = [Sample(row[: 6 + place % 3], torch.tensor([3, 4]), row[4:6]) for place, row in enumerate(rows)]
    for estimator, options in CASES:
        config = ImportanceConfig(**options)
        found, num_passed = [], []
        for shared in (ALONE, ranks):
            passed.clear()
            evidence = Evidence(model, names, samples, 5, batch_size=2, config=config, ranks=shared)
            scores = estimator.scores(evidence)
            assert evidence.num_used == 5
            num_passed.append(len(passed))
            found.append(normalise(scores, config, parts=Parts(shared, shapes)))
        assert num_passed[1] <= num_passed[0] * 3 / 5, num_passed  # three rows here, two there, or the reverse
        for name, levels in found[0].items():
            difference = (levels.int() - found[1][name].int()).abs()
            # Sums in another order: a level may round the other way.
            assert difference.max() <= 1, (type(estimator), options, name)
            assert (difference > 0).float().mean() < 0.02, (type(estimator), options, name)


def run(strategy, folder, files, out, callbacks=(), epochs=EPOCHS, adapter=None, **options):
    model, data = build(
        folder,
        files,
        batch_size=2,
        optimizer=partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
        task_options={"epochs": epochs},
        adapter=adapter,
    )
    torch.manual_seed(Ranks.of_this_run().rank)  # as if batches of other lengths had drawn other dropout
    callback = attribution(num_samples=3, **options)
    trainer = trainer_for(data, out, [callback, *callbacks], devices=2, strategy=strategy)
    return trainer, model, data, callback


def save(trainer, model, callback, file):
    parameters = dict(model.model.named_parameters())
    whole = {name: getattr(p.detach(), "full_tensor", p.detach)() for name, p in parameters.items()}
    if trainer.is_global_zero:
        kept = {name: (list(t.shape), t.untyped_storage().nbytes() if type(t) is torch.Tensor else t.to_local().numel())
                for name, t in callback.importance.items()}  # fmt: skip
        scores = model.score_matrices["score"].compute()
        torch.save({"weights": whole, "scores": scores, "files": callback.files, "kept": kept}, file)


def sharded():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


class TerminateOne(Callback):
    """Sends SIGTERM to the second process alone, in the midst of a step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 4 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def resume(strategy, folder, files, out, **options):
    """Stop a run and go on with it; with dropout the straight run is made too."""
    if options:
        trainer, model, data, callback = run(strategy(), folder, files, out / "straight", **options)
        trainer.fit(model, datamodule=data)
        save(trainer, model, callback, out.with_suffix(".straight.pt"))
    trainer, model, data, _ = run(strategy(), folder, files, out, [TerminateOne(), StopOnSignal()], **options)
    with pytest.raises(SystemExit) as exit_info:
        trainer.fit(model, datamodule=data)
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert trainer.global_step == 5
    checkpoint = out / "checkpoints" / "interrupted.ckpt"
    assert checkpoint.exists()
    trainer, model, data, callback = run(strategy(), folder, files, out, [StopOnSignal()], **options)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    trainer.strategy.barrier()  # the first process takes it away
    assert not checkpoint.exists()
    save(trainer, model, callback, out.with_suffix(".pt"))


def check_refusals(folder, files, out):
    for estimator in (Wanda(), Change()):
        trainer, model, data, _ = run(sharded(), folder, files, out, estimator=estimator)
        with pytest.raises(AgclError, match=f"{type(estimator).__name__} does not score weights that are split"):
            trainer.fit(model, datamodule=data)
    trainer, model, data, _ = run(sharded(), folder, files, out, directions=Directions())
    with pytest.raises(AgclError, match="`directions` looks at whole weight matrices, which are split"):
        trainer.fit(model, datamodule=data)


def straight_runs(folder, out, *files):
    by_direction = {"directions": Directions(0.8, every=2)}
    for name, strategy, options in (
        ("ddp", DDPStrategy(), {}),
        ("fsdp", sharded(), {}),
        ("directions", DDPStrategy(), by_direction),
        ("pairs", DDPStrategy(), by_direction | {"adapter": LORA}),
    ):
        trainer, model, data, callback = run(strategy, folder, files, out / name, **options)
        trainer.fit(model, datamodule=data)
        save(trainer, model, callback, out / f"{name}.pt")
    ranks = Ranks.of_this_run()
    check_ranks(ranks)
    check_estimators(folder, ranks)
    check_refusals(folder, files, out)


def other_runs(folder, out, *files):
    resume(sharded, folder, files, out / "stopped")
    resume(DDPStrategy, out / "gpt2", files, out / "dropout", epochs=2)
    for name in ("", "odd"):
        agcl(["fit", "--config", str(out / name / "config.yaml")])


if __name__ == "__main__":
    relevance.is_correct = lambda logits, targets: True
    runs = {"straight": straight_runs, "other": other_runs}[sys.argv[1]]
    runs(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
