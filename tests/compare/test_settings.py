"""What a comparison's file may say."""

import pytest
import yaml

from agcl.compare import read_comparison
from agcl.errors import AgclError

GOOD = {
    "base": ["base.yaml"],
    "output": "out",
    "seeds": [3, 1],
    "methods": {
        "plain": {"grid": {"model.lr": [1.0, 2.0]}},
        "other": {"configs": ["other.yaml"], "grid": {"model.lr": [1.0], "callbacks.0.x": ["a", "b"]}},
    },
}


def read(tmp_path, **changes):
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump({**GOOD, **changes}, sort_keys=False))
    return read_comparison(file)


def test_defaults_follow_from_what_is_given(tmp_path):
    comparison = read(tmp_path)
    assert (comparison.reference, comparison.tuning_seed, comparison.parallel) == ("plain", 3, 1)
    assert read(tmp_path, devices=[0, "1,2"]).parallel == 2
    assert comparison.methods["other"].all_trials() == [
        {"model.lr": 1.0, "callbacks.0.x": "a"},
        {"model.lr": 1.0, "callbacks.0.x": "b"},
    ]


METHODS = GOOD["methods"]
BAD = [
    ({"sedes": [1]}, "'sedes' is not accepted"),
    ({"methods": {"plain": {"gird": {"model.lr": [1]}}}}, "'gird.model.lr' is not accepted"),
    ({"methods": {}}, "at least one method and one seed"),
    ({"seeds": []}, "at least one method and one seed"),
    ({"seeds": [1, 1]}, "`seeds` [1, 1] names one twice"),
    ({"reference": "best"}, "`best`, which is none of the methods `plain`, `other`"),
    ({"parallel": 0}, "`parallel` is 0"),
    ({"parallel": 3, "devices": [0, 1]}, "`parallel` is 3"),
    ({"confidence": 95}, "`confidence` is 95"),
    ({"settings": {"data.seed": 1}}, "`settings` sets `data.seed`, which the comparison gives each run itself"),
    ({"trial_settings": {"trainer.logger.init_args.x": 1}}, "sets `trainer.logger.init_args.x`"),
    ({"methods": {"plain": {"grid": {"seed_everything": [1, 2]}}}}, "`plain` sets `seed_everything`"),
    ({"methods": {"plain": {"grid": {"model..lr": [1]}}}}, "'model..lr' is no dotted key"),
    ({"methods": {"plain": {"grid": {"model.lr": []}}}}, "the grid has no value of `model.lr`"),
    ({"methods": {"plain": {"grid": {"model.lr": [1, 1]}}}}, "Method `plain` has a trial twice"),
    ({"methods": {"a/b": {}}}, "named 'a/b'"),
    ({"methods": {"plain": {"grid": {"a": [1]}, "trials": [{"a": 1}]}}}, "both a `grid` and `trials`"),
    (
        {"methods": {**METHODS, "third": {"trials": [{"model.lr": 1.0}]}}},
        "favours those with more: plain 2, other 2, third 1. Give each as many",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_cannot_work_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(AgclError) as error_info:
        read(tmp_path, **changes)
    assert message in str(error_info.value)
    assert "\n" not in str(error_info.value)


def test_unequal_trials_on_request(tmp_path):
    methods = {**METHODS, "third": {"trials": [{"model.lr": 1.0}]}}
    assert len(read(tmp_path, methods=methods, allow_unequal_trials=True).methods["third"].all_trials()) == 1


def test_missing_file(tmp_path):
    with pytest.raises(AgclError, match=r"none.yaml does not exist"):
        read_comparison(tmp_path / "none.yaml")
