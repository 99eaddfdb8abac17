"""Load a checkpoint and compute the first logits, with miniclip or with transformers.

`miniclip bench` runs this file as a script in a new process. The script imports one library:

    python first_logits.py LIBRARY '[directory, photograph, texts, device, dtype]'
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # a file in this folder could hide a module of the same name

import json
import re
from collections.abc import Callable

import torch

FirstLogits = Callable[[str, str, list[str], str, str], torch.Tensor]


def ready_miniclip() -> FirstLogits:
    """Import miniclip, and return the function that is measured."""
    import miniclip

    @torch.inference_mode()
    def first_logits(
        directory: str, photograph: str, texts: list[str], device: str, dtype: str
    ) -> torch.Tensor:
        precision = getattr(torch, dtype)
        model, tokenizer, transform = miniclip.load(directory, device=device, dtype=precision)
        ids = tokenizer(texts).to(device)
        pixels = transform([photograph]).to(device)
        return model(pixels, ids).logits_per_image

    return first_logits


def ready_transformers() -> FirstLogits:
    """Import transformers, and return the function that is measured."""
    import transformers
    from PIL import Image
    from transformers.models.clip import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    transformers.utils.logging.disable_progress_bar()

    @torch.inference_mode()
    def first_logits(
        directory: str, photograph: str, texts: list[str], device: str, dtype: str
    ) -> torch.Tensor:
        model = CLIPModel.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
        tokenizer = CLIPTokenizer.from_pretrained(directory)
        transform = CLIPImageProcessorPil.from_pretrained(directory)
        ids = tokenizer(texts, padding=True, return_tensors="pt").to(device)
        pixels = transform([Image.open(photograph)], return_tensors="pt").to(device)
        return model(**ids, **pixels).logits_per_image

    return first_logits


READY = {"miniclip": ready_miniclip, "transformers": ready_transformers}


def kilobytes(field: str) -> int:
    """Read a field of /proc/self/status. getrusage's peak includes the parent process's memory."""
    with open("/proc/self/status") as status:
        found = re.search(field + r":\s*(\d+) kB", status.read())
    return int(found[1]) if found else 0


def main(library: str, inputs: str) -> None:
    """Print the logits, and the peak memory in bytes. The imports' memory is not counted."""
    first_logits = READY[library]()
    on_linux = sys.platform == "linux"
    before = kilobytes("VmRSS") if on_linux else 0
    directory, photograph, texts, device, dtype = json.loads(inputs)
    logits = first_logits(directory, photograph, texts, device, dtype).tolist()
    if device.startswith("cuda"):
        most = torch.cuda.max_memory_allocated()
    else:
        most = 1024 * (kilobytes("VmHWM") - before) if on_linux else 0
    print(json.dumps([logits, most]))


if __name__ == "__main__":
    main(*sys.argv[1:])
