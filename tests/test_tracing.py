"""What runs eagerly runs the same traced and exported, whatever the example's batch was; or it is refused in words."""

import io

import pytest
import tiny
import torch
from families import MERGEABLE, create, images
from timm.models import create_model
from torch import nn

from timm_tokens import add_aux_tokens, apply_dtem_merging, token_label_head

OLD = pytest.mark.filterwarnings(
    "ignore:`torch.jit.*is deprecated:FutureWarning",
    "ignore::DeprecationWarning",  # of torch's old exporter, by itself
    "ignore::torch.jit.TracerWarning",
)


class Calling(nn.Module):
    """A model inside of another module, called in one of its forms."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x):
        return self.call(self.model, x)


def with_all_parts(family, metric):
    return token_label_head(add_aux_tokens(apply_dtem_merging(create(family), 6, metric=metric), 2, 2)).eval()


FORMS = {  # those that differ in how their outputs depend on the batch
    "logits": lambda model, x: model(x),
    "tokens": lambda model, x: tuple(model(x, tokens=True)),
    "merged": lambda model, x: tuple(model(x, tokens="merged")),
    "dense": lambda model, x: tuple(model(x, dense=True)),
    "maps": lambda model, x: model.forward_intermediates(x, indices=2, intermediates_only=True),
    "groups": lambda model, x: model.token_groups(x),
}


@OLD
@pytest.mark.parametrize("metric", ["keys", "learned"])
@torch.no_grad()
def test_a_traced_model_is_the_model_at_any_batch(metric):
    x, model = images(3), with_all_parts("vit", metric)
    cases = [(6, form, 1, 3) for form in FORMS] + [(6, "logits", 3, 1), (0, "merged", 1, 3), (0, "groups", 1, 3)]
    for r, form, first, then in cases:
        model.merger.r = r
        traced = torch.jit.trace(Calling(model, FORMS[form]), x[:first], check_trace=False)
        with torch.jit.optimized_execution(False):  # which takes longer than the model
            found = traced(x[:then])
        torch.testing.assert_close(found, FORMS[form](model, x[:then]), atol=1e-5, rtol=1e-5)


@OLD
@torch.no_grad()
def test_every_family_traced_with_one_image():
    x = images(3)
    for i, family in enumerate(MERGEABLE):
        model = apply_dtem_merging(create(family), 6, metric=("keys", "learned")[i % 2]).eval()
        traced = torch.jit.trace(model, x[:1], check_trace=False)
        with torch.jit.optimized_execution(False):
            found = traced(x)
        torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-5, msg=family)


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # of torch 2.6 itself
@torch.no_grad()
def test_an_exported_model_is_the_model_at_any_batch():
    x, batch = images(3), torch.export.Dim("batch", max=1024)
    for metric, call in (("keys", FORMS["tokens"]), ("learned", FORMS["logits"])):
        calling = Calling(with_all_parts("vit", metric), call)
        program = torch.export.export(calling, (x[:2],), dynamic_shapes=({0: batch},)).module()
        for count in (1, 3):
            torch.testing.assert_close(program(x[:count]), calling(x[:count]), atol=1e-5, rtol=1e-5)


@OLD
def test_the_old_onnx_exporter_is_refused_where_tokens_merge():
    model = tiny.merging()
    for exported in (
        model,
        nn.Sequential(model),
        Calling(model, lambda model, x: model(x)),
        Calling(model, lambda model, x: model.forward_features(x)),
        Calling(model, lambda model, x: model.forward_intermediates(x, intermediates_only=True)),
    ):
        with pytest.raises(RuntimeError, match=r"dynamo=False\) exports merging wrongly; pass dynamo=True"):
            torch.onnx.export(exported, (tiny.images(1),), io.BytesIO(), dynamo=False)
    assert model(tiny.images()).shape == (3, 10)


@OLD
@torch.no_grad()
def test_the_old_onnx_exporter_without_merging():
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file, x = token_label_head(tiny.base()).eval(), io.BytesIO(), tiny.images(3)
    names = dict(input_names=["images"], dynamic_axes={"images": {0: "batch"}})
    torch.onnx.export(model, (x[:1],), file, dynamo=False, **names)
    (logits,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_symbolic_tracing_and_scripting_are_refused():
    for wrap in (lambda model: model, nn.Sequential):
        model = wrap(apply_dtem_merging(tiny.base(), 2))
        with pytest.raises(TypeError, match=r"torch\.fx can't trace a TokenViT.*feature_cls='getter' or 'hook'"):
            torch.fx.symbolic_trace(model)
        with pytest.raises(TypeError, match=r"torch\.jit\.script can't compile a TokenViT; use torch\.compile"):
            torch.jit.script(model)
    with pytest.raises(TypeError, match=r"torch\.fx can't trace a TokenViT"):
        create_model("token_vit", features_only=True, feature_cls="fx")
