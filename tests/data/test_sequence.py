import pytest

from agcl.data.sequence import TaskSequence, in_order
from agcl.data.tasks import Task
from agcl.errors import AgclError


def sequence(*epochs, regime="sequential"):
    return TaskSequence([Task(name=n, source="x", epochs=e) for n, e in zip("abcdef", epochs, strict=False)], regime)


def test_epochs_belong_to_tasks():
    tasks = sequence(2, 1, 3)
    assert tasks.total_epochs == 6
    assert [tasks.index_at(epoch) for epoch in range(6)] == [0, 0, 1, 2, 2, 2]
    assert [tasks.indices_at(epoch) for epoch in range(6)] == [[0], [0], [1], [2], [2], [2]]
    assert "".join(tasks.name_at(epoch) for epoch in range(6)) == "aabccc"
    assert [tasks.epoch_in_task(epoch) for epoch in range(6)] == [0, 1, 0, 0, 1, 2]
    assert [tasks.starts_at(epoch) for epoch in range(6)] == [True, False, True, True, False, False]
    assert [tasks.ends_at(epoch) for epoch in range(6)] == [False, True, True, False, False, True]
    assert [tasks.num_completed(epoch) for epoch in range(7)] == [0, 0, 1, 2, 2, 2, 3]
    assert [tasks.segment(epoch) for epoch in range(4)] == [range(2), range(2), range(2, 3), range(3, 6)]
    assert tasks.index_at(6) == 2  # after the last epoch, when Lightning already counts on


def test_joint_training_has_one_boundary_at_the_end():
    tasks = sequence(2, 1, 3, regime="joint")
    assert tasks.total_epochs == 3
    assert [tasks.indices_at(epoch) for epoch in range(3)] == [[0, 1, 2], [0, 2], [2]]
    assert {tasks.name_at(epoch) for epoch in range(3)} == {"joint"}
    assert [tasks.starts_at(epoch) for epoch in range(3)] == [True, False, False]
    assert [tasks.ends_at(epoch) for epoch in range(3)] == [False, False, True]
    assert [tasks.num_completed(epoch) for epoch in range(4)] == [0, 0, 0, 3]
    assert {tasks.segment(epoch) for epoch in range(4)} == {range(3)}
    assert {tasks.index_at(epoch) for epoch in range(3)} == {0}  # constant: nothing begins anew


def test_order_rearranges_and_refuses_by_name():
    tasks = list(sequence(1, 2, 3))
    assert [task.epochs for task in in_order(tasks, ["c", "a", "b"])] == [3, 1, 2]
    with pytest.raises(AgclError, match="`order` names `z`, which is no task; declared are a, b, c"):
        in_order(tasks, ["a", "b", "z"])
    with pytest.raises(AgclError, match="`order` names `a` more than once"):
        in_order(tasks, ["a", "b", "a"])
    with pytest.raises(AgclError, match="`order` leaves out b, c"):
        in_order(tasks, ["a"])


def test_duplicate_names_are_refused():
    with pytest.raises(AgclError, match="Two tasks are named `t`"):
        TaskSequence([Task(name="t", source="x"), Task(name="t", source="y")])
