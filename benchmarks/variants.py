"""What else might hold more: variants of the gate by direction, each one run of `agcl fit`.

    python benchmarks/variants.py VARIANT [--tasks quickstart | concept1k | classification] [--data_dir DATA]
        [--lr LR] [--strength STRENGTH] [--seed SEED] [--precision PRECISION]

The tasks are the quick start's on a seed of their own, the reduced Concept-1K's of other facts (all five tasks), or the
reduced classification's scored on validation rows: none is in a table of `agcl compare`. A row is appended to
`benchmarks/results/variants.jsonl`. "Old loss": by how much the loss of the old tasks' answers rose, in nats per
token, from when each was learned to the end, the last task left out.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import torch
import yaml

import agcl.attribution.directions as directions_module
import agcl.callbacks.directions as gate_module
from agcl.callbacks.directions import DirectionsSoFar
from agcl.cli import main as agcl
from agcl.compare.overlay import overlay
from agcl.compare.runs import read_config

RESULTS = Path(__file__).parent / "results" / "variants.jsonl"
CONFIGS = Path(__file__).parents[1] / "lightning_configs"
CALLBACK = "trainer.callbacks.AttributionCallback.init_args"
FREEZING = "trainer.callbacks.LayerFreezing.init_args.num_layers"
TASKS = {
    "quickstart": (["quickstart.yaml"], 10, 2e-4),
    "concept1k": (["base.yaml", "data/concept1k_reduced.yaml", "model/smollm2-135m.yaml"], 100, 2e-4),
    "classification": (["base.yaml", "data/classification_reduced.yaml", "model/smollm2-135m.yaml"], 100, 5e-5),
}


def text_counts(weight):
    """The model's own text counts by ``weight`` where a task counts by 1."""
    learn = DirectionsSoFar.learn

    def scaled(self, evidence, observed=None):
        is_text = not self.moments.sums
        learn(self, evidence, observed)
        if is_text:
            sums = {name: weight * moment for name, moment in self.moments.sums.items()}
            self.moments = directions_module.InputMoments(sums, self.moments.transposed)

    DirectionsSoFar.learn = scaled


def stand_still(pattern):
    """Parameters whose name the pattern is found in stay as they were before the first task."""
    attach = DirectionsSoFar.attach

    def attach_and_freeze(self, optimizer, model, *args, **options):
        if not hasattr(self, "frozen"):
            self.frozen = [(p, p.detach().clone()) for n, p in model.named_parameters() if re.search(pattern, n)]
            optimizer.register_step_post_hook(lambda *_: restore(self.frozen))
        attach(self, optimizer, model, *args, **options)

    @torch.no_grad()
    def restore(frozen):
        for parameter, before in frozen:
            parameter.copy_(before)

    DirectionsSoFar.attach = attach_and_freeze


def gate_the_head():
    """The embedding, which is the head's matrix as well, by the directions of the head's inputs."""
    observe = directions_module.MomentSums.observe

    def find(model, parameters, sample, rule, pairs):
        kinds = {}
        directions_module._run_forward(
            model, parameters, [sample], rule, lambda name, use, _: kinds.setdefault(name, set()).add(use.kind)
        )
        return {name: False for name, kind in kinds.items() if kind in ({"linear"}, {"linear", "lookup"})}

    def observe_no_lookup(self, name, use, upstream):
        if use.kind != "lookup":
            observe(self, name, use, upstream)

    gate_module.find_matrices, directions_module.MomentSums.observe = find, observe_no_lookup


def one_threshold():
    """One c for all matrices, on eigenvalues of mean 1 a task, in place of one budget for each matrix (sharpness 1)."""

    def maps(self, plasticity, sharpness, control, seed, device):
        found = {name: torch.linalg.eigh(moment.float()) for name, moment in self.sums.items()}
        importance = {name: values.clamp(min=0) * len(values) for name, (values, _) in found.items()}
        sizes = [len(values) for values in importance.values()]
        everything = torch.cat(list(importance.values()))
        shares = directions_module.shares_within(everything, plasticity, 1.0, least=2.0**-60)
        held = dict(zip(found, (1 - shares).float().split(sizes), strict=True))
        return {
            name: ((vectors * held[name].sqrt())[:, held[name] >= 1 / 255], self.transposed[name])
            for name, (_, vectors) in found.items()
        }

    directions_module.InputMoments.maps = maps


VARIANTS = {  # settings of the gate, what is put in place of the package's own
    "sharpness 1": ({"sharpness": 1.0}, None),
    "sharpness 1.5": ({"sharpness": 1.5}, None),
    "sharpness 2": ({"sharpness": 2.0}, None),
    "sharpness 4": ({"sharpness": 4.0}, None),
    "plasticity 0.75": ({"sharpness": 1.0, "plasticity": 0.75}, None),
    "every 1": ({"sharpness": 1.0, "every": 1}, None),
    "unweighted": ({"sharpness": 1.0, "weighted": False}, None),
    "no own text": ({"sharpness": 1.0, "own_text": 0}, None),
    "own text counts 0.3": ({"sharpness": 1.0}, lambda: text_counts(0.3)),
    "own text counts 0.1": ({"sharpness": 1.0}, lambda: text_counts(0.1)),
    "embedding stands still": ({"sharpness": 1.0}, lambda: stand_still("embed_tokens")),
    "norms stand still": ({"sharpness": 1.0}, lambda: stand_still("norm")),
    "both stand still": ({"sharpness": 1.0}, lambda: stand_still("embed_tokens|norm")),
    "both, plasticity 0.75": ({"sharpness": 1.0, "plasticity": 0.75}, lambda: stand_still("embed_tokens|norm")),
    "both, sharpness 1.5": ({"sharpness": 1.5}, lambda: stand_still("embed_tokens|norm")),
    "both, own text counts 0.3": (
        {"sharpness": 1.0},
        lambda: (text_counts(0.3), stand_still("embed_tokens|norm")),
    ),
    "head by direction": ({"sharpness": 1.0}, gate_the_head),
    "head by direction, norms stand still": ({"sharpness": 1.0}, lambda: (gate_the_head(), stand_still("norm"))),
    "one threshold": ({"sharpness": 1.0}, one_threshold),
}
REPLAY = {"data.replay": {"share": 0.5, "buffer_size": 4}}  # 3 % of the quick start's rows
NOT_CLIPPED = {
    "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9, "weight_decay": 0.0}}
}
SGD = NOT_CLIPPED | {"trainer.gradient_clip_val": 1.0}
RIVALS = {  # method's configuration, settings
    "plain fine-tuning": ("method/sequential.yaml", {}),
    "22 blocks frozen": ("method/layer_freezing.yaml", {FREEZING: 22}),
    "26 blocks frozen": ("method/layer_freezing.yaml", {FREEZING: 26}),
    "LoRA, plain": ("method/lora_sequential.yaml", {}),
    "LoRA, by entry": ("method/agcl_lora_entries.yaml", {}),
    "LoRA, by direction": ("method/agcl_lora.yaml", {}),
    "4 old rows": ("method/replay.yaml", REPLAY),
    "by direction, 4 old rows": ("method/agcl.yaml", REPLAY),
    "by entry": ("method/agcl_entries.yaml", {}),
    "by entry, 4 old rows": ("method/agcl_replay.yaml", REPLAY),
    "by entry, single-task model": ("method/agcl_single_task.yaml", {}),
    "by entry, scored anew": ("method/agcl_reestimated.yaml", {}),
    "by entry, mean over tasks": ("method/agcl_entries.yaml", {f"{CALLBACK}.merge": "mean"}),
    "by entry, probabilistic or": ("method/agcl_entries.yaml", {f"{CALLBACK}.merge": "probabilistic_or"}),
    "SGD, not clipped": ("method/sequential.yaml", NOT_CLIPPED),
    "SGD": ("method/sequential.yaml", SGD),
    "SGD, gradient gate": ("method/agcl_entries.yaml", SGD | {f"{CALLBACK}.gate": "gradient"}),
    "SGD, by direction": ("method/agcl.yaml", SGD),
    "SGD, SPG": ("method/spg.yaml", SGD),
}
ESTIMATORS = {  # each as a gate by entry: configuration, estimator
    "AttnLRP, squared": ("agcl_entries", None),
    "AttnLRP, relevance": ("agcl_entries", ("LRP", {"score": "relevance"})),
    "CP-LRP, squared": ("agcl_cplrp", None),
    "no rules, squared": ("agcl_entries", ("LRP", {"rule": "none", "score": "sensitivity"})),
    "gradient x weight": ("agcl_gradient_weight", None),
    "Fisher": ("agcl_fisher", None),
    "empirical Fisher": ("agcl_empirical_fisher", None),
    "MAS": ("agcl_mas", None),
    "SPG": ("agcl_mas", ("SPG", {})),
    "Wanda": ("agcl_wanda", None),
    "magnitude": ("agcl_magnitude", None),
    "change": ("agcl_change", None),
    "random": ("agcl_random", None),
}
RANK = {f"{CALLBACK}.importance.normalisation": "rank", f"{CALLBACK}.strength": 8.0}
for name, (method, estimator) in ESTIMATORS.items():
    # By rank the importance of a tensor is spread evenly over [0, 1]: whatever the score, mean plasticity is
    # 1 / (1 + strength).
    rank = dict(RANK)
    if estimator:
        rank[f"{CALLBACK}.estimator"] = {
            "class_path": f"agcl.attribution.estimators.{estimator[0]}",
            "init_args": estimator[1],
        }
    RIVALS[f"by rank of {name}"] = (f"method/{method}.yaml", rank)
OPTIONS = {  # one thing that is otherwise in a gate by entry, by rank of AttnLRP's squared gradient
    "scope: row": {"importance.scope": "row"},
    "scope: layer": {"importance.scope": "layer"},
    "scope: model": {"importance.scope": "model"},
    "quantile 0.5 in place of ranks": {"importance.normalisation": "quantile", "importance.quantile": 0.5},
    "mean of the 8 largest rows": {"importance.top_k": 8},
    "8 rows": {"num_samples": 8},
    "16 rows": {"num_samples": 16},
    "positive relevance": {"estimator.init_args.score": "relevance", "importance.sign": "positive"},
    "embedding not gated": {"parameters": "layers"},
    "mean over tasks": {"merge": "mean"},
    "probabilistic or": {"merge": "probabilistic_or"},
    "single-task model": {"source": "single_task"},
    "old tasks scored anew from 8 rows": {"reestimate": 8},
}
for name, settings in OPTIONS.items():
    options = {f"{CALLBACK}.{key}": value for key, value in settings.items()}
    RIVALS[f"by rank, {name}"] = ("method/agcl_entries.yaml", RANK | options)
RIVALS["by rank, 4 old rows"] = ("method/agcl_entries.yaml", RANK | REPLAY)


def arguments(options, folder):
    """What `agcl fit` takes: configurations, the last of which is written to the folder."""
    names, seed, rate = TASKS[options.tasks]
    seed = seed if options.seed is None else options.seed
    rival = RIVALS.get(options.variant)
    paths = [str(CONFIGS / name) for name in (*names, rival[0] if rival else "method/agcl.yaml")]
    layers = [read_config(path) for path in paths]
    gate = VARIANTS.get(options.variant, ({}, None))[0]
    settings = rival[1] if rival else {f"{CALLBACK}.directions.{key}": value for key, value in gate.items()}
    settings = settings | {"seed_everything": seed, "data.seed": seed, "data.data_dir": options.data_dir}
    settings |= {"model.optimizer.init_args.lr": options.lr or rate, "trainer.enable_checkpointing": False}
    if options.strength is not None:
        settings[f"{CALLBACK}.strength"] = options.strength
    is_classification = options.tasks == "classification"
    settings["trainer.precision"] = options.precision or ("bf16-mixed" if is_classification else "32-true")
    if is_classification:
        settings["data.evaluate_on"] = "validation"
        settings |= {} if rival else {f"{CALLBACK}.num_samples": 128}
    if options.tasks == "concept1k":
        facts = {"train_split": "train[32:64]", "test_split": "train[32:64]"}
        settings["data.tasks"] = [task | facts for task in layers[1]["data"]["tasks"]]
    config = overlay(layers, settings)
    logger = {"save_dir": str(folder), "name": "", "version": "", "default_hp_metric": False}
    config["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": logger,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return [word for path in (*paths, str(folder / "run.yaml")) for word in ("--config", path)]


def row_of(options, scores):
    """What is kept of a run's scores."""
    nll = scores["nll"]
    risen = [nll[-1][task] - nll[task + 1][task] for task in range(len(nll[0]) - 1)]
    return {
        "tasks": options.tasks,
        "variant": options.variant,
        "lr": options.lr or TASKS[options.tasks][2],
        "seed": scores["seed"],
        **({} if options.strength is None else {"strength": options.strength}),
        **{name: scores["metrics"][name] for name in ("average_performance", "backward_transfer", "learning_accuracy")},
        "old_loss": sum(risen) / len(risen),
        "general_forgetting": scores["general_ability"]["forgetting"],
        "precision": scores["precision"],
        "device": scores["environment"]["device"],
        "torch": scores["versions"]["torch"],
    }


def options_of(words=None):
    """The command line's, or of other words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=(*VARIANTS, *RIVALS))
    parser.add_argument("--tasks", choices=TASKS, default="concept1k")
    parser.add_argument("--data_dir", help="the benchmark's folder")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--strength", type=float, help="of a gate by entry; ranks' is 8")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--precision")
    return parser.parse_args(words)


def main():
    options = options_of()
    replace = VARIANTS.get(options.variant, ({}, None))[1]
    if replace:
        replace()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        agcl(["fit", *arguments(options, folder)])
        scores = json.loads((folder / "scores.json").read_text())
    with RESULTS.open("a") as file:
        file.write(json.dumps(row_of(options, scores)) + "\n")


if __name__ == "__main__":
    main()
