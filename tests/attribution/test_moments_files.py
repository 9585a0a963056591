"""Input moments in files: read as written, replaced whole, refused with the reason."""

import pytest
import torch
from safetensors.torch import save_file

from agcl.attribution.directions import InputMoments
from agcl.attribution.moments_files import load_input_moments, save_input_moments
from agcl.errors import AgclError


def moments(scale=1.0):
    return InputMoments({"a": scale * torch.eye(3), "b.weight": torch.ones(2, 2).T}, {"a": True, "b.weight": False})


def test_moments_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "folder" / "old.safetensors"
    save_input_moments(path, moments(), {"task": "names"})
    found = load_input_moments(path)
    assert found.transposed == {"a": True, "b.weight": False}
    assert all(torch.equal(tensor, moments().sums[name]) for name, tensor in found.sums.items())
    save_input_moments(path, moments(2.0))
    assert torch.equal(load_input_moments(path).sums["a"], 2 * torch.eye(3))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_used_is_refused(tmp_path):
    path = tmp_path / "old.safetensors"
    with pytest.raises(AgclError, match="There is no file"):
        load_input_moments(path)
    save_input_moments(path, moments())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(AgclError, match="is truncated"):
        load_input_moments(path)
    save_file({"a": torch.eye(3)}, path)
    with pytest.raises(AgclError, match="holds no input moments"):
        load_input_moments(path)
    path.write_bytes(whole.replace(b'"format_version":"1"', b'"format_version":"9"'))
    with pytest.raises(AgclError, match="format version 9"):
        load_input_moments(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "old.safetensors"
    save_input_moments(path, moments())

    def fail(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("agcl.attribution.moments_files.save_file", fail)
    with pytest.raises(AgclError, match=r"could not be written \(No space left"):
        save_input_moments(path, moments(2.0))
    assert torch.equal(load_input_moments(path).sums["a"], torch.eye(3))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
