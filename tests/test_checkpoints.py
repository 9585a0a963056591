"""Files that are whole or not there, checkpoints that are looked into, and which of them `--resume auto` takes."""

import json
import multiprocessing
import os
import resource
import signal
import zipfile
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace

from agcl import resuming
from agcl.attribution import load_importance, save_importance
from agcl.callbacks import StopOnSignal
from agcl.callbacks.importance_so_far import ImportanceSoFar
from agcl.checkpoint_io import AtomicCheckpointIO
from agcl.checkpoints import last_whole, look_into
from agcl.errors import AgclError
from agcl.files import replacing, sync_tree, write_whole
from agcl.resuming import RECORD, resume_auto

# ------------------------------------------------------------------ files


def in_fork(function):
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("moment", ["writing", "syncing"])
def test_killed_while_a_file_is_written_the_old_one_stays_and_the_next_write_clears_up(tmp_path, moment):
    path = tmp_path / "file"
    write_whole(path, "old")

    def killed():
        def kill(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "syncing":
            os.fsync = kill
        with replacing(path) as file:
            file.write(b"new")
            if moment == "writing":
                kill()

    assert in_fork(killed) == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_whole(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


def test_a_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    seen = []

    def note(descriptor):
        seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), sorted(os.listdir(tmp_path))))

    monkeypatch.setattr(os, "fsync", note)
    write_whole(tmp_path / "file", "content")
    assert seen == [(".file.partial", [".file.partial"]), (tmp_path.name, ["file"])]
    seen.clear()
    sync_tree(tmp_path)
    assert [name for name, _ in seen] == ["file", tmp_path.name]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.write("bytes are wanted")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.fixture
def full_disk():
    """The system refuses to make a file larger than 1000 bytes, with an error like a full disk's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_with_the_files_name_and_leaves_nothing(tmp_path, full_disk):
    weights = torch.zeros(10_000)
    for name, write in {
        "a.ckpt": lambda path: AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": weights}}, path),
        "b.safetensors": lambda path: save_importance(path, {"w": weights.byte()}, {}),
        "c.json": lambda path: write_whole(path, "x" * 10_000),
    }.items():
        with pytest.raises(OSError, match="File too large") as error:
            write(tmp_path / name)
        assert error.value.filename == str(tmp_path / name)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ checkpoints


def checkpoint(**content):
    return {"agcl": {"tasks": []}, "state_dict": {"w": torch.arange(1000.0)}, **content}


def save(path, **content):
    AtomicCheckpointIO().save_checkpoint(checkpoint(**content), path)
    return path


def test_a_checkpoint_is_looked_into_without_its_tensors(tmp_path):
    path = save(tmp_path / "folder" / "a.ckpt", global_step=3)
    content = look_into(path)
    assert content["global_step"] == 3
    assert content["state_dict"]["w"].device.type == "meta"
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(1000.0))


def test_broken_and_foreign_checkpoints_are_refused_by_name(tmp_path):
    good = save(tmp_path / "good.ckpt").read_bytes()
    place = good.index(torch.arange(1000.0).numpy().tobytes()) + 100
    flipped = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
    for name, content in {"truncated": good[: len(good) // 2], "empty": b"", "flipped": flipped, "text": b"x"}.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(AgclError, match=rf"{path} is not a checkpoint, or not a whole one"):
            look_into(path)
        if name != "flipped":  # which torch reads without a word
            with pytest.raises(AgclError, match=rf"The checkpoint {path} cannot be read"):
                AtomicCheckpointIO().load_checkpoint(path)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    for read in (look_into, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(AgclError, match=rf"{foreign} was not written by agcl"):
            read(foreign)
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(AgclError, match=rf"The checkpoint {foreign} cannot be read"):
        look_into(foreign)
    with pytest.raises(AgclError, match="does not exist"):
        look_into(tmp_path / "nothing.ckpt")
    os.utime(tmp_path / "good.ckpt", (0, 0))  # by far the oldest
    foreign.unlink()
    assert last_whole([tmp_path]) == tmp_path / "good.ckpt"


def test_a_folder_of_shards_does_not_count_while_it_is_written_over(tmp_path):
    folder = tmp_path / "interrupted.ckpt"
    folder.mkdir()
    torch.save(checkpoint(), folder / "meta.pt")
    (folder / "shard").write_bytes(b"old")
    assert last_whole([tmp_path]) == folder
    found = []
    trainer = SimpleNamespace(
        world_size=1,
        global_step=1,
        is_global_zero=True,
        strategy=SimpleNamespace(barrier=lambda: found.append("barrier")),
        save_checkpoint=lambda path: found.append(last_whole([tmp_path])),
    )
    stopping = StopOnSignal()
    stopping.received, stopping.path = signal.SIGTERM, folder
    with pytest.raises(SystemExit):
        stopping.on_train_batch_end(trainer, None, None, None, 0)
    assert found == ["barrier", None]
    with pytest.raises(AgclError, match="is not a checkpoint, or not a whole one"):
        look_into(folder)


class Unsafe:
    def __reduce__(self):
        return (print, ("run",))


def test_looking_into_a_checkpoint_runs_no_code(tmp_path, capsys):
    torch.save(checkpoint(x=Unsafe()), tmp_path / "a.ckpt")
    with pytest.raises(AgclError, match="cannot be read"):
        look_into(tmp_path / "a.ckpt")
    assert "run" not in capsys.readouterr().out


# ------------------------------------------------------------------ --resume auto

WANTED = {"model": {"optimizer": {"lr": 0.1}}, "data": {"tasks": [{"name": "a"}, {"name": "b"}]}, "trainer": {}}


def fit_config(save_dir, logger=True, **options):
    init_args = Namespace(save_dir=str(save_dir), name="run", version=options.pop("version", None))
    logger = (
        Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=init_args) if logger else None
    )
    trainer = {"default_root_dir": str(save_dir), "logger": logger, "callbacks": None, **options}
    extra = trainer.pop("extra_callbacks", [])
    return Namespace(ckpt_path=None, trainer=Namespace(**trainer), extra_callbacks=extra)


def save_at(path, time, wanted=WANTED, folder=None):
    folder = folder or path.parent.parent
    save(path, **{RECORD: {"configuration": json.dumps(wanted), "folder": str(folder), "precision": "32-true"}})
    os.utime(path, (time, time))
    return path


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(resuming, "rank_zero_info", lines.append)
    monkeypatch.setattr(resuming, "rank_zero_warn", lines.append)
    return lines


def test_the_newest_good_checkpoint_is_taken_and_its_folder_gone_on_in(tmp_path, said):
    first, second = (tmp_path / "run" / f"version_{number}" / "checkpoints" for number in (0, 1))
    save_at(first / "old.ckpt", 1)
    good = save_at(
        first / "good.ckpt", 2, {**WANTED, "trainer": {"max_steps": 7}}
    )  # which is no part of what is learned
    other = json.loads(json.dumps(WANTED))
    other["model"]["optimizer"]["lr"], other["data"]["tasks"][1]["name"] = 0.2, "c"
    different = save_at(second / "other.ckpt", 3, other)
    broken = second / "broken.ckpt"
    broken.write_bytes(good.read_bytes()[:-100])
    os.utime(broken, (4, 4))
    config = fit_config(tmp_path)
    record, may_overwrite = resume_auto(config, WANTED)
    assert record["precision"] == "32-true"
    assert may_overwrite
    assert config.ckpt_path == str(good)
    assert config.trainer.logger.init_args.version == "version_0"
    assert str(broken) in said[0]
    assert (
        f"passes over {different}: it is of another configuration, which differs in data.tasks.1.name, mod" in said[1]
    )
    assert said[2:] == [f"Resuming from {good}."]


def test_without_a_good_checkpoint_the_run_starts_afresh_and_says_so(tmp_path, said):
    config = fit_config(tmp_path)
    assert resume_auto(config, WANTED) == ({}, True)
    assert config.ckpt_path is None
    assert config.trainer.logger.init_args.version is None
    assert said == [f"--resume auto: no checkpoint to go on from in {tmp_path}/run; starting afresh."]
    save(tmp_path / "run" / "version_0" / "checkpoints" / "old.ckpt")  # without a record
    assert resume_auto(config, WANTED) == ({}, False)  # whose config.yaml it is cannot be told
    assert config.ckpt_path is None
    assert "does not say of which configuration" in said[1]


def test_checkpoints_are_found_where_logger_and_callbacks_put_them(tmp_path, said):
    elsewhere = save_at(tmp_path / "elsewhere" / "a.ckpt", 5, folder=tmp_path / "run" / "version_7")
    saving = Namespace(class_path="ModelCheckpoint", init_args=Namespace(dirpath=str(elsewhere.parent)))
    for callbacks in ({"callbacks": [saving]}, {"callbacks": saving}, {"extra_callbacks": [saving]}):
        config = fit_config(tmp_path, **callbacks)
        resume_auto(config, WANTED)
        assert config.ckpt_path == str(elsewhere)
        assert config.trainer.logger.init_args.version == "version_7"

    default = save_at(tmp_path / "lightning_logs" / "version_2" / "checkpoints" / "a.ckpt", 6)
    config = fit_config(tmp_path, logger=False)
    resume_auto(config, WANTED)
    assert config.ckpt_path == str(default)
    assert config.trainer.logger.init_args.version == "version_2"

    save_at(tmp_path / "run" / "version_3" / "checkpoints" / "a.ckpt", 7)
    config = fit_config(tmp_path, version=4)
    resume_auto(config, WANTED)
    assert config.ckpt_path is None


# ------------------------------------------------------------------ importance files


def trainer_in(folder):
    strategy = SimpleNamespace(barrier=lambda: None)
    return SimpleNamespace(fast_dev_run=False, log_dir=str(folder), loggers=[], is_global_zero=True, strategy=strategy)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 10])
def test_importance_is_brought_along_whole_and_shard_by_shard(tmp_path, max_shard_bytes):
    levels = {name: torch.arange(8, dtype=torch.uint8) for name in "ab"}
    source = tmp_path / "old" / "importance" / "00_a.safetensors"
    save_importance(source, levels, {"task": "a"}, max_shard_bytes)
    copy = tmp_path / "new" / "importance" / "00_a.safetensors"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"what a killed copy left")
    so_far = ImportanceSoFar("maximum", 8, "host", needs_files=True)
    so_far.files = {"a": str(source)}
    trainer = trainer_in(tmp_path / "new")
    so_far.bring_along(trainer, torch.nn.Linear(1, 1))
    assert so_far.files == {"a": str(copy)}
    found, metadata = load_importance(copy)
    assert metadata["task"] == "a"
    assert all(torch.equal(levels[name], found[name]) for name in levels)
    copy.write_bytes(b"damaged")
    with pytest.raises(AgclError, match=rf"of task `a` is lost: {copy} is truncated or no importance file"):
        so_far.bring_along(trainer, torch.nn.Linear(1, 1))


def test_a_whole_file_of_another_run_is_not_taken_for_this_ones(tmp_path):
    def importance(run, fingerprint):
        path = tmp_path / run / "importance" / "00_a.safetensors"
        metadata = {"task": "a", "fingerprint": fingerprint}
        save_importance(path, {"w": torch.full((8,), len(fingerprint), dtype=torch.uint8)}, metadata)
        return path, metadata

    ours, metadata = importance("old", "ours")
    copy, _ = importance("new", "another's")
    so_far = ImportanceSoFar("maximum", 8, "host", needs_files=True)
    state = {**so_far.state_dict(), "files": {"a": str(ours)}, "said": {"a": metadata}}
    trainer = trainer_in(tmp_path / "new")
    so_far.load_state_dict(state)
    so_far.bring_along(trainer, torch.nn.Linear(1, 1))
    assert so_far.files == {"a": str(copy)}
    assert load_importance(copy)[0]["w"].tolist() == 8 * [4]

    importance("new", "another's")
    ours.unlink()
    so_far.load_state_dict(state)
    with pytest.raises(AgclError, match=rf"of task `a` is lost: There is no importance file {ours}"):
        so_far.bring_along(trainer, torch.nn.Linear(1, 1))
    so_far.load_state_dict({**state, "files": {"a": str(copy)}})
    with pytest.raises(AgclError, match=rf"is lost: {copy} is not the file that this run wrote"):
        so_far.bring_along(trainer, torch.nn.Linear(1, 1))
