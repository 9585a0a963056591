"""The shipped comparisons: valid, and alike for all their methods."""

from pathlib import Path

import pytest

from agcl.compare import read_comparison
from agcl.compare.plan import Plan
from agcl.compare.runs import read_config

ROOT = Path(__file__).parents[2]
COMPARISONS = sorted((ROOT / "lightning_configs" / "compare").glob("*.yaml"))


def stack(run):
    """The run's configurations, the first one lowest, as LightningCLI merges them."""
    return [*(read_config(path) for path in run.configs), run.config]


@pytest.fixture(params=COMPARISONS, ids=[path.stem for path in COMPARISONS])
def comparison(request, monkeypatch):
    monkeypatch.chdir(ROOT)
    return read_comparison(request.param)


def test_every_method_measures_general_ability(comparison):
    """An overlay replaces `trainer.callbacks`; nothing may replace what stands beside it."""
    plan = Plan(comparison)
    for name, method in comparison.methods.items():
        for values in method.all_trials():
            (run, *_) = plan.final_runs(name, values)
            lists = [layer["extra_callbacks"] for layer in stack(run) if "extra_callbacks" in layer]
            assert [item["class_path"] for item in lists[-1]] == ["agcl.GeneralAbility"], name
