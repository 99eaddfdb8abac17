"""The model, its instruments and a training step never make the CPU wait for a GPU.

The tests run on the `meta` device. A meta tensor has a shape but no numbers, so code that reads a
number raises an error. Code that makes a tensor on the CPU is an error too, because each call would
have to copy that tensor to the GPU.
"""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miniclip import CLIP, cache, hooks, lens, surgery
from miniclip.loss import clamp_logit_scale
from miniclip.training import Objective, backward, batch_loss
from miniclip.training.optim import make_optimizers

IMAGES = 2
DROP = {"vision.blocks.1.attn.z": lambda z, name: z * 2}


class OnlyMeta(TorchDispatchMode):
    """Raise an error at the first operation whose result is not on the meta device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                raise RuntimeError(f"{operation} has its result on the {leaf.device}")
        return result


@pytest.fixture
def inputs():
    """(model, pixels, ids) with one text for each image, all on the meta device."""
    model = CLIP.from_pretrained("shapes", device="meta")
    pixels = torch.empty(IMAGES, 3, *[model.config.vision.image_size] * 2, device="meta")
    ids = torch.empty(IMAGES, model.config.text.context_length, dtype=torch.long, device="meta")
    return model, pixels, ids


def edited(model, pixels):
    with hooks(model, DROP), cache(model, "vision.blocks.*.attn.pattern") as acts:
        return model.encode_image(pixels), dict(acts)


def eager(model, pixels, ids):
    model.set_attention("eager")
    return model(pixels, ids)


def without_patches(model, pixels):
    with surgery.patch_dropout(model, 0.5):
        return model.encode_image(pixels)


FORWARD = {
    "image": lambda model, pixels, ids: model.encode_image(pixels, normalize=True),
    "text": lambda model, pixels, ids: model.encode_text(ids, normalize=True),
    "both": lambda model, pixels, ids: model(pixels, ids),
    "eager": eager,
    "hooks and cache": lambda model, pixels, ids: edited(model, pixels),
}
INSTRUMENTS = {
    **{
        f"decompose by {by}": lambda model, pixels, ids, by=by: (
            lens.decompose(model, pixels, by=by),
            lens.decompose(model, ids, by=by, convention="clip_prs"),
        )
        for by in ("layer", "head", "token")
    },
    "ablate_contributions": lambda model, pixels, ids: lens.ablate_contributions(
        lens.decompose(model, pixels, by="head"), {3: [0]}
    ),
    "attention_maps": lambda model, pixels, ids: lens.attention_maps(model, pixels),
    "logit_lens": lambda model, pixels, ids: lens.logit_lens(model, pixels),
    "forward_intermediates": lambda model, pixels, ids: lens.forward_intermediates(model, pixels),
    **lens.METHODS,
    "dense_features": lambda model, pixels, ids: surgery.dense_features(model, pixels),
    "patch_dropout": lambda model, pixels, ids: without_patches(model, pixels),
    "registers": lambda model, pixels, ids: surgery.add_registers(model, 4)(pixels, ids),
    "resize_image": lambda model, pixels, ids: surgery.resize_image(model, 96),
    "resize_patch": lambda model, pixels, ids: surgery.resize_patch(model, 4),
    "extend_context": lambda model, pixels, ids: surgery.extend_context(model, 100),
    "lora": lambda model, pixels, ids: surgery.merge_lora(surgery.add_lora(model, rank=4)),
    "average": lambda model, pixels, ids: surgery.average([model, model]),
}


@pytest.mark.parametrize("name", [*FORWARD, *INSTRUMENTS])
@pytest.mark.sweep(4)
def test_no_forward_pass_or_instrument_waits_for_the_device(name, inputs):
    with OnlyMeta():
        (FORWARD | INSTRUMENTS)[name](*inputs)


def test_a_training_step_does_not_wait_for_the_device(inputs):
    model, pixels, ids = inputs
    objective = Objective(model)
    labels = torch.empty(IMAGES, dtype=torch.long, device="meta")
    loss = partial(batch_loss, model.logit_scale, labels, labels.new_empty(IMAGES, 0))
    adam, muon = make_optimizers(objective.named_parameters(), 1e-3, 0.02, 0.1, {})
    with OnlyMeta():
        assert backward(objective, pixels, ids, loss).is_meta
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        muon.step()
        clamp_logit_scale(model)
    adam.step()  # outside OnlyMeta, because Adam keeps its number of steps on the CPU


def test_an_edit_that_waits_for_the_device_raises_an_error(inputs):
    model, pixels, _ = inputs
    for wrong in (lambda z, name: z * z.sum().item(), lambda z, name: z * torch.ones(3).sum()):
        with OnlyMeta(), hooks(model, {"vision.blocks.1.attn.z": wrong}):
            with pytest.raises(RuntimeError, match="meta|its result on the cpu"):
                model.encode_image(pixels)
