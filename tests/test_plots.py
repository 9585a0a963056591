import pytest
import torch

from agcl.plots import (
    importance_overlap,
    kind_of,
    layer_of,
    plot_importance_map,
    plot_importance_overlap,
    token_relevance_html,
)


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "layer 12", "q_proj"),
        ("model.embed_tokens.weight", "embed_tokens", "embed_tokens"),
        ("model.norm.weight", "norm", "norm"),
        ("transformer.h.3.mlp.c_fc.bias", "layer 03", "c_fc"),
        ("transformer.wpe.weight", "wpe", "wpe"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "layer 00", "lora_A"),
    ],
)
def test_names_are_parsed(name, layer, kind):
    assert (layer_of(name), kind_of(name)) == (layer, kind)


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


def test_overlap_picture_has_a_number_for_each_pair():
    _, axes = plot_importance_overlap({f"task{i}": importance(i) for i in range(4)})
    assert [len(ax.texts) for ax in axes] == [16, 16]
    assert axes[0].texts[0].get_text() == "1.00"


def test_token_colours_and_escaping():
    text = token_relevance_html(["<b>", " a", "c"], torch.tensor([2.0, -1.0, 0.0]))
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "rgb(255,51,51)" in text  # the largest: strong red
    assert "rgb(153,153,255)" in text  # half as large and negative: light blue
    assert "rgb(255,255,255)" in text
    assert token_relevance_html(["x"], [0.0])
