"""Compare logits with transformers' logits, bit for bit, for each combination of settings.

    python tests/equality_matrix.py              # every combination, takes minutes
    python tests/equality_matrix.py --threads 1 2 --batches 1 3

Every weight is random. The environment variable ATEN_CPU_CAPABILITY selects the CPU's instructions:
"default", "avx2" or "avx512". The script prints a line for each combination whose logits are not
equal. If it prints such a line, the exit status is 1.
"""

import argparse
import itertools
import sys

import torch
from twin import TINY, twins


def main() -> int:
    """Compare all combinations, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 3, 7, 16, 33])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    kinds = ("sdpa", "eager")
    count = different = 0
    for seed, dtype, kind in itertools.product(args.seeds, dtypes, kinds):
        ours, theirs = (model.to(dtype).eval() for model in twins(TINY, seed=seed))
        ours.set_attention(kind)
        theirs.set_attn_implementation(kind)
        for threads, batch, padded in itertools.product(args.threads, args.batches, (False, True)):
            torch.set_num_threads(threads)
            torch.manual_seed(batch)
            text = TINY.text
            height, width = TINY.vision.height_width
            pixels = torch.randn(batch, TINY.vision.channels, height, width, dtype=dtype)
            ids = torch.randint(0, text.eos_token_id, (batch, text.context_length))
            ends = torch.randint(2, text.context_length, (batch, 1)) if padded else -1
            places = torch.arange(text.context_length)
            is_end = places >= ends if padded else places == text.context_length - 1
            ids = ids.masked_fill(is_end, text.eos_token_id)
            mask = (places <= ends).long() if padded else None
            with torch.no_grad():
                mine = ours(pixels, ids).logits_per_image
                its = theirs(
                    input_ids=ids, pixel_values=pixels, attention_mask=mask
                ).logits_per_image
            count += 1
            if not torch.equal(mine, its):
                different += 1
                bits = f"{(mine != its).sum()} of {mine.numel()} logits differ"
                place = f"seed {seed} {dtype} {kind} threads {threads} batch {batch}"
                print(f"{place} mask {padded}: {bits}")
    print(f"{count:,} combinations, {different:,} differ (torch {torch.__version__})")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
