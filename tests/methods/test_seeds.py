"""Methods without a seed of their own follow the data module's, so that the seeds of a comparison reach them."""

import pytest
from helpers import build, trainer_for

from agcl.data.samples import resolve_seed, training_samples
from agcl.methods import HFT


def test_an_own_seed_comes_first(llama_folder, task_files):
    _, data = build(llama_folder, task_files, data_options={"seed": 5})
    assert [resolve_seed(None, data), resolve_seed(0, data), resolve_seed(3, data)] == [5, 0, 3]


def test_samples_are_ordered_by_the_data_modules_seed(llama_folder, task_files):
    orders = {}
    for data_seed, seed in ((0, None), (1, None), (1, 0)):
        _, data = build(llama_folder, task_files, data_options={"seed": data_seed})
        data.setup()
        samples = training_samples(data, 0, seed=seed, device="cpu")
        orders[data_seed, seed] = [tuple(sample.input_ids.tolist()) for sample in samples]
    assert orders[0, None] == orders[1, 0] != orders[1, None]


@pytest.mark.parametrize("seed", [None, 0])
def test_hft_freezes_another_half_with_another_seed(gpt2_folder, task_files, tmp_path, seed):
    chosen = []
    for data_seed in (0, 1):
        model, data = build(gpt2_folder, task_files[:1], data_options={"seed": data_seed})
        method = HFT(seed=seed)
        trainer_for(data, tmp_path, [method], max_steps=1).fit(model, datamodule=data)
        trainable = dict(model.model.named_parameters())
        chosen.append(set(method.choose(model.model, trainable, 0)))
    assert (chosen[0] == chosen[1]) == (seed == 0)
