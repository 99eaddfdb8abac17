"""A compiled, an exported and an ONNX graph return the same numbers as the model.

A graph is made with one batch size and one text length, and tested with other sizes. The tests use
both rules for the end token: the config's id, or a text's largest id. Exporters are known to lose
the causal mask, which can change a probability from 0.99 to 0.41. Therefore each comparison has a
control: a model without the mask.
"""

import copy
import os
import shutil
from dataclasses import replace

import onnxruntime
import pytest
import torch
from twin import TINY, assert_close, assert_far, random_inputs, twins

from miniclip.config import LEGACY_EOS

pytestmark = [
    # The compilers and exporters of torch 2.13 raise these warnings about their own code.
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning"),
]

LOGITS = 2e-5  # this tolerance allows for reordered operations at logit scale 100

# Compilers and exporters are slow, so the vision tower has one layer. The text tower has two:
# with one layer, a mask does not change the last token. OpenAI's config files do not state the true
# end token. With such a config, a text ends at its largest id.
SHALLOW = replace(TINY, vision=replace(TINY.vision, layers=1))
AS_OPENAI = replace(SHALLOW, text=replace(SHALLOW.text, eos_token_id=LEGACY_EOS))

images = torch.export.Dim("images", min=1, max=64)
texts = torch.export.Dim("texts", min=1, max=64)
tokens = torch.export.Dim("tokens", min=2, max=TINY.text.context_length)
SHAPES = ({0: images}, {0: texts, 1: tokens})


def without_mask(model):
    model = copy.deepcopy(model)
    for block in model.text.blocks:
        block.attn.causal = False
    return model


@torch.no_grad()
def assert_same(graph, model):
    """Assert that the graph has a mask and gives the model's outputs for other input sizes."""
    for images, texts, tokens in ((1, 1, 2), (5, 3, 12), (2, 7, 20)):
        inputs = random_inputs(model.config, images, texts, tokens, seed=4)
        expected, found = model(*inputs), graph(*inputs)
        for logits, embeds in ((0, 2), (1, 3)):
            assert (found[logits] - expected[logits]).abs().max() < LOGITS
            assert_close(found[embeds], expected[embeds])
        assert_far(found[3], without_mask(model)(*inputs).text_embeds)


@pytest.fixture(scope="module")
def model():
    return twins(SHALLOW)[0]


def exported(model):
    example = random_inputs(model.config, images=3, texts=4)
    return torch.export.export(model, example, dynamic_shapes=SHAPES)


# --------------------------------------------------------------------------------- compiled graphs


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_the_model_compiles_into_one_graph(model):
    """Only one size is compared, because compiling is slow."""
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    inputs = random_inputs(SHALLOW)
    with torch.no_grad():
        found = compiled(*inputs).logits_per_image
        assert (found - model(*inputs).logits_per_image).abs().max() < LOGITS
        assert_far(found, without_mask(model)(*inputs).logits_per_image)
    torch._dynamo.reset()


@pytest.mark.slow
def test_one_compiled_graph_works_for_every_input_size(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    assert_same(compiled, model)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------- exported graphs


@pytest.mark.slow
def test_an_exported_graph_takes_any_batch_size_and_any_text_length(model):
    assert_same(exported(model).module(), model)


@pytest.mark.slow
def test_an_exported_graph_with_eager_attention_gives_the_outputs_of_the_model():
    model, _ = twins(AS_OPENAI, attention="eager")
    assert_same(exported(model).module(), model)


def test_the_comparison_fails_for_a_graph_without_a_causal_mask(model):
    with pytest.raises(AssertionError):
        assert_same(without_mask(model), model)


# -------------------------------------------------------------------------------------------- ONNX


@pytest.mark.slow
@pytest.mark.parametrize("config", [SHALLOW, AS_OPENAI], ids=["shallow", "as openai"])
def test_the_model_runs_in_onnxruntime(config, tmp_path):
    model, _ = twins(config)
    path, names = tmp_path / "model.onnx", ["pixels", "ids"]
    torch.onnx.export(
        model, random_inputs(config, images=3, texts=4), path, dynamo=True, dynamic_shapes=SHAPES,
        input_names=names, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def graph(*tensors):
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    assert_same(graph, model)
