"""Stochastic depth over the global batch; that several processes give what one gives is tested with the tasks."""

import copy
import io

import timm
import torch
from timm.layers import DropPath

from timm_tokens.tasks.drop_path import GlobalDropPath, make_drop_paths_global


def drops(x, **attributes):
    layer = GlobalDropPath(0.4).train()
    layer.__dict__.update(attributes)
    return layer(x)


def test_a_process_takes_its_part_of_what_one_draws():
    x = torch.randn(24, 5, 3)  # two crops of twelve images
    torch.manual_seed(7)
    whole = DropPath(0.4).train()(x).unflatten(0, (2, 12))
    rows = torch.tensor([3, 11, 4, 0])
    part = x.unflatten(0, (2, 12))[:, rows].flatten(0, 1)
    found = drops(part, generator=torch.Generator().manual_seed(7), rows=rows, total=12)
    assert torch.equal(found, whole[:, rows].flatten(0, 1)) and (found == 0).all((1, 2)).any()


def test_elsewhere_it_is_timms():
    x, rows = torch.randn(6, 2), torch.arange(4)
    torch.manual_seed(3)
    expected = DropPath(0.4).train()(x)
    for attributes in ({}, {"rows": rows, "total": 8}):  # six are not crops of four images
        torch.manual_seed(3)
        assert torch.equal(drops(x, **attributes), expected)
    layer = GlobalDropPath(0.4).eval()
    layer.rows, layer.total = rows, 8
    assert layer(x[:4]) is not None and torch.equal(layer(x[:4]), x[:4])
    compiled = torch.compile(GlobalDropPath(0.4).train(), fullgraph=True, backend="eager")
    assert compiled(x).shape == x.shape


def test_a_models_drop_paths_are_replaced_and_can_be_copied():
    model = timm.create_model("test_vit", drop_path_rate=0.3)
    made = make_drop_paths_global(model)
    assert len(made) == sum(isinstance(m, DropPath) for m in model.modules()) > 0
    assert [m.drop_prob for m in made] == [
        m.drop_prob for m in timm.create_model("test_vit", drop_path_rate=0.3).modules() if isinstance(m, DropPath)
    ]
    made[0].generator, made[0].rows = torch.Generator(), torch.arange(2)
    again = next(m for m in copy.deepcopy(model).modules() if isinstance(m, GlobalDropPath))
    assert again.generator is None and again.rows is None
    torch.save(model, io.BytesIO())
