"""Compare two CLIPs on the same input, tensor by tensor, from the input to the logits.

The two models are miniclip and transformers, or a fork and the original. Both run in float64 and in
another precision, by default float32. In float32 miniclip equals transformers bit for bit. A fork
that adds numbers in another order differs by rounding errors. In float64 these errors are too small
to hide a real difference. `diagnosis.py` explains the first tensor that differs.

`miniclip parity` compares one checkpoint in both libraries (`miniclip parity everyday`), a fork and
the original (`--against`), or a published shape with random weights (`--random`). With `--random`,
biases and LayerNorms are random too, and the logit scale is 100:

    $ miniclip parity --random B/32
    model  B/32
    other  transformers

                                  largest difference         in     error in float32
    site                           absolute  relative   float64     model      other
    vision.embeddings               0.0e+00   0.0e+00   0.0e+00   9.7e-06    9.7e-06
    vision.blocks.0-11.resid_pre    0.0e+00   0.0e+00   0.0e+00   1.3e-05    1.3e-05
    vision.blocks.0-11.q            0.0e+00   0.0e+00   0.0e+00   4.7e-06    4.7e-06
    vision.blocks.0-11.k            0.0e+00   0.0e+00   0.0e+00   4.2e-06    4.2e-06
    vision.blocks.0-11.v            0.0e+00   0.0e+00   0.0e+00   4.6e-06    4.6e-06
    vision.blocks.0-11.pattern      0.0e+00   0.0e+00   0.0e+00   1.0e-06    1.0e-06
    vision.blocks.0-11.attn_out     0.0e+00   0.0e+00   0.0e+00   2.4e-06    2.4e-06
    vision.blocks.0-11.mlp_out      0.0e+00   0.0e+00   0.0e+00   3.0e-06    3.0e-06
    vision.blocks.0-11.resid_post   0.0e+00   0.0e+00   0.0e+00   1.4e-05    1.4e-05
    vision.pooled                   0.0e+00   0.0e+00   0.0e+00   2.3e-06    2.3e-06
    vision.projected                0.0e+00   0.0e+00   0.0e+00   1.8e-06    1.8e-06
    text.embeddings                 0.0e+00   0.0e+00   0.0e+00   6.0e-08    6.0e-08
    text.blocks.0-11.resid_pre      0.0e+00   0.0e+00   0.0e+00   9.9e-06    9.9e-06
    text.blocks.0-11.q              0.0e+00   0.0e+00   0.0e+00   3.5e-06    3.5e-06
    text.blocks.0-11.k              0.0e+00   0.0e+00   0.0e+00   3.4e-06    3.4e-06
    text.blocks.0-11.v              0.0e+00   0.0e+00   0.0e+00   2.9e-06    2.9e-06
    text.blocks.0-11.pattern        0.0e+00   0.0e+00   0.0e+00   6.9e-07    6.9e-07
    text.blocks.0-11.attn_out       0.0e+00   0.0e+00   0.0e+00   2.9e-06    2.9e-06
    text.blocks.0-11.mlp_out        0.0e+00   0.0e+00   0.0e+00   2.2e-06    2.2e-06
    text.blocks.0-11.resid_post     0.0e+00   0.0e+00   0.0e+00   1.0e-05    1.0e-05
    text.pooled                     0.0e+00   0.0e+00   0.0e+00   2.6e-06    2.6e-06
    text.projected                  0.0e+00   0.0e+00   0.0e+00   2.1e-06    2.1e-06
    logits                          0.0e+00   0.0e+00   0.0e+00   6.3e-06    6.3e-06
    logits_per_text                 0.0e+00   0.0e+00   0.0e+00   6.3e-06    6.3e-06
    image_embeds                    0.0e+00   0.0e+00   0.0e+00   7.4e-08    7.4e-08
    text_embeds                     0.0e+00   0.0e+00   0.0e+00   8.4e-08    8.4e-08

    nearer to float64: model at 0, other at 0, equal at 202
    torch 2.13.0+cpu, transformers 5.23.0, CPU with AVX512, threads: 2
    within tolerance at all 202 sites

(2026-11-28. The float64 runs override casts to float32, such as the cast in transformers' softmax.)

If a site is out of tolerance, the exit status is 1. The report names the first such site and the
likely cause: `first at vision.blocks.0.mlp_out, likely cause: model has the activation gelu instead
of quick_gelu`. To find the cause, the command tries common faults in CLIP's formulas. If weights
differ, the report says how, for example "transposed", "flipped" or "rounded to bfloat16".
`--plot` plots the differences against depth. A fork with the right outputs may still have wrong
gradients. `--grad` also compares the gradient of the contrastive loss for each parameter, in the
order of the backward pass. In the tests of a fork, write:

```python
from miniclip.parity import assert_parity, transformers_twin

my_model = miniclip.load("everyday").model  # yours, with a change that should make no difference
assert_parity(my_model, model)
assert_parity(my_model, model, gradients=True)
```

**Five kinds of forks** can be compared. Give the path of a checkpoint's folder or of a Python file.
After the file's path, name a model, or a function that returns a model: `my_fork.py:build`.
The default is `model`. The command calls `model(pixels, ids)`. The output must be like the output
of miniclip, transformers, OpenAI or open_clip. `--grad` works for each kind.

1. A subclass of miniclip's `CLIP`, or a changed copy of our code. See `miniclip/follow.py`.
2. transformers' class, changed in place, such as `transformers_twin(model)` with a new layer.
3. A model with OpenAI's module names, such as a changed `clip/model.py` of openai/CLIP.
4. A model with open_clip's module names, such as a changed `CLIP` or `CustomTextCLIP`.
5. A model with other module names, and a table from our names to the model's names.

Examples of kinds 3 and 4 are in `tests/forks/openai_names.py`. An example of kind 5 is
`tests/forks/own_names.py`. Use these commands:

    miniclip parity my_transformers.py --against everyday --grad
    miniclip parity my_openai.py --against everyday --grad
    miniclip parity my_open_clip.py:build --against everyday --grad
    miniclip parity my_own.py --names names.json --against everyday --grad

`names.json` is a table like the tables in `miniclip/files/names.py`. `{}` is the number of a block.
`[0]`, `[1]` and `[2]` are the thirds of a matrix that joins q, k and v. `.T` marks a transposed
matrix. A tensor that is not in the table is not compared:

    {"vision.blocks.{}.ln_1": "eyes.layers.{}.before_mix",
     "vision.blocks.{}.attn.q_proj.weight": "eyes.layers.{}.mix.qkv.weight[0]",
     "vision.proj.weight": "eyes.out.T", ...}

In Python the table is an attribute of the model:

```python
import json
from pathlib import Path

from my_own import model as my_own_model

my_own_model.tensor_names = json.loads(Path("names.json").read_text())
assert_parity(my_own_model, model, gradients=True)

theirs = transformers_twin(model)  # transformers' class; change it in place
theirs.vision_model.encoder.layers[0].mlp.activation_fn = torch.nn.GELU()
assert_parity(theirs, model, gradients=True)
```
"""

from miniclip.parity.comparison import TOLERANCE, assert_parity, compare
from miniclip.parity.pairs import (
    copy_weights,
    load_pair,
    random_inputs,
    random_pair,
    randomize,
    transformers_twin,
)
from miniclip.parity.report import Difference, Report, measured_with, nearer, summarize

__all__ = [
    "TOLERANCE", "Difference", "Report", "assert_parity", "compare", "copy_weights", "load_pair",
    "measured_with", "nearer", "random_inputs", "random_pair", "randomize", "summarize",
    "transformers_twin",
]  # fmt: skip
