"""Experience replay: how many rows, of which tasks, and out of what was kept."""

from collections import Counter

import pytest
import torch
from helpers import EPOCHS, build

from agcl.data.replay import Replay, draw
from agcl.errors import AgclError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rows_are_split_evenly_over_old_tasks_and_drawn_without_repetition():
    drawn = draw([5, 3, 8], 9, generator())
    assert [len(places) for places in drawn] == [3, 3, 3]
    for places, num in zip(drawn, [5, 3, 8], strict=True):
        assert len(set(places.tolist())) == 3
        assert set(places.tolist()) <= set(range(num))


def test_what_cannot_be_split_goes_to_tasks_by_chance():
    counts = [tuple(len(places) for places in draw([4, 4, 4], 4, generator(seed))) for seed in range(60)]
    assert set(counts) == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    assert [len(places) for places in draw([4] * 5, 1, generator())].count(0) == 4


def test_few_kept_rows_come_up_equally_often():
    (places,) = draw([3], 8, generator())
    assert sorted(Counter(places.tolist()).values()) == [2, 3, 3]


def test_buffer_is_shared_by_the_old_tasks():
    assert Replay(buffer_size=8).num_kept([10]) == [8]
    assert Replay(buffer_size=8).num_kept([10, 10, 10]) == [3, 3, 2]
    assert Replay(buffer_size=8).num_kept([10, 2]) == [4, 2]
    assert Replay().num_kept([10, 2]) == [10, 2]


def keys(rows):
    return Counter(tuple(ids) for ids in rows["input_ids"])


@pytest.mark.parametrize(("share", "replayed"), [(0.5, 2), (1.0, 4), (0.01, 1), (2.0, 8)])
def test_each_epoch_serves_the_new_rows_and_the_share_of_kept_ones(llama_folder, task_files, share, replayed):
    _, data = build(llama_folder, task_files, data_options={"replay": Replay(share, buffer_size=4)})
    data.setup()
    for epoch in range(3 * EPOCHS):
        task = epoch // EPOCHS
        old = keys(data.rows_at(epoch)) - keys(data.training_rows(task))
        assert sum(old.values()) == (replayed if task else 0)
        kept = Counter()
        for index in range(task):
            kept |= keys(data.kept_rows(index, 4 // task))
        assert set(old) <= set(kept)
        assert data.num_batches(epoch) == (2 if task == 0 else -(-(4 + replayed) // 2))
        served = sum((keys({"input_ids": _unpadded(batch)}) for batch in data_at(data, epoch)), Counter())
        assert served == keys(data.rows_at(epoch))
    epochs_of_last_task = {tuple(sorted(keys(data.rows_at(epoch)))) for epoch in range(2 * EPOCHS, 3 * EPOCHS)}
    assert len(epochs_of_last_task) > 1 or share >= 1  # drawn anew in each epoch


def data_at(data, epoch):
    class At:
        current_epoch, world_size, limit_train_batches = epoch, 1, 1.0

    data.trainer = At
    try:
        return list(data.train_dataloader())
    finally:
        data.trainer = None


def _unpadded(batch):
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def test_extra_bytes_are_those_of_the_kept_rows(llama_folder, task_files):
    _, data = build(llama_folder, task_files, data_options={"replay": Replay(buffer_size=2)})
    data.setup()
    assert data.extra_bytes() == 0  # nothing is old yet

    class Last:
        current_epoch = 3 * EPOCHS

    data.trainer = Last
    rows = [data.kept_rows(index, 1)[0] for index in (0, 1)]
    ids = sum(4 * len(row["input_ids"]) + 8 * len(row["labels"]) for row in rows)  # int32 and int64
    assert ids < data.extra_bytes() < ids + 2 * 50  # besides: answer, label, and Arrow's offsets
    data.replay = None
    assert data.extra_bytes() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "`replay.share` is 0; give a number above 0"),
        ({"share": float("nan")}, "`replay.share` is nan"),
        ({"buffer_size": 0}, "`replay.buffer_size` is 0; give at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(AgclError, match=message):
        Replay(**options)


def test_options_that_do_not_go_together_are_refused(llama_folder, task_files):
    with pytest.raises(AgclError, match="`replay` has no meaning with `regime: joint`"):
        build(llama_folder, task_files, data_options={"replay": Replay(), "regime": "joint"})
    with pytest.raises(AgclError, match=r"buffer_size` is 1, but 2 old tasks come to share it: give at least 2"):
        build(llama_folder, task_files, data_options={"replay": Replay(buffer_size=1)})
