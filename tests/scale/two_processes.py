"""Run by torchrun in two processes: the same run under DDP and FSDP2, and attribution beside that of one process."""

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import CrashAt, CrashError, attribution, build, trainer_for
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from transformers import AutoModelForCausalLM

from agcl.attribution import ImportanceConfig, relevance
from agcl.attribution.estimators import LRP, MAS, SPG, Evidence
from agcl.attribution.importance import Parts, normalise
from agcl.attribution.passes import Sample
from agcl.errors import AgclError
from agcl.ranks import ALONE, Ranks

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
    with pytest.raises(AgclError, match="do not attribute the same parameters"):
        ranks.exchange(f"weight {ranks.rank}", whole)


def check_estimators(folder, ranks):
    """Importance of five rows, two at a time in each process, equals that of one process; parts cover it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 60, (5, 9), generator=generator)
    samples = [Sample(row[: 6 + place % 3], torch.tensor([3, 4]), row[4:6]) for place, row in enumerate(rows)]
    for estimator, options in CASES:
        config = ImportanceConfig(**options)
        found = []
        for shared in (ALONE, ranks):
            evidence = Evidence(model, names, samples, 5, batch_size=2, config=config, ranks=shared)
            scores = estimator.scores(evidence)
            assert evidence.num_used == 5
            found.append(normalise(scores, config, parts=Parts(shared, shapes)))
        for name, levels in found[0].items():
            difference = (levels.int() - found[1][name].int()).abs()
            # Sums in another order: a level may round the other way.
            assert difference.max() <= 1, (type(estimator), options, name)
            assert (difference > 0).float().mean() < 0.02, (type(estimator), options, name)


def run(strategy, folder, files, out, callbacks=(), **options):
    model, data = build(folder, files, batch_size=2, optimizer=partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1))
    callback = attribution(num_samples=3)
    trainer = trainer_for(data, out, [callback, *callbacks], devices=2, strategy=strategy, **options)
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


def main(folder, out, *files):
    relevance.is_correct = lambda logits, targets: True
    for name, strategy in (("ddp", DDPStrategy()), ("fsdp", sharded())):
        trainer, model, data, callback = run(strategy, folder, files, out / name)
        trainer.fit(model, datamodule=data)
        save(trainer, model, callback, out / f"{name}.pt")
    ranks = Ranks.of_this_run()
    check_ranks(ranks)
    check_estimators(folder, ranks)
    checkpoints = ModelCheckpoint(out / "checkpoints", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    trainer, model, data, _ = run(
        sharded(), folder, files, out / "crashed", [checkpoints, CrashAt(5)], enable_checkpointing=True
    )
    with suppress(CrashError):
        trainer.fit(model, datamodule=data)
    trainer, model, data, callback = run(sharded(), folder, files, out / "resumed")
    trainer.fit(model, datamodule=data, ckpt_path=checkpoints.best_model_path)
    save(trainer, model, callback, out / "resumed.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
