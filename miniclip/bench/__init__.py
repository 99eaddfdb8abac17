"""Time the same work in miniclip and in other libraries, side by side.

`miniclip bench` times miniclip and transformers, with random weights in an official shape. If they
are installed, it also times open_clip and openai/CLIP. It compares the outputs first. A library is
not timed if its output differs from miniclip's by more than rounding error. "Matrix products alone"
only multiplies random numbers by a tower's weights, in the fastest of PyTorch, oneDNN and MKL.

    $ miniclip bench --suite vision text
    Median cost, median rate, and median ratio to miniclip's cost (with quartiles).

    vision: 1 image, B/32, float32
      miniclip                     88.0 ms      11.4/s    1.00x (1.00 to 1.00)
      transformers                 91.6 ms      10.9/s    1.05x (0.99 to 1.08)
      matrix products alone        58.8 ms      17.0/s    0.67x (0.62 to 0.72)

    vision: 16 images, B/32, float32
      miniclip                    755.7 ms      21.2/s    1.00x (1.00 to 1.00)
      transformers                757.4 ms      21.1/s    1.01x (0.97 to 1.02)
      matrix products alone       524.4 ms      30.5/s    0.73x (0.69 to 0.74)

    text: 16 captions of at most 15 tokens, B/32, float32
      miniclip                    115.2 ms       139/s    1.00x (1.00 to 1.00)
      transformers                114.5 ms       140/s    1.01x (0.95 to 1.11)
      matrix products alone        87.0 ms       184/s    0.77x (0.71 to 0.90)

    date 2026-11-29, hardware Intel(R) Xeon(R) Processor, AVX512, 2 threads, Python
      3.11.7, torch 2.13.0+cpu, transformers 5.23.0, tokenizers 0.23.3, pillow
      13.0.0

These numbers are from the same day and the same machine:

    $ miniclip bench --suite tokenizer transform load startup memory search
    Median cost, median rate, and median ratio to miniclip's cost (with quartiles).

    tokenizer: 1,000 texts, ASCII captions
      miniclip                      2.4 ms   424,420/s    1.00x (1.00 to 1.00)
      transformers                 25.6 ms    39,058/s   11.74x (9.88 to 14.70)

    tokenizer: 1,000 texts, mixed scripts and emoji
      miniclip                      4.1 ms   243,525/s    1.00x (1.00 to 1.00)
      transformers                 71.1 ms    14,059/s   17.60x (14.81 to 22.11)

    tokenizer: 1,000 texts, words never seen before
      miniclip                     29.4 ms    34,014/s    1.00x (1.00 to 1.00)
      transformers                 68.1 ms    14,676/s    2.38x (2.23 to 2.51)

    transform: 1 JPEG file of 640 x 480 pixels
      miniclip                      4.6 ms       218/s    1.00x (1.00 to 1.00)
      transformers                  6.7 ms       150/s    1.45x (1.40 to 1.55)
      Pillow, decode + resize       3.8 ms       266/s    0.83x (0.78 to 0.88)

    transform: 16 JPEG files of 640 x 480 pixels
      miniclip                     50.3 ms       318/s    1.00x (1.00 to 1.00)
      transformers                119.1 ms       134/s    2.37x (2.13 to 2.64)

    load: files to logits, B/32, float32
      miniclip                    248.7 ms       4.0/s    1.00x (1.00 to 1.00)
      transformers                298.7 ms       3.3/s    1.17x (0.94 to 1.23)

    startup: a new process, files to logits, B/32, float32
      miniclip                  2,592.3 ms       0.4/s    1.00x (1.00 to 1.00)
      transformers              6,776.3 ms       0.1/s    2.48x (2.47 to 2.59)

    memory: peak, files to logits, B/32, float32
      miniclip                      647 MB                1.00x (1.00 to 1.00)
      transformers                  548 MB                0.85x (0.85 to 0.85)
      the weights file              605 MB                0.94x (0.93 to 0.94)

    search: the 12 nearest of 1,000,000 x 512, float32
      miniclip                    268.0 ms       3.7/s    1.00x (1.00 to 1.00)
      torch, matmul + topk        152.4 ms       6.6/s    0.54x (0.53 to 0.55)
      FAISS, IndexFlatIP          305.5 ms       3.3/s    1.13x (1.03 to 1.25)

    date 2026-11-29, hardware Intel(R) Xeon(R) Processor, AVX512, 2 threads, Python
      3.11.7, torch 2.13.0+cpu, transformers 5.23.0, tokenizers 0.23.3, pillow
      13.0.0, faiss-cpu 1.15.1

The other suites were measured on another machine:

    zeroshot: 11 labels x 80 templates, B/32, float32
      miniclip                  4,808.0 ms       183/s    1.00x (1.00 to 1.00)
      transformers              5,687.3 ms       155/s    1.23x (1.20 to 1.23)
      transformers, at once    14,581.4 ms      60.4/s    3.03x (2.92 to 3.11)

    train: the loss of 16 pairs and its gradients, B/32, float32
      miniclip                  2,775.2 ms       5.8/s    1.00x (1.00 to 1.00)
      transformers              2,773.1 ms       5.8/s    1.00x (1.00 to 1.00)

    embed: 64 JPEG files of 640 x 480 pixels, B/32, float32
      miniclip                  3,668.5 ms      17.4/s    1.00x (1.00 to 1.00)
      transformers              3,881.9 ms      16.5/s    1.06x (1.04 to 1.07)
      decoding alone              168.9 ms       379/s    0.04x (0.04 to 0.05)
      encoder alone             3,493.1 ms      18.3/s    0.94x (0.93 to 0.97)

    date 2026-11-28, hardware AMD EPYC, AVX512, 2 threads, Python 3.11.7, torch
      2.13.0+cpu, transformers 5.23.0, tokenizers 0.23.3, pillow 13.0.0

"transformers, at once" pads all texts to the longest text. "transformers" embeds one label's texts
at a time. open_clip and openai/CLIP pad each text to 77 tokens. They take 9.2 and 9.3 times as long
as miniclip (`--suite zeroshot`, same machine and date). In `search`, miniclip ranks by scores in
float64 and keeps one block of the file in memory. FAISS keeps a copy of all vectors in memory.
`--compile` also times compiled encoders. `--engine` also times other engines (see `engines.py`).

On Linux, glibc returns freed memory to the system. The system clears this memory before its next
use, which slows an eager forward pass. The commands `embed`, `eval` and `train` keep freed memory.
In your own scripts, do the same: set the environment variables `MALLOC_MMAP_MAX_=0` and
`MALLOC_TRIM_THRESHOLD_=4294967296`.

On a GPU (nobody has run this yet):

    miniclip bench --device cuda --json && pytest -m gpu
"""

from miniclip.bench.growth import Growth, growth, growth_table
from miniclip.bench.measuring import Row, table
from miniclip.bench.suites import SUITES, bench, environment

__all__ = ["SUITES", "Growth", "Row", "bench", "environment", "growth", "growth_table", "table"]
