"""The same input through two CLIPs, compared tensor by tensor in the order data flows.

The two are miniclip and transformers, or a fork and the original. Both run in one precision and in
float64. In float32 the unchanged model agrees with transformers to the last bit, and a model whose
operations are in another order agrees to rounding. In float64 a real difference cannot hide behind
rounding. `diagnosis.py` explains the first tensor that differs.

`miniclip parity` measures: a checkpoint that both libraries load (`miniclip parity everyday`), a
fork against the original (`--against`), or an official shape with every parameter drawn at random,
biases and LayerNorms too, at logit scale 100:

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

(2026-11-28. What asks for float32, as transformers' softmax does, gets float64 in the float64
runs.) The first site out of tolerance is named, with the likely cause, found by planting the usual
faults in CLIP's formulas: `first at vision.blocks.0.mlp_out, likely cause: model has the activation
gelu for quick_gelu`. Where weights differ it says what was done to them: transposed, flipped,
rounded to bfloat16, heads in another order. Exit status 1 then; `--plot` draws the differences
against depth. A fork whose numbers are right may still learn something else: `--grad` also compares
each parameter's gradient of the contrastive loss, and names the first that differs, from the loss
backwards. In a fork's own tests:

```python
from miniclip.parity import assert_parity

my_model = miniclip.load("everyday").model  # yours, changed so that it should make no difference
assert_parity(my_model, model)
assert_parity(my_model, model, gradients=True)
```

The fork may be a subclass of ours, transformers' `CLIPModel` changed in place, or a model whose
modules have OpenAI's or open_clip's names (`tests/forks/openai_names.py` is one): parity reads the
tables that checkpoints are read by. A model with other names brings a table like theirs
(`files/names.py`), for instance from a file: `model.tensor_names = json.load(open("names.json"))`.
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
