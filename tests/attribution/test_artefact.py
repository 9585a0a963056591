import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from agcl.attribution import artefact, storage
from agcl.attribution.artefact import (
    ImportanceFile,
    LazyImportance,
    check_importance,
    dequantise,
    fingerprint,
    load_importance,
    open_importance,
    quantise,
    save_importance,
)
from agcl.attribution.levels import histogram
from agcl.attribution.storage import index_of
from agcl.errors import AgclError

ROOT = Path(__file__).parents[2]
SHAPES = {"experts": (2, 3, 4), "matrix": (7, 5), "nothing": (0, 3), "scalar": (), "vector": (6,)}
DTYPES = {8: torch.uint8, 16: torch.uint16}


def importance(bits=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: torch.randint(256 ** (bits // 8), shape, generator=generator).to(DTYPES[bits])
        for name, shape in SHAPES.items()
    }
    return found | {"transposed": torch.arange(6).to(DTYPES[bits]).view(2, 3).T, "tied": found["vector"]}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def assert_refused(path, message):
    with pytest.raises(AgclError, match=message) as error:
        open_importance(path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------- fixed point


@pytest.mark.parametrize(("bits", "bound"), [(8, 1 / 510), (16, 1 / 131070)])
def test_fixed_point_is_within_half_a_step_and_exact_at_the_ends(bits, bound):
    values = torch.rand(100_000, dtype=torch.float64)
    values[:2] = torch.tensor([0.0, 1.0])
    before = values.clone()
    levels = quantise(values, bits)
    assert torch.equal(values, before)
    assert levels.dtype == DTYPES[bits]
    exact = torch.from_numpy(levels.numpy().astype(np.float64) / (256 ** (bits // 8) - 1))
    assert (exact - values).abs().max() <= bound * (1 + 1e-12)
    restored = dequantise(levels)
    assert restored.dtype == torch.float32
    assert (restored.double() - exact).abs().max() <= 6e-8
    assert restored[:2].tolist() == [0, 1]


@pytest.mark.parametrize("bits", [8, 16])
def test_every_level_survives_and_is_counted(bits):
    every = torch.arange(256 ** (bits // 8)).to(DTYPES[bits])
    assert torch.equal(quantise(dequantise(every), bits), every)
    assert torch.equal(histogram(torch.cat([every, every[:3]])), torch.tensor([2] * 3 + [1] * (len(every) - 3)))
    assert not histogram(torch.empty(0, 3, dtype=DTYPES[bits])).any()


@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan")])
def test_what_is_no_importance_is_not_quantised(bad):
    with pytest.raises(AgclError, match=r"must lie in \[0, 1\]"):
        quantise(torch.tensor([0.5, bad]), 16)


def test_other_dtypes_are_not_dequantised():
    with pytest.raises(AgclError, match=r"is torch\.int32, not torch\.uint8 or torch\.uint16"):
        dequantise(torch.zeros(2, dtype=torch.int32))


# -------------------------------------------------------- writing and reading


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30, 1])
def test_what_is_written_is_read(tmp_path, bits, max_shard_bytes):
    path, written = tmp_path / "folder" / "task.safetensors", importance(bits)
    save_importance(path, written, {"task": "français", "num_samples": 16}, max_shard_bytes)
    file = open_importance(path)
    assert file.bits == bits
    assert file.shapes == {name: tuple(levels.shape) for name, levels in sorted(written.items())}
    assert_same(dict(file), written)
    loaded, metadata = load_importance(path)
    assert_same(loaded, written)
    expected = {"format": "agcl-importance", "format_version": "2", "task": "français", "num_samples": "16"}
    assert metadata == file.metadata == {**expected, "bits": str(bits), "agcl_version": metadata["agcl_version"]}
    assert (len(file.files) > 1) == (max_shard_bytes < 10**9)
    # An independent reader finds the same, and nothing else is left in the folder.
    plain = {name: levels for shard in file.files for name, levels in load_file(shard).items()}
    assert_same(plain, written)
    index = {"task.safetensors.index.json"} if len(file.files) > 1 else set()
    assert {f.name for f in path.parent.iterdir()} == {f.name for f in file.files} | index


def test_shards_are_those_of_hugging_face(tmp_path):
    path = tmp_path / "task.safetensors"
    written = {name: torch.zeros(size, dtype=torch.uint8) for name, size in {"a": 2, "b": 9, "d": 3, "c": 1}.items()}
    save_importance(path, written, {"task": "french"}, max_shard_bytes=4)
    index = json.loads((tmp_path / "task.safetensors.index.json").read_text())
    shards = [f"task-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == {"a": shards[0], "b": shards[1], "c": shards[2], "d": shards[2]}
    assert index["metadata"]["total_size"] == 15
    assert index["metadata"]["task"] == "french"
    assert_same(dict(open_importance(tmp_path / "task.safetensors.index.json")), written)  # as the shell completes it


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30])
def test_the_same_importance_gives_the_same_bytes(tmp_path, max_shard_bytes):
    contents = []
    for order in (list, reversed):
        folder = tmp_path / order.__name__
        shuffled = dict(order(list(importance().items())))
        metadata = dict(order([("task", "french"), ("model", "tiny"), ("score", "relevance")]))
        save_importance(folder / "task.safetensors", shuffled, metadata, max_shard_bytes)
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert contents[0] == contents[1]


class Counting(LazyImportance):
    """Makes tensors on demand and notes how many are alive."""

    def __init__(self, count, numel):
        self.shapes = {f"w{i:03d}": (numel,) for i in range(count)}
        self.bits = 8
        self.asked = []

    def __getitem__(self, name):
        self.asked.append(name)
        return torch.full(self.shapes[name], int(name[1:]) % 256, dtype=torch.uint8)


def test_a_lazy_mapping_is_written_with_each_tensor_made_once(tmp_path):
    lazy = Counting(20, 10)
    save_importance(tmp_path / "x.safetensors", lazy, {}, max_shard_bytes=50)
    assert lazy.asked == sorted(lazy.shapes)
    assert_same(dict(open_importance(tmp_path / "x.safetensors")), dict(Counting(20, 10)))


PEAK = """
import resource, sys, torch
from agcl.attribution.artefact import open_importance, save_importance
sys.path.insert(0, sys.argv[2])
from test_artefact import Counting
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
lazy = Counting(32, 2**22)
save_importance(sys.argv[1], Counting(1, 2**22), {})
before = peak()
save_importance(sys.argv[1], lazy, {}, max_shard_bytes=2**26)
print(peak() - before)
"""


def test_writing_never_holds_more_than_a_tensor(tmp_path):
    # 128 MiB in two shards; tensors of 4 MiB.
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x.safetensors"), str(Path(__file__).parent)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(output) < 2**25


def test_reading_a_name_reads_that_tensor_alone(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_importance(path, importance(), {})
    asked = []

    class Spy:
        def __init__(self, handle):
            self.handle = handle

        def get_tensor(self, name):
            asked.append(name)
            return self.handle.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.handle, name)

    monkeypatch.setattr(storage, "safe_open", lambda *args, **kwargs: Spy(safe_open(*args, **kwargs)))
    file = ImportanceFile(path)
    assert len(file) == len(importance())
    assert "matrix" in file
    assert "other" not in file
    check_importance(file, [(name, torch.empty(shape)) for name, shape in file.shapes.items()])
    assert asked == []
    assert torch.equal(file["matrix"], importance()["matrix"])
    assert asked == ["matrix"]


def test_what_is_read_is_the_readers_own(tmp_path):
    path = tmp_path / "x.safetensors"
    save_importance(path, {"w": torch.zeros(4, dtype=torch.uint8)}, {})
    file = open_importance(path, device="cpu")
    file["w"].fill_(7)
    assert not file["w"].any()
    with pytest.raises(KeyError):
        file["other"]


# ----------------------------------------------------------------- replacing


@pytest.mark.parametrize("before", [10**9, 40, 10])
@pytest.mark.parametrize("after", [10**9, 40, 10])
def test_replacing_leaves_nothing_of_the_old(tmp_path, before, after):
    path, other = tmp_path / "x.safetensors", tmp_path / "fresh" / "x.safetensors"
    save_importance(path, importance(seed=1), {"task": "old"}, before)
    save_importance(path, importance(seed=2), {"task": "new"}, after)
    save_importance(other, importance(seed=2), {"task": "new"}, after)
    assert names(tmp_path) == sorted([*names(other.parent), "fresh"])
    assert_same(dict(open_importance(path)), importance(seed=2))


def test_shards_of_a_model_under_the_same_name_are_left_alone(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({name: torch.zeros(2)}, tmp_path / name)
    index = {"metadata": {"total_size": 16}, "weight_map": {n: n for n in names(tmp_path)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    kept = names(tmp_path)
    save_importance(tmp_path / "model.safetensors", importance(), {})
    assert names(tmp_path) == sorted([*kept, "model.safetensors"])


class DiskFullError(OSError):
    pass


def crash_at(monkeypatch, step):
    """Fail at the step-th change of the folder from now on (renaming and deleting), as if the machine stopped there."""
    count = 0

    def wrapped(original):
        def change(self, *args, **kwargs):
            nonlocal count
            count += 1
            if count >= step:
                raise DiskFullError("stopped")
            return original(self, *args, **kwargs)

        return change

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, wrapped(getattr(Path, name)))


@pytest.mark.parametrize("before", [10**9, 40, 10])
@pytest.mark.parametrize("after", [10**9, 40, 10])
def test_a_crash_leaves_the_old_or_the_new_at_every_step(tmp_path, before, after):
    old, new = importance(seed=1), importance(seed=2)
    may_be_gone = before == after != 10**9  # the same shards' names
    seen = set()
    for step in range(1, 30):
        path = tmp_path / str(step) / "x.safetensors"
        save_importance(path, old, {"task": "old"}, before)
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_at(monkeypatch, step)
            with suppress(DiskFullError):
                save_importance(path, new, {"task": "new"}, after)
        if may_be_gone and not index_of(path).exists():
            assert_refused(path, "There is no importance file")
            seen.add("gone")
            continue
        found, metadata = load_importance(path)
        assert_same(found, {"old": old, "new": new}[metadata["task"]])
        seen.add(metadata["task"])
    assert seen - {"gone"} == {"old", "new"}


@pytest.mark.parametrize("step", ["tensor", "fsync", "replace"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30])
def test_a_failed_save_leaves_the_old_files_and_no_others(tmp_path, monkeypatch, step, max_shard_bytes):
    path = tmp_path / "x.safetensors"
    save_importance(path, importance(seed=1), {}, 10**9)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    class Failing(LazyImportance):
        shapes, bits = artefact.shapes_of(importance()), 8

        def __getitem__(self, name):
            return importance()[name] if name != "vector" else fail()

    if step == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_importance(path, Failing() if step == "tensor" else importance(), {}, max_shard_bytes)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_only_levels_of_one_kind_are_saved(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(AgclError, match=r"`matrix` is torch\.float32, not torch\.uint8 or torch\.uint16; pass it"):
        save_importance(path, {"matrix": torch.rand(2)}, {})
    with pytest.raises(AgclError, match="of `a` has 8 bits, of `b` 16"):
        save_importance(path, {"a": torch.zeros(1, dtype=torch.uint8), "b": torch.zeros(1, dtype=torch.uint16)}, {})
    assert names(tmp_path) == []


# ---------------------------------------------------------------- validation


def test_files_of_version_1_are_read(tmp_path):
    path, header = tmp_path / "x.safetensors", {"format": "agcl-importance", "format_version": "1", "task": "french"}
    save_file({"w": torch.tensor([1, 255], dtype=torch.uint8)}, path, metadata=header)
    found, metadata = load_importance(path)
    assert found["w"].tolist() == [1, 255]
    assert metadata == header


def test_truncated_and_missing_files_are_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    save_importance(path, importance(), {})
    content = path.read_bytes()
    for size in (0, 5, 40, len(content) - 1):
        path.write_bytes(content[:size])
        assert_refused(path, r"x\.safetensors is truncated or no importance file \(.*\); copy it again")
    assert_refused(tmp_path / "missing.safetensors", r"There is no importance file .*missing\.safetensors")
    assert_refused(tmp_path, "There is no importance file")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("max_shard_bytes", [2, 10**9])
def test_a_tensor_in_which_a_bit_has_changed_is_refused_when_it_is_read(tmp_path, dtype, max_shard_bytes):
    path = tmp_path / "x.safetensors"
    saved = {name: torch.arange(5).to(dtype) for name in "ab"} | {"scalar": torch.tensor(3).to(dtype)}
    save_importance(path, saved, {}, max_shard_bytes)
    assert all(torch.equal(open_importance(path)[name], levels) for name, levels in saved.items())
    file = open_importance(path).files[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of the file's last tensor
    file.write_bytes(content)
    names = [name for name in saved if name in safe_open(file, "pt").keys()]  # noqa: SIM118
    opened = open_importance(path)
    with pytest.raises(AgclError, match=rf"{file.name}: `{names[-1]}` is damaged, its checksum differs; copy it again"):
        opened[names[-1]]
    for name in set(saved) - {names[-1]}:
        assert torch.equal(opened[name], saved[name])
    with pytest.raises(AgclError, match="is damaged"):
        load_importance(path)


def test_files_without_checksums_are_read_and_such_as_cannot_be_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(2, dtype=torch.uint8)}, path, metadata=HEADER)
    found, metadata = load_importance(path)
    assert (found["w"].tolist(), metadata) == ([1, 1], HEADER)
    for checksums, message in (("[", "unreadable checksums"), ('{"v": "00000000"}', "other tensors than checksums")):
        save_file({"w": torch.ones(2, dtype=torch.uint8)}, path, metadata={**HEADER, "crc32": checksums})
        assert_refused(path, message)


HEADER = {"format": "agcl-importance", "format_version": "2"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"w": torch.uint8}, {}, r"foreign\.safetensors is not an importance file"),
        ({"w": torch.uint8}, {"format": "pt"}, r"foreign\.safetensors is not an importance file"),
        ({"w": torch.uint8}, {**HEADER, "format_version": "99"}, "format version 99; this agcl reads version 1 and 2"),
        ({"w": torch.float32}, HEADER, r"foreign\.safetensors: `w` is F32, not U8"),
        ({"a": torch.uint8, "w": torch.uint16}, HEADER, "`w` is U16, not U8"),
        ({"a": torch.uint8, "w": torch.uint16}, {**HEADER, "bits": "16"}, "`a` is U8, not U16"),
        ({"w": torch.uint8}, {**HEADER, "bits": "4"}, "says that it has 4 bits; importance has 8 or 16"),
    ],
)
def test_foreign_files_are_refused(tmp_path, tensors, metadata, message):
    path = tmp_path / "foreign.safetensors"
    save_file({name: torch.zeros(2, dtype=dtype) for name, dtype in tensors.items()}, path, metadata=metadata)
    assert_refused(path, message)


@pytest.fixture
def sharded(tmp_path):
    path = tmp_path / "x.safetensors"
    save_importance(path, {name: torch.zeros(3, dtype=torch.uint8) for name in "abcd"}, {"task": "t"}, 6)
    assert names(tmp_path) == [
        "x-00001-of-00002.safetensors",
        "x-00002-of-00002.safetensors",
        "x.safetensors.index.json",
    ]
    return path


def change_index(path, change):
    index_path = path.with_name(path.name + ".index.json")
    index = json.loads(index_path.read_text())
    change(index)
    index_path.write_text(json.dumps(index))


def shard(path, number):
    return path.with_name(f"x-0000{number}-of-00002.safetensors")


def test_shards_at_odds_with_the_index_are_refused(sharded):
    content = shard(sharded, 2).read_bytes()
    shard(sharded, 2).unlink()
    assert_refused(sharded, r"There is no importance file .*x-00002-of-00002\.safetensors")
    shard(sharded, 2).write_bytes(content[:-1])
    assert_refused(sharded, r"x-00002-of-00002\.safetensors is truncated")
    shard(sharded, 2).write_bytes(shard(sharded, 1).read_bytes())  # a and b twice
    assert_refused(sharded, r"x-00002-of-00002\.safetensors does not agree with its index: `a` is in the shard")


def test_shards_of_another_save_are_refused(sharded):
    mixed = sharded.with_name("other.safetensors")
    save_importance(mixed, {name: torch.ones(3, dtype=torch.uint8) for name in "abcd"}, {"task": "u"}, 6)
    shard(sharded, 1).write_bytes(mixed.with_name("other-00001-of-00002.safetensors").read_bytes())
    assert_refused(sharded, r"x-00001-of-00002\.safetensors and its index were not written together")


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", 3])
def test_an_index_that_leads_out_of_its_folder_is_refused(sharded, file):
    change_index(sharded, lambda index: index["weight_map"].update(b=file))
    assert_refused(sharded, "`b` is in .*, not in a file beside the index")


def test_an_index_that_names_or_lacks_a_tensor_too_many_is_refused(sharded):
    change_index(sharded, lambda index: index["weight_map"].update(e=shard(sharded, 1).name))
    assert_refused(sharded, "`e` is there, but not in the shard")
    change_index(sharded, lambda index: [index["weight_map"].pop(name) for name in ("a", "e")])
    assert_refused(sharded, "`a` is in the shard, but not there")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"metadata": {}, "weight_map": []}', '{"metadata": 1}'])
def test_a_damaged_index_is_refused(sharded, text):
    sharded.with_name(sharded.name + ".index.json").write_text(text)
    assert_refused(sharded, r"x\.safetensors\.index\.json is no index of shards")


def test_the_index_of_a_model_is_refused(sharded):
    change_index(sharded, lambda index: index["metadata"].pop("format"))
    assert_refused(sharded, r"x\.safetensors\.index\.json is not an importance file")


def test_a_shard_alone_is_refused_with_the_name_of_the_whole(sharded):
    assert_refused(shard(sharded, 2), r"is shard 2 of 2 of an importance file; name .*/x\.safetensors instead")


# ------------------------------------------------------------ fit to a model


def test_check_names_what_does_not_fit(tmp_path):
    model = torch.nn.Linear(3, 2)
    fitting = {"weight": torch.zeros(2, 3, dtype=torch.uint8)}
    check_importance(fitting, model.named_parameters())
    with pytest.raises(AgclError, match=r"`weight` has shape \(3, 2\), the model's parameter \(2, 3\)"):
        check_importance({"weight": fitting["weight"].T}, model.named_parameters())
    with pytest.raises(AgclError, match=r"`lora` \(2, 3\): the model has no such parameter"):
        check_importance({"lora": fitting["weight"]}, model.named_parameters())
    path = tmp_path / "x.safetensors"
    save_importance(path, {"lora": fitting["weight"]}, {"model": "tiny/llama"})
    with pytest.raises(AgclError, match="no such parameter; it was made for the model `tiny/llama`"):
        check_importance(open_importance(path), model.named_parameters())


def test_exact_check_wants_the_same_weights():
    model = torch.nn.Linear(3, 2)
    fitting = {"weight": torch.zeros(2, 3, dtype=torch.uint8)}
    metadata = {"fingerprint": fingerprint(model.named_parameters()), "model": "tiny"}
    check_importance(fitting, model.named_parameters(), metadata, exact=True)
    with torch.no_grad():
        model.weight[1, 2] += 1e-3
    check_importance(fitting, model.named_parameters(), metadata)
    with pytest.raises(AgclError, match="same parameters but other weights; it was made for the model `tiny`"):
        check_importance(fitting, model.named_parameters(), metadata, exact=True)
    with pytest.raises(AgclError, match="carries no `fingerprint`"):
        check_importance(fitting, model.named_parameters(), exact=True)


def reference_fingerprint(parameters):
    digest = hashlib.sha256()
    for name in sorted(parameters):
        parameter = parameters[name]
        digest.update(f"{name}\0{tuple(parameter.shape)}\0{parameter.dtype}\0".encode())
        flat = parameter.contiguous().view(torch.uint8).flatten().numpy()
        width = parameter.element_size()
        count = min(parameter.numel(), 256)
        for i in range(count):
            position = i * (parameter.numel() - 1) // max(count - 1, 1)
            digest.update(flat[position * width : (position + 1) * width].tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_fingerprint_against_its_definition(dtype):
    shapes = {"b": (1000, 3), "a": (7, 5), "one": (1,), "none": (0, 2), "exact": (256,)}
    parameters = {name: (torch.randn(shape) * 9).to(dtype) for name, shape in shapes.items()}
    expected = reference_fingerprint(parameters)
    assert fingerprint(parameters.items()) == expected
    assert fingerprint(reversed(parameters.items())) == expected
    strided = {name: value.T.contiguous().T if value.ndim == 2 else value for name, value in parameters.items()}
    assert not strided["b"].is_contiguous()
    assert fingerprint(strided.items()) == expected


def test_fingerprint_sees_names_shapes_dtypes_and_values():
    base = {"a": torch.zeros(300, 2), "s": torch.tensor(1.0)}
    last = base["a"].clone()
    last[-1, -1] = 1
    variants = [
        base,
        {"b": base["a"], "s": base["s"]},
        {**base, "a": base["a"].T},
        {**base, "a": base["a"].bfloat16()},
        {**base, "a": last},
        {"a": base["a"]},
    ]
    assert len({fingerprint(variant.items()) for variant in variants}) == len(variants)


def test_fingerprint_of_a_model_without_values_is_refused():
    with pytest.raises(AgclError, match=r"`weight` has no values \(meta device\)"):
        fingerprint(torch.nn.Linear(2, 2, bias=False, device="meta").named_parameters())


def test_reading_needs_neither_transformers_nor_lightning():
    code = (
        "import sys, agcl.attribution.artefact, agcl.attribution.merging\n"
        "sys.exit(bool({'transformers', 'lightning'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
