"""The commands on importance files as users run them: output, files, refusals."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agcl.attribution import load_importance, merge, save_importance
from agcl.cli import main
from agcl.commands import COMMANDS
from agcl.commands.importance import compare, show
from agcl.errors import AgclError
from agcl.plots import importance_overlap

NAMES = [f"model.layers.{i}.mlp.{kind}.weight" for i in (0, 1, 10) for kind in ("up_proj", "down_proj")]
SHAPES = dict.fromkeys(NAMES, (16, 12)) | {"model.embed_tokens.weight": (64, 4), "model.norm.weight": (12,)}


def importance(seed, bits=8):
    generator = torch.Generator().manual_seed(seed)
    largest = 256 ** (bits // 8) - 1
    return {
        name: (torch.rand(shape, generator=generator).pow(3) * (largest + 0.9))
        .to(torch.int32)
        .to(torch.uint8 if bits == 8 else torch.uint16)
        for name, shape in SHAPES.items()
    }


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"0{i}_{task}.safetensors" for i, task in enumerate(["welsh", "irish", "breton"])]
    for seed, path in enumerate(paths):
        metadata = {"task": path.stem[3:], "model": "tiny/llama", "num_samples": 16 + seed, "score": "relevance"}
        save_importance(path, importance(seed), metadata, max_shard_bytes=500 if seed == 1 else 10**9)
    return paths


def run(capsys, *words):
    main(["importance", *map(str, words)])
    out, err = capsys.readouterr()
    assert err == ""
    assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)  # a path is not broken up
    return out


def cells(out, label):
    """The cells of the row that begins with the label; runs of two blanks or more part them."""
    row = next(line for line in out.splitlines() if re.match(rf"\s*{re.escape(label)}\s\s", line))
    return re.split(r"\s{2,}", row.strip().removeprefix(label).strip())


def expected_cells(tensors):
    flat = np.concatenate([tensor.numpy().astype(np.float64).ravel() for tensor in tensors])
    flat /= 255 if tensors[0].dtype == torch.uint8 else 65535
    shares = [(flat > 0.5).mean(), (flat == 0).mean(), (flat == 1).mean()]
    return [f"{len(flat):,}", f"{flat.mean():.3f}", *(f"{100 * s:.1f} %" for s in shares)]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 300])
def test_show_has_metadata_size_and_values_by_layer_and_kind(tmp_path, capsys, bits, max_shard_bytes):
    path, levels = tmp_path / "x.safetensors", importance(0, bits)
    save_importance(path, levels, {"task": "welsh", "model": "tiny/llama", "fingerprint": "3f" * 32}, max_shard_bytes)
    out = run(capsys, "show", path)
    assert str(path) in out
    for row in (
        "task +welsh",
        "model +tiny/llama",
        f"fingerprint +{'3f' * 32}",
        r"written by +agcl .*, format version 2",
    ):
        assert re.search(row, out), row
    assert f"8 tensors, 1,420 weights of {bits} bits" in out
    assert bool(re.search(r"in \d+ files", out)) == (max_shard_bytes == 300)
    for layer in ("0", "1", "10"):
        members = [levels[name] for name in NAMES if f".{layer}." in name]
        assert cells(out, f"layer {int(layer):02d}") == expected_cells(members)
    for kind in ("up_proj", "down_proj", "embed_tokens", "norm"):
        assert cells(out, kind) == expected_cells([values for name, values in levels.items() if kind in name])
    assert cells(out, "all") == expected_cells(list(levels.values()))
    assert out.index("layer 01") < out.index("layer 10") < out.index("embed_tokens")


def test_show_does_not_round_to_none_or_all(tmp_path, capsys):
    nearly = torch.zeros(100, 100, dtype=torch.uint8)
    nearly[0, 0] = 255
    save_importance(tmp_path / "x.safetensors", {"norm": nearly}, {})
    assert cells(run(capsys, "show", tmp_path / "x.safetensors"), "norm") == [
        "10,000",
        "0.000",
        "< 0.1 %",
        "> 99.9 %",
        "< 0.1 %",
    ]


def test_show_of_hostile_metadata_and_of_nothing(tmp_path, capsys):
    save_importance(tmp_path / "x.safetensors", {}, {"task": "[bold]not markup[/nothing]"})
    out = run(capsys, "show", tmp_path / "x.safetensors")
    assert "[bold]not markup[/nothing]" in out
    assert "0 tensors, 0 weights" in out


@pytest.mark.parametrize("how", ["maximum", "mean", "probabilistic_or"])
def test_merge_writes_what_the_function_gives(files, tmp_path, capsys, how):
    output = tmp_path / "new" / "merged.safetensors"
    out = run(capsys, "merge", *files, "--how", how, "--output", output)
    assert f"Merged 3 files by {how} into {output}: 8 tensors, 1,420 weights of 8 bits" in out
    found, metadata = load_importance(output)
    expected = merge([importance(seed) for seed in range(3)], how)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert metadata["merged"] == how
    assert json.loads(metadata["tasks"]) == ["welsh", "irish", "breton"]
    assert metadata["model"] == "tiny/llama"
    assert metadata.keys().isdisjoint({"task", "num_samples"})  # which differ


def test_merge_in_16_bits_and_of_merged_files(files, tmp_path, capsys):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run(capsys, "merge", *files[:2], "--how", "mean", "--bits", 16, "--output", first)
    run(capsys, "merge", first, files[2], "--output", second)
    found, metadata = load_importance(second)
    assert {levels.dtype for levels in found.values()} == {torch.uint16}
    assert json.loads(metadata["tasks"]) == ["welsh", "irish", "breton"]
    assert "welsh, irish, breton" in run(capsys, "show", second)


def test_merge_says_what_the_files_do_not_share(files, tmp_path, capsys):
    levels = importance(5)
    del levels["model.norm.weight"]
    save_importance(
        files[2], levels, {"task": "breton", "model": "other", "estimator": "Fisher", "score": "sensitivity"}
    )
    out = " ".join(run(capsys, "merge", *files, "--output", tmp_path / "m.safetensors").split())
    assert "1 of 8 parameters are in some of the files only, such as `model.norm.weight`" in out
    assert "their importance counts as 0" in out
    assert "the files differ in `model`: tiny/llama, other." in out
    assert "the files differ in `score`: relevance, sensitivity." in out
    assert "the files differ in `estimator`: not said, Fisher." in out
    out = run(capsys, "merge", *files[:2], "--output", tmp_path / "n.safetensors")
    assert "Note" not in out


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_compare_shows_each_pair(files, capsys, share):
    out = run(capsys, "compare", *files, "--top_share", share)
    cosine, overlap = out.split(f"Top {100 * share:g} %")
    for row, task in enumerate(["1   welsh", "2   irish", "3   breton"]):
        expected = [importance_overlap(importance(row), importance(column), share) for column in range(3)]
        for part, panel in ((cosine, 0), (overlap, 1)):
            assert cells(part, task) == [f"{pair[panel]:.3f}" for pair in expected]


def test_compare_names_files_whose_tasks_are_the_same(files, capsys):
    twin = files[0].with_name("twin.safetensors")
    save_importance(twin, importance(0), {"task": "welsh"})
    out = run(capsys, "compare", files[0], twin)
    assert cells(out, "1   00_welsh.safetensors") == ["1.000", "1.000"]
    assert cells(out, "2   twin.safetensors") == ["1.000", "1.000"]


@pytest.mark.parametrize("command", ["show", "compare"])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_figures_are_drawn(files, tmp_path, capsys, command, ending):
    figure = tmp_path / "figures" / f"picture.{ending}"
    out = run(capsys, command, *files[: 1 if command == "show" else 3], "--figure", figure)
    assert f"Figure: {figure}" in out
    assert figure.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def refused(capsys, message, *words):
    with pytest.raises(SystemExit) as exit_info:
        main(["importance", *map(str, words)])
    text = exit_info.value.code
    assert isinstance(text, str)  # printed to stderr, status 1
    assert text.startswith("agcl: error: ")
    assert "\n" not in text
    assert re.search(message, text), text
    assert capsys.readouterr().out == ""


def test_existing_files_are_replaced_only_on_demand(files, tmp_path, capsys):
    figure, output = tmp_path / "x.png", tmp_path / "merged.safetensors"
    run(capsys, "show", files[0], "--figure", figure)
    run(capsys, "merge", *files[:2], "--output", output)
    before = {path: path.read_bytes() for path in (figure, output)}
    refused(capsys, r"x\.png exists; choose another name, or add --overwrite", "show", files[1], "--figure", figure)
    refused(capsys, r"x\.png exists", "compare", *files, "--figure", figure)
    refused(capsys, r"merged\.safetensors exists", "merge", *files, "--output", output)
    refused(capsys, r"01_irish\.safetensors\.index\.json exists", "merge", *files, "--output", files[1])
    assert {path: path.read_bytes() for path in (figure, output)} == before
    run(capsys, "merge", *files, "--output", output, "--overwrite")
    run(capsys, "show", files[1], "--figure", figure, "--overwrite")
    assert all(path.read_bytes() != content for path, content in before.items())
    # Into one of the inputs: they are read to the end before it is replaced.
    expected = dict(merge([importance(seed) for seed in range(3)]))
    run(capsys, "merge", *files, "--output", files[1], "--overwrite")
    assert all(torch.equal(levels, expected[name]) for name, levels in load_importance(files[1])[0].items())


def test_what_cannot_work_is_one_line(files, tmp_path, capsys):
    refused(capsys, r"There is no importance file /nowhere", "show", "/nowhere.safetensors")
    refused(capsys, r"no known ending; choose one of .*png", "show", files[0], "--figure", tmp_path / "x.nonsense")
    refused(capsys, "nothing to compare .*welsh.* with", "compare", files[0])
    refused(capsys, "is named twice", "compare", files[0], files[0])
    refused(capsys, "`top_share` is 0; choose", "compare", *files, "--top_share", 0)
    other = tmp_path / "other.safetensors"
    save_importance(other, {"w": torch.zeros(2, dtype=torch.uint8)}, {"task": "other"})
    refused(capsys, "Only one of welsh and other covers `model", "compare", files[0], other)
    save_importance(
        other, {name: levels.reshape(levels.shape[::-1]) for name, levels in importance(0).items()}, {"task": "other"}
    )
    refused(capsys, r"has shape \(64, 4\) in welsh and \(4, 64\) in other", "compare", files[0], other)
    refused(capsys, r"has shape \(4, 64\)", "merge", files[0], other, "--output", tmp_path / "m.safetensors")
    refused(capsys, "File exists", "merge", *files, "--output", files[0] / "m.safetensors")
    files[0].write_bytes(files[0].read_bytes()[:-1])
    refused(capsys, r"00_welsh\.safetensors is truncated", "merge", *files, "--output", tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["importance"], "show,merge,compare"),
        (["importance", "show"], "importance.show.file"),
        (["importance", "merge", "a.safetensors"], "importance.merge.output"),
        (["importance", "merge", "a", "--output", "b", "--how", "sum"], "Got value: sum"),
        (["importance", "merge", "a", "--output", "b", "--bits", "4"], "one of [8, 16]"),
        (["importance", "show", "a", "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_arguments_are_a_usage_error(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.splitlines()[-1].startswith("agcl: error: ")
    assert "See `agcl importance" in err


def test_help_lists_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["agcl"])
    with pytest.raises(SystemExit):
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())  # lines break anywhere
    assert "fit" in out
    for name in COMMANDS:
        assert f"agcl {name}" in out
    with pytest.raises(SystemExit):
        main(["importance", "--help"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("usage: agcl importance", "show", "merge", "compare"))
    with pytest.raises(SystemExit):
        main(["importance", "merge", "--help"])
    out = capsys.readouterr().out
    for text in (
        "usage: agcl importance merge",
        "FILE [FILE ...]",
        "{maximum,mean,probabilistic_or}",
        "The file to write",
    ):
        assert text in out


def test_the_commands_are_functions_too(files, capsys):
    show(files[0])
    assert "tiny/llama" in capsys.readouterr().out
    with pytest.raises(AgclError, match="nothing to compare"):
        compare(files[0])


def test_no_command_loads_lightning_or_transformers(files):
    code = (
        "import sys; from agcl.cli import main\n"
        f"main(['importance', 'show', {str(files[0])!r}])\n"
        "sys.exit(bool({'transformers', 'lightning', 'datasets'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False).returncode == 0
