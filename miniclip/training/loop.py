"""The training loop. It trains a model on pairs, as a recipe says, and writes a checkpoint."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from hashlib import sha256
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.checkpoint import Loaded
from miniclip.errors import ContextLengthError
from miniclip.files.hub import as_destination
from miniclip.files.modules import class_of, is_patched, unwrapped
from miniclip.follow import ids_for
from miniclip.loss import clamp_logit_scale
from miniclip.model import CLIP, attentions
from miniclip.retrieval.building import only_writer
from miniclip.surgery.interventions import PatchDropout
from miniclip.terminal import counted, delaying_interrupt, progress
from miniclip.tokenizer import Tokenizer
from miniclip.training.data import augment, batches, draw_seed
from miniclip.training.loss import Loss, SigmoidLoss, backward, batch_loss
from miniclip.training.optim import schedule, set_learning_rate
from miniclip.training.pairs import TrainingData
from miniclip.training.processes import of_all_processes, parallel, rank_and_world_size, reshard
from miniclip.training.recipe import Recipe
from miniclip.training.run import Run
from miniclip.transform import ImageTransform

Train = TypeVar("Train", bound=Callable[..., CLIP])


def locking(train: Train) -> Train:
    """Decorate `train`: lock `out`, and restore each parameter's `requires_grad` afterwards."""

    @wraps(train)
    def locked(
        model: CLIP, tokenizer: Any, transform: Any, data: Any, recipe: Any, out: Any,
        *args: Any, **options: Any,
    ) -> CLIP:  # fmt: skip
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            with only_writer(as_destination(out)):
                return train(model, tokenizer, transform, data, recipe, out, *args, **options)
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)

    return cast(Train, locked)


@locking
def train(
    model: CLIP,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    data: TrainingData,
    recipe: Recipe,
    out: str | os.PathLike[str],
    loss: Loss | None = None,
    validate: Callable[[Loaded], dict[str, float]] | None = None,
    log: str = "",
) -> CLIP:
    """Train a model, and write its checkpoint with recipe.json and metrics.jsonl.

    The run is saved after each epoch and every five minutes. To continue a killed run, call `train`
    again. On a CPU the result equals the result of an uninterrupted run bit for bit. Under torchrun
    each process calls `train`, and the first process writes the files.

    Args:
        model: the model, which is trained in place. Half-precision weights become float32.
        tokenizer: the model's tokenizer.
        transform: the model's transform.
        data: the pairs; see `open_data`.
        recipe: the settings of the run.
        out: the folder of the checkpoint.
        loss: a loss in place of the recipe's loss. The logit scale is then not clamped. If the
            loss is an nn.Module, its parameters are trained and saved too. A fork with its own
            `score` needs such a loss.
        validate: a function from a checkpoint to a dict of scores on held-out data; see
            `evaluation.scorer`. `out`/best is the checkpoint with the highest value of the
            dict's first score.
        log: "tensorboard" also writes the metrics for TensorBoard.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        ValueError: `out` holds another checkpoint or run, another process writes it, the data is
            too small, the recipe does not fit the model, a part would not be trained, or the loss
            is NaN or infinite.
    """
    check_model(model, loss)
    rank, world_size = rank_and_world_size()
    check_data(data, least=max(2, world_size))
    recipe = replace(recipe, batch=min(recipe.batch, len(data)))
    if recipe.batch < world_size:
        raise ValueError(f"a batch of {recipe.batch} cannot be shared by {world_size} processes")
    steps_per_epoch = len(data) // recipe.batch
    steps = recipe.epochs * steps_per_epoch
    is_own = loss is not None or type(model) is not CLIP
    if loss is None and recipe.loss == "siglip":
        loss = SigmoidLoss().to(model.logit_scale.device)

    # A tokenizer learnt from new captions may have other ids. The trained weights do not know them.
    tokens = repr((sorted(tokenizer.vocab.items()), tokenizer.merges)).encode()
    inputs = {"tokenizer": sha256(tokens).hexdigest(), "transform": repr(transform)}
    run = Run(as_destination(out), model, recipe, loss, rank == 0, log, inputs)
    whole_model, model = model, run.trained
    if run.step > steps:
        reason = f"already ran {run.step:,} steps, but a run on this data has {steps:,} steps"
        raise ValueError(f"{out}: {reason}; choose a new folder")
    dropout = PatchDropout(model.vision, 0.0) if recipe.patch_dropout else None
    if recipe.compile:
        model.vision.compile()
        model.text.compile()
    device = model.logit_scale.device
    engine = run.objective if recipe.fsdp else parallel(run.objective, skips=is_own)

    model.train()
    stream = batches(data, recipe.batch, recipe.seed, run.step, rank, world_size)
    total, initial = steps * recipe.batch, run.step * recipe.batch
    options: Any = {"unit_scale": True, "leave": True, "disable": rank > 0}
    bar = progress(total=total, initial=initial, unit="pair", **options)
    recomputing = recompute_blocks(model) if recipe.checkpoint_blocks else nullcontext()
    is_slow_fused = device.type == "cpu" and recipe.precision == "bfloat16"
    attention = attention_written_out(model) if is_slow_fused else nullcontext()
    dropping = closing(dropout) if dropout else nullcontext()
    stopping = delaying_interrupt("the run is saved after this step")
    with bar, recomputing, attention, dropping, closing(stream), stopping as must_stop:
        first_step = run.step + 1
        while run.step < steps:
            batch = next(stream)
            if recipe.hard_negatives and not all(batch.negatives):
                raise ValueError("hard_negatives: this data has no false captions to learn from")
            torch.manual_seed(draw_seed(recipe.seed, run.step, recipe.batch + rank))
            set_learning_rate(run.optimizers, schedule(run.step, steps, recipe.warmup))
            epoch = run.step // steps_per_epoch
            if dropout:
                dropout.share = recipe.patch_dropout * (epoch < recipe.epochs - recipe.full_epochs)
            captions = batch.captions + batch.negatives * recipe.hard_negatives
            value = backward(
                engine,
                normalize_pixels(batch.pixels, transform, recipe.augment).to(device),
                tokenize_captions(captions, tokenizer, run).to(device),
                partial(
                    batch_loss,
                    model.logit_scale,
                    batch.labels.to(device),
                    batch.also.to(device),
                    loss=loss and partial(loss, model),
                    batch=recipe.batch,
                ),
                recipe.chunk,
            )
            reshard(model)  # FSDP reshards in the backward pass, but a frozen tower has none
            run.note_loss(value)
            nn.utils.clip_grad_norm_(run.objective.parameters(), recipe.clip_gradient)
            for optimizer in run.optimizers:
                with run.objective.cast:
                    optimizer.step()
                optimizer.zero_grad()
            if loss is None and model.logit_scale.requires_grad:
                clamp_logit_scale(model)
            if run.average:
                run.average.update_parameters(model)

            done, scores = run.step + 1, {}
            if validate and (done % (recipe.val_every or steps_per_epoch) == 0 or done == steps):
                scores = run.validate(validate, tokenizer, transform)
            run.log_step(done % steps_per_epoch == 0, scores)
            for reason in data.skipped:
                run.report(reason)
            if run.is_time_to_save or run.step % steps_per_epoch == 0:
                run.save(tokenizer, transform)
            bar.set_postfix(loss=f"{run.loss:.3f}", refresh=False)
            bar.update(recipe.batch)
            if run.step == first_step:
                bar.refresh()
            if run.agreed(must_stop()):
                run.save(tokenizer, transform)
                run.report(
                    f"{out}: saved at step {run.step}; the same command continues from there"
                )
                raise KeyboardInterrupt
    skipped = of_all_processes(data.skipped)
    if skipped and rank == 0:
        run.report(f"skipped images or shards: {len(skipped)}; they are named above")
    run.finish(tokenizer, transform)
    return whole_model.eval()


def check_model(model: CLIP, loss: Loss | None) -> None:
    """Raise ValueError if training would silently leave out a part of the model."""
    if engine := getattr(model.encode_image, "engine", ""):
        raise ValueError(
            f"encode_image runs on the engine {engine}, so the vision tower would not be trained; "
            "first call `del model.encode_image`"
        )
    kind = class_of(unwrapped(model))
    if loss is None and (kind.score is not CLIP.score or is_patched(unwrapped(model), "score")):
        raise ValueError(
            f"{kind.__name__} has its own score, which the recipe's losses do not use; give "
            "`train` a loss that calls `model.score`"
        )


def check_data(data: TrainingData, least: int) -> None:
    """Raise ValueError if there are too few images, or if all images have the same caption."""
    if len(data) < least:
        reason = f"; {data.skipped[0]}" if data.skipped else ""
        raise ValueError(
            f"{counted(len(data), 'image')} to train on; expected at least {least}{reason}"
        )
    captions = iter(data.captions())
    first = next(captions)
    if all(caption == first for caption in captions):
        raise ValueError(
            f"every caption is {first!r}; training needs different captions to compare"
        )


def normalize_pixels(pixels: Tensor, transform: ImageTransform, augmented: bool) -> Tensor:
    """Normalize bytes (B, 3, S, S) as the transform does. If `augmented`, augment them first."""
    pixels = augment(pixels) if augmented else pixels
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (transform.image_mean, transform.image_std)
    )
    return (pixels / 255 - mean) / std


def tokenize_captions(captions: list[str], tokenizer: Tokenizer, run: Run) -> Tensor:
    """Return token ids (B, T). Cut captions that are too long, and report the first of them."""
    text = run.trained.text
    try:
        return ids_for(text, tokenizer, captions)
    except ContextLengthError as error:
        run.report(f"captions too long for the text tower are cut; the first: {error}", "cut")
        return ids_for(text, tokenizer, captions, truncate=True)


@contextmanager
def recompute_blocks(model: CLIP) -> Iterator[None]:
    """Keep only the blocks' inputs in memory. The backward pass computes the blocks again."""
    blocks = (*model.vision.blocks, *model.text.blocks)
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward  # remove the wrapper around the class's method
            if forward is not None:
                block.forward = forward


@contextmanager
def attention_written_out(model: CLIP) -> Iterator[None]:
    """Use eager attention. Its backward pass in bfloat16 on a CPU is 4 times as fast as sdpa's."""
    before = [attn.eager for attn in attentions(model)]
    model.set_attention("eager")
    try:
        yield
    finally:
        for attn, eager in zip(attentions(model), before, strict=True):
            attn.eager = eager
