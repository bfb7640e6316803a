"""Training on images: one that can't be read is an error that names it, on workers too, and never another image."""

import gc
import threading

import pytest
import torch
from PIL import Image
from runs import settings
from timm.data import ImageDataset
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from timm_tokens.data import ImageError, open_folder, unreadable
from timm_tokens.tasks import TokenTask
from timm_tokens.training import Accuracy, train

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Plain(TokenTask):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2)))

    def forward(self, input, target=None):
        output = self.trainable_module(input)
        return {"loss": nn.functional.cross_entropy(output, target), "output": output}


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 255 * (i % 2), 0)).save(path)
    (tmp_path / "images" / "a" / "4.png").write_text("no picture")
    return tmp_path / "images"


def pixels(image):
    return pil_to_tensor(image).float() / 255


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of torch's ending workers
def test_is_an_error_and_no_other_image(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # not 5 s for each
    message = r"^image 'a/4\.png' can't be read: it is empty, or of no format that Pillow knows$"
    for workers in (0, 2):
        for dataset in (ImageDataset(str(folder), transform=pixels), open_folder(folder)):
            dataset.transform = pixels
            with pytest.raises(ImageError, match=message):
                train(Plain(), dataset, settings(tmp_path / "run", batch_size=8, epochs=2, workers=workers))
            with pytest.raises(ImageError, match=message):
                Accuracy(dataset, workers=workers, topk=(1,))(Plain())
    gc.collect()  # the workers end here, and not in the next test
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(10)


def test_without_it_the_others_are_trained_on(folder, tmp_path):
    images = open_folder(folder)
    images = images.without(unreadable(images, disable=True))
    images.transform = pixels
    result = train(Plain(), images, settings(tmp_path / "run", batch_size=7, epochs=40, lr=0.05, workers=0))
    assert Accuracy(images, topk=(1,))(result.model) == {"top1": 100.0}
    assert images.targets == [0, 0, 0, 1, 1, 1, 1] and torch.stack([x for x, _ in images]).shape == (7, 3, 4, 4)


def test_logits_that_are_not_finite_are_no_accuracy(folder):
    images = open_folder(folder)
    images = images.without(unreadable(images, disable=True))
    images.transform = lambda image: pixels(image) * (torch.inf if image.getpixel((0, 0))[0] in (2, 7) else 1)
    with pytest.raises(FloatingPointError, match="the logits of 2 of 7 validation images are infinite or NaN"):
        Accuracy(images, batch_size=2, topk=(1,))(Plain().product)
