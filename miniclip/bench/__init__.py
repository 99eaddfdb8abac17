"""Time the same work in miniclip and in other libraries, side by side.

`miniclip bench` times miniclip, transformers and, if they are installed, open_clip and openai/CLIP,
with random weights in an official shape. It compares the outputs first, and does not time a library
whose output differs. "Matrix products alone" are the products with a tower's weights, without the
rest of the tower. The fastest of PyTorch, oneDNN and MKL computes them.

    $ miniclip bench
    Medians over the rounds, and of each round's cost in miniclip's (quartiles).

    vision: 1 image, B/32, float32
      miniclip                     99.9 ms      10.0/s    1.00x (1.00 to 1.00)
      transformers                100.1 ms      10.0/s    1.01x (1.00 to 1.02)
      one matrix product           49.5 ms      20.2/s    0.55x (0.49 to 0.56)

    vision: 16 images, B/32, float32
      miniclip                    928.1 ms      17.2/s    1.00x (1.00 to 1.00)
      transformers                915.3 ms      17.5/s    0.98x (0.95 to 1.00)
      one matrix product          886.4 ms      18.1/s    0.95x (0.90 to 1.01)

    text: 16 captions of at most 15 tokens, B/32, float32
      miniclip                    134.4 ms       119/s    1.00x (1.00 to 1.00)
      transformers                136.0 ms       118/s    1.01x (0.98 to 1.03)
      one matrix product          100.7 ms       159/s    0.75x (0.73 to 0.77)

    tokenizer: 1,000 texts, ASCII captions
      miniclip                      2.6 ms   391,339/s    1.00x (1.00 to 1.00)
      transformers                 27.7 ms    36,060/s   11.04x (9.18 to 12.76)

    tokenizer: 1,000 texts, mixed scripts and emoji
      miniclip                      5.3 ms   190,135/s    1.00x (1.00 to 1.00)
      transformers                 61.2 ms    16,349/s   11.77x (11.13 to 12.26)

    tokenizer: 1,000 texts, words never seen before
      miniclip                     68.2 ms    14,665/s    1.00x (1.00 to 1.00)
      transformers                 71.5 ms    13,996/s    1.05x (0.99 to 1.09)

    transform: 1 JPEG file of 640 x 480 pixels
      miniclip                      4.7 ms       212/s    1.00x (1.00 to 1.00)
      transformers                  6.0 ms       166/s    1.27x (1.26 to 1.29)
      Pillow, decode + resize       4.2 ms       236/s    0.90x (0.89 to 0.91)

    transform: 16 JPEG files of 640 x 480 pixels
      miniclip                     41.2 ms       388/s    1.00x (1.00 to 1.00)
      transformers                 88.1 ms       182/s    2.16x (1.92 to 2.21)

    load: files to logits, B/32, float32
      miniclip                    205.4 ms       4.9/s    1.00x (1.00 to 1.00)
      transformers                226.0 ms       4.4/s    1.09x (1.06 to 1.13)

    startup: a new process, files to logits, B/32, float32
      miniclip                  1,838.1 ms       0.5/s    1.00x (1.00 to 1.00)
      transformers              4,703.4 ms       0.2/s    2.59x (2.55 to 2.64)

    zeroshot: 11 labels x 80 templates, B/32, float32
      miniclip                  4,808.0 ms       183/s    1.00x (1.00 to 1.00)
      transformers              5,687.3 ms       155/s    1.23x (1.20 to 1.23)
      transformers, at once    14,581.4 ms      60.4/s    3.03x (2.92 to 3.11)
      one matrix product        3,793.5 ms       232/s    0.79x (0.76 to 0.93)

    train: the loss of 16 pairs and its gradients, B/32, float32
      miniclip                  2,775.2 ms       5.8/s    1.00x (1.00 to 1.00)
      transformers              2,773.1 ms       5.8/s    1.00x (1.00 to 1.00)

    memory: most at once, files to logits, B/32, float32
      miniclip                      648 MB                1.00x (1.00 to 1.00)
      transformers                  554 MB                0.85x (0.85 to 0.85)
      the weights file              605 MB                0.93x (0.93 to 0.93)

    embed: 64 JPEG files of 640 x 480 pixels, B/32, float32
      miniclip                  3,668.5 ms      17.4/s    1.00x (1.00 to 1.00)
      transformers              3,881.9 ms      16.5/s    1.06x (1.04 to 1.07)
      decoding alone              168.9 ms       379/s    0.04x (0.04 to 0.05)
      encoder alone             3,493.1 ms      18.3/s    0.94x (0.93 to 0.97)

    search: the 12 nearest of 1,000,000 x 512, float32
      miniclip                    249.2 ms       4.0/s    1.00x (1.00 to 1.00)
      torch, matmul + topk        218.6 ms       4.6/s    0.88x (0.87 to 0.91)
      FAISS, IndexFlatIP          159.2 ms       6.3/s    0.66x (0.62 to 0.70)

    date 2026-11-28, hardware AMD EPYC, AVX512, 2 threads, Python 3.11.7, torch
      2.13.0+cpu, transformers 5.23.0, tokenizers 0.23.3, pillow 13.0.0, faiss-cpu
      1.15.1

"transformers, at once" pads all texts to the longest one; "transformers" embeds one label's texts
at a time. open_clip and openai/CLIP pad to 77 tokens and take 9.2 and 9.3 times as long as miniclip
(`--suite zeroshot`, same machine and date). In `search`, miniclip ranks by float64 and keeps one
block of the file in memory; FAISS keeps a copy of all rows. `miniclip bench --suite vision text
--compile` adds compiled encoders: at 16 images, transformers' eager vision tower takes 1.04 to 1.19
times as long as the compiled one (medians of three runs), and the matrix product takes 0.95 to 0.97
times as long. In bfloat16, the two ratios are 1.01 to 1.03, and 0.78 to 0.83.

On Linux, glibc returns freed memory to the system, which clears it before the next use. This makes
an eager pass slower. `embed`, `eval` and `train` keep freed memory; in a script of your own, set
`MALLOC_MMAP_MAX_=0` and `MALLOC_TRIM_THRESHOLD_=4294967296` in the environment.

On a GPU (not run here):

    miniclip bench --device cuda --json && pytest -m gpu
"""

from miniclip.bench.growth import Growth, growth, growth_table
from miniclip.bench.measuring import Row, table
from miniclip.bench.suites import SUITES, bench, environment

__all__ = ["SUITES", "Growth", "Row", "bench", "environment", "growth", "growth_table", "table"]
