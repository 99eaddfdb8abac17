"""The training loop: batches in, a checkpoint out."""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miniclip.checkpoint import save
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.model import CLIP, VisionTower
from miniclip.tokenizer import Tokenizer
from miniclip.training.data import ClassFolders, augment, captions, read_class_folders
from miniclip.training.loss import clamp_logit_scale, contrastive_loss
from miniclip.transform import ImageTransform


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. AdamW as in the paper, table 18."""

    epochs: int = 6
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.1  # share of the steps
    patch_dropout: float = 0.5
    full_epochs: int = 1  # at the end, without patch dropout: as the model will be used
    clip_gradient: float = 1.0
    seed: int = 0


class PatchDropout:
    """Train on a random part of each image's patches (FLIP, Li et al. 2022, arXiv 2212.00794).

    A hook on `vision.ln_pre`, whose output is the residual stream before the first block. The
    class token stays, the patches that stay keep their order and, having been added already,
    their positions.
    """

    def __init__(self, tower: VisionTower, share: float) -> None:
        self.share = share
        tower.ln_pre.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: object, x: Tensor) -> Tensor:
        if not module.training or not self.share:
            return x
        batch, tokens, width = x.shape
        kept = max(1, round((tokens - 1) * (1 - self.share)))
        order = torch.rand(batch, tokens - 1, device=x.device).argsort(dim=1)
        chosen = order[:, :kept].sort(dim=1).values + 1  # (B, kept)
        chosen = torch.cat([torch.zeros_like(chosen[:, :1]), chosen], dim=1)  # the class token
        return x.gather(1, chosen[:, :, None].expand(-1, -1, width))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices alone: not for biases, norms, the class token or the logit scale."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine down to zero, as a share of the peak."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train(
    config: CLIPConfig,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    data: ClassFolders,
    texts: list[list[str]],
    out: Path,
    recipe: Recipe,
) -> CLIP:
    """Train a CLIP from scratch, writing `out` after every epoch, and metrics.jsonl with it.

    `texts` has the captions of each class; one is drawn for an image each time it is seen.
    """
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = CLIP(config)
    dropout = PatchDropout(model.vision, recipe.patch_dropout)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98), eps=1e-6
    )
    count = len(data.labels)
    batch = min(recipe.batch, count)
    steps_per_epoch = count // batch
    steps = recipe.epochs * steps_per_epoch
    mean = torch.tensor(transform.image_mean)[:, None, None] * 255
    std = torch.tensor(transform.image_std)[:, None, None] * 255
    ids = [tokenizer(captions, pad_to=config.text.context_length) for captions in texts]

    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with open(out / "metrics.jsonl", "w") as metrics, tqdm(total=steps, disable=None) as bar:
        print(json.dumps(asdict(recipe)), file=metrics, flush=True)
        for epoch in range(recipe.epochs):
            model.train()
            if epoch >= recipe.epochs - recipe.full_epochs:
                dropout.share = 0.0
            losses = []
            order = torch.randperm(count, generator=generator)[: steps_per_epoch * batch]
            for i, chosen in enumerate(order.split(batch)):
                rate = learning_rate(epoch * steps_per_epoch + i, steps, recipe.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * rate
                labels = data.labels[chosen]
                pixels = (augment(data.pixels[chosen], generator).float() - mean) / std
                loss = contrastive_loss(
                    model.encode_image(pixels, normalize=True),
                    model.encode_text(draw_captions(ids, labels, generator), normalize=True),
                    model.logit_scale,
                    labels,
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_gradient)
                optimizer.step()
                clamp_logit_scale(model)
                losses.append(loss.item())
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
            save(out, model.eval(), tokenizer, transform)
            row = {
                "epoch": epoch + 1,
                "loss": sum(losses) / len(losses),
                "logit_scale": model.logit_scale.exp().item(),
                "seconds": round(time.time() - start, 1),
            }
            print(json.dumps(row), file=metrics, flush=True)
    return model


def draw_captions(ids: list[Tensor], labels: Tensor, generator: torch.Generator) -> Tensor:
    """One of the captions of each label, as ids (B, T)."""
    drawn = torch.rand(len(labels), generator=generator).tolist()
    rows = [ids[k][int(u * len(ids[k]))] for k, u in zip(labels.tolist(), drawn, strict=True)]
    return torch.stack(rows)


def train_from_folders(root: Path, out: Path, recipe: Recipe, image_size: int = 32) -> CLIP:
    """Train a small CLIP on `root`/<class>/ from nothing, its tokenizer included."""
    data = read_class_folders(root, image_size)
    for reason in data.skipped:
        tqdm.write(f"skipped: {reason}", file=sys.stderr)
    texts = captions(data.classes)
    tokenizer = Tokenizer.train([text for of_class in texts for text in of_class], 700)
    config = CLIPConfig(
        VisionConfig(
            width=128, layers=4, heads=4, mlp_width=512, image_size=image_size, patch_size=4
        ),
        TextConfig(
            width=64,
            layers=2,
            heads=2,
            mlp_width=256,
            vocab_size=tokenizer.vocab_size,
            context_length=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        embed_dim=64,
    )
    tokenizer.context_length = config.text.context_length
    return train(config, tokenizer, ImageTransform(image_size), data, texts, out, recipe)
