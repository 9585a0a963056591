import math

import pytest
import torch

from agcl.attribution import levels as levels_module
from agcl.attribution import open_importance, save_importance
from agcl.blocks import kind_of, layer_of, mean_by_layer
from agcl.errors import AgclError
from agcl.plots import (
    importance_overlap,
    importance_overlaps,
    join_characters,
    plot_importance_map,
    plot_importance_overlap,
    plot_plasticity,
    token_relevance_html,
)


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "layer 12", "q_proj"),
        ("model.embed_tokens.weight", "embed_tokens", "embed_tokens"),
        ("model.norm.weight", "norm", "norm"),
        ("transformer.h.3.mlp.c_fc.bias", "layer 03", "c_fc"),
        ("layers.5.mlp.up_proj.weight", "layer 05", "up_proj"),
        ("5.up_proj.weight", "layer 05", "up_proj"),
        ("transformer.wpe.weight", "wpe", "wpe"),
        ("transformer.h.0.attn.c_proj.weight", "layer 00", "attn.c_proj"),
        ("transformer.h.0.mlp.c_proj.weight", "layer 00", "mlp.c_proj"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "layer 00", "up_proj"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "layer 00", "up_proj.lora_A"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.learning.weight", "layer 00", "up_proj.lora_B"),
        ("base_model.model.transformer.h.0.mlp.c_proj.lora_A.task1.weight", "layer 00", "mlp.c_proj.lora_A"),
        ("base_model.model.layers.3.mlp.up.lora_magnitude_vector.t.weight", "layer 03", "up.lora_magnitude_vector"),
        ("base_model.model.lm_head.modules_to_save.learning.weight", "lm_head", "lm_head"),
    ],
)
def test_names_are_parsed(name, layer, kind):
    assert (layer_of(name), kind_of(name)) == (layer, kind)


def test_means_of_layers_weigh_each_weight_alike():
    values = {name: levels.double() / 255 for name, levels in importance(0).items()}
    values["model.layers.1.norm.weight"] = torch.ones(3, dtype=torch.float64)
    means = mean_by_layer({name: (float(v.mean()), v.numel()) for name, v in values.items()} | {"empty": (0.0, 0)})
    assert list(means) == ["layer 00", "layer 01", "layer 02", "embed_tokens"]
    for layer, (mean, count) in means.items():
        own = torch.cat([v.flatten() for name, v in values.items() if layer_of(name) == layer])
        assert (mean, count) == (pytest.approx(own.mean().item()), len(own))


def importance(seed):
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{i}.mlp.{kind}.weight" for i in range(3) for kind in ("up_proj", "down_proj")]
    shapes = dict.fromkeys(names, (8, 8)) | {"model.embed_tokens.weight": (16, 4)}
    return {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for name, shape in shapes.items()
    }


def test_map_shows_the_mean_of_each_cell():
    values = importance(0)
    _, ax = plot_importance_map(values)
    grid = ax.images[0].get_array()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["layer 00", "layer 01", "layer 02", "embed_tokens"]
    kinds = [label.get_text() for label in ax.get_xticklabels()]
    expected = values["model.layers.1.mlp.down_proj.weight"].double().mean() / 255
    assert grid[1, kinds.index("down_proj")] == pytest.approx(expected.item())
    assert grid.mask.sum() == 4 * 3 - 7  # cells without a parameter stay blank


def test_columns_of_one_module_stand_side_by_side():
    kinds = ("self_attn.q_proj", "mlp.up_proj", "norm1", "self_attn.k_proj", "mlp.down_proj")
    names = ["model.norm.weight", *(f"model.layers.{i}.{kind}.weight" for i in range(2) for kind in kinds)]
    _, ax = plot_importance_map({name: torch.ones(1) for name in names})
    found = [label.get_text() for label in ax.get_xticklabels()]
    assert found == ["down_proj", "up_proj", "norm1", "k_proj", "q_proj", "norm"]


def test_overlap_names_what_chance_gives():
    importances = {f"task{i}": {"w": torch.rand(100_000)} for i in range(2)}
    _, axes = plot_importance_overlap(importances, top_share=0.1)
    assert axes[1].get_xlabel() == "unrelated tasks: about 0.053"
    assert importance_overlap(*importances.values(), 0.1)[1] == pytest.approx(0.053, abs=0.005)


def test_map_of_floats_is_the_map_of_the_fixed_point_values():
    values = importance(0)
    floats = {name: levels.double() / 255 for name, levels in values.items()}
    grids = [plot_importance_map(x)[1].images[0].get_array() for x in (values, floats)]
    assert grids[0].compressed() == pytest.approx(grids[1].compressed())


def row_labels(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_rows_follow_the_numbers_of_the_layers():
    values = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(1, 1) for i in (100, 11, 2)}
    _, ax = plot_importance_map(values | {"layernorm_in.weight": torch.ones(1)})
    assert row_labels(ax) == ["layer 02", "layer 11", "layer 100", "layernorm_in"]


def test_plasticity_has_a_row_for_each_layer_and_a_column_for_each_task():
    _, ax = plot_plasticity({"a": {"norm": 0.5, "layer 00": 0.9}, "b": {"layer 00": 0.75}})
    assert row_labels(ax) == ["layer 00", "norm"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["after a", "after b"]
    image = ax.images[0]
    assert image.get_array().filled(-1).tolist() == [[0.9, 0.75], [0.5, -1]]  # blank where there is no value
    assert image.get_clim() == (0, 1)  # comparable between runs


@pytest.mark.parametrize(("draw", "nothing"), [(plot_importance_map, {}), (plot_plasticity, {"a": {}})])
def test_nothing_to_draw_is_refused(draw, nothing):
    with pytest.raises(AgclError, match="nothing to draw"):
        draw(nothing)


def test_overlap_against_sets():
    a, b = importance(1), importance(2)
    flat_a, flat_b = (torch.cat([v.flatten().double() for v in x.values()]) for x in (a, b))
    cosine, iou = importance_overlap(a, b, top_share=0.1)
    assert cosine == pytest.approx(torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=0).item())
    count = -(-len(flat_a) // 10)
    top_a, top_b = (
        set((f >= f.sort(descending=True).values[count - 1]).nonzero().flatten().tolist()) for f in (flat_a, flat_b)
    )
    assert iou == pytest.approx(len(top_a & top_b) / len(top_a | top_b))
    assert importance_overlap(a, a) == pytest.approx((1.0, 1.0))
    nothing = {name: torch.zeros_like(values) for name, values in a.items()}
    assert importance_overlap(a, nothing) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap_of_floats_is_that_of_the_same_levels(dtype):
    a, b = importance(1), importance(2)
    for share in (0.01, 0.1, 0.5):
        floats = [{name: levels.to(dtype) / 256 for name, levels in x.items()} for x in (a, b)]  # / 256 is exact
        assert importance_overlap(*floats, share) == pytest.approx(importance_overlap(a, b, share))
    sparse = {"w": torch.tensor([0.0, 0.0, 0.0, 1e-30])}
    assert importance_overlap(sparse, {"w": torch.ones(4)}, top_share=1.0) == (0.5, 0.25)  # zeros are never in
    assert importance_overlap({"w": torch.zeros(4)}, sparse) == (0.0, 0.0)


def test_overlap_of_different_parameters_is_refused():
    a = importance(1)
    b = {name: levels for name, levels in a.items() if "layers.2.mlp.up" not in name}
    for pair in ((a, b), (b, a)):
        with pytest.raises(AgclError, match=r"covers `model\.layers\.2\.mlp\.up_proj\.weight`"):
            importance_overlap(*pair)
    b = {name: values.reshape(-1) for name, values in a.items()}
    with pytest.raises(AgclError, match=r"has shape \(16, 4\) in the first and \(64,\) in the second"):
        importance_overlap(a, b)


@pytest.mark.parametrize("kind", ["mapping", "file"])
def test_overlaps_of_16_bits_are_those_of_the_same_importance_in_8(kind, tmp_path):
    eight = {"a": importance(1), "b": importance(2), "c": importance(3)}
    mixed = {**eight, "b": {name: (levels.int() * 257).to(torch.uint16) for name, levels in eight["b"].items()}}
    if kind == "file":
        for task, levels in mixed.items():
            save_importance(tmp_path / f"{task}.safetensors", levels, {}, max_shard_bytes=200)
        mixed = {task: open_importance(tmp_path / f"{task}.safetensors") for task in mixed}
    for share in (0.01, 0.3):
        for expected, found in zip(importance_overlaps(eight, share), importance_overlaps(mixed, share), strict=True):
            assert torch.allclose(expected, found, atol=1e-12)
            assert torch.equal(found, found.T)
    assert plot_importance_map(mixed["b"])[1].images[0].get_array().compressed() == pytest.approx(
        plot_importance_map(eight["b"])[1].images[0].get_array().compressed()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("share", [1e-9, 0.003, 0.5, 0.999])
def test_top_level_of_floats_is_that_of_sorting(monkeypatch, dtype, share):
    monkeypatch.setattr(levels_module, "CHUNK", 100)
    shapes = {"a": (30, 7), "b": (401,), "c": ()}
    values = {
        name: (torch.rand(shape) * 10.0 ** torch.randint(-6, 3, shape)).to(dtype) for name, shape in shapes.items()
    }
    flat = torch.cat([value.double().flatten() for value in values.values()]).sort(descending=True).values
    reached = max(float(flat[max(1, math.ceil(share * len(flat))) - 1]), 5e-324)
    top = {name: (value.double() >= reached).to(dtype) for name, value in values.items()}  # a set is its own top set
    assert importance_overlap(values, top, share)[1] == 1


def test_overlap_picture_is_symmetric_and_in_the_order_of_the_tasks():
    importances = {f"task{i}": importance(i) for i in range(3)}
    _, axes = plot_importance_overlap(importances, top_share=0.1)
    expected = [[importance_overlap(x, y, 0.1) for y in importances.values()] for x in importances.values()]
    for panel in range(2):
        for row, shown in zip(expected, axes[panel].images[0].get_array().tolist(), strict=True):
            assert shown == pytest.approx([pair[panel] for pair in row])


@pytest.mark.parametrize("num", [1, 3, 12])
def test_nothing_is_cut_off(num):
    tasks = [*(f"task{i}" for i in range(num)), "a_rather_long_task_name"]
    pictures = [
        plot_importance_overlap({task: importance(i) for i, task in enumerate(tasks)}),
        plot_plasticity({task: {f"layer {i:02d}": 0.5 for i in range(num)} for task in tasks}),
        plot_importance_map({f"layers.{i}.post_attention_layernorm.weight": torch.ones(2) for i in range(num)}),
    ]
    for figure, _ in pictures:
        figure.draw_without_rendering()
        box = figure.get_tightbbox()  # inches
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.get_figwidth()
        assert box.y1 <= figure.get_figheight()


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_titles_of_the_two_panels_stay_apart(num_tasks):
    figure, axes = plot_importance_overlap({f"task{i}": importance(i) for i in range(num_tasks)})
    figure.draw_without_rendering()
    left, right = (ax.title.get_window_extent() for ax in axes)
    assert left.x1 + 5 < right.x0
    assert right.x1 < figure.bbox.width


def test_overlap_picture_has_a_number_for_each_pair():
    _, axes = plot_importance_overlap({f"task{i}": importance(i) for i in range(4)})
    assert [len(ax.texts) for ax in axes] == [16, 16]
    assert axes[0].texts[0].get_text() == "1.00"


def test_token_colours_and_escaping():
    text = token_relevance_html(["<b>", " a", "c"], torch.tensor([2.0, -1.0, 0.0]))
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "rgb(255,102,102)" in text  # the largest: strong red
    assert "rgb(178,178,255)" in text  # half as large and negative: light blue
    assert "rgb(255,255,255)" in text
    assert "\u21b5\n</span>" in token_relevance_html(["\n"], [0.5])  # else nothing would be coloured
    assert token_relevance_html(["x"], [0.0])


def test_tokens_of_one_character_are_joined():
    pieces = [b"a", b" \xc3", b"\x87", b"b"]  # the third completes the second's character
    texts, values = join_characters(
        lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"), [0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0]
    )
    assert texts == ["a", " \u00c7", "b"]
    assert values == [1.0, 5.0, 4.0]
