"""Read and write the files of checkpoints, on a disk and from the Hugging Face hub.

These modules work with dictionaries and tensors. The six main files (config.py, model.py, ...)
import these modules. These modules never import the six files.

- `hub.py`: a name -> a directory (embedded, local, or downloaded)
- `tensors.py`: a weights file -> its tensors
- `names.py`: the names of the tensors in each layout
- `configs.py`: transformers' config <-> fields of a config; shapes of weights -> fields
- `open_clip.py`: open_clip's config <-> fields of a config
- `published.py`: the shapes, names and activations of the published models
- `models.py`: a checkpoint -> the fields and tensors that a model is built from
- `modules.py`: the names of a model's modules, and a check of the modules against the config
- `pretrained.py`: base classes with `from_pretrained` and `save_pretrained`
- `checks.py`: checks of configs, inputs, tokenizers and transforms
- `saving.py`: a model, or a whole checkpoint -> a directory
- `vocabularies.py`: a tokenizer's files <-> vocabulary, merges and special tokens
- `images.py`: an image transform's files <-> settings
- `pictures.py`: files, arrays and tensors -> Pillow images
- `ahead.py`: reads the next files in threads
- `pickles.py`: the tensors of .bin and .pt files; the code in them never runs
- `state_dicts.py`: the contents of a pickle -> the state dict of one model
- `tars.py`: reads the files of a tar, up to the first damage
- `reading.py`: reads JSON and lines of text, with a limit on their size
- `writing.py`: atomic writes

The promises of these modules (`tests/test_promises.py` names the tests of each promise):

- Every tensor in a file has a place in the model, and every parameter has a tensor of its shape.
  Otherwise a `CheckpointError` lists all tensors that are missing, unexpected or misshapen. If a
  file contains a larger model, such as Stable Diffusion, only the CLIP is read. A warning lists
  the other tensors.
- No weight is folded, fused or added. Saving and loading a model changes no bit. Conversion to
  another layout and back changes no bit either. A warning lists the tensors with NaN or infinity.
- The activation, the LayerNorm epsilon and the end token come from the checkpoint. `save` raises an
  error for a layout that cannot express the model. `load` and `save` raise an error for a tokenizer
  or a transform that does not fit the model. `save` raises an error if `load` would read another
  model's files in the directory instead of the saved files.
- Code in a file never runs. A hostile file raises a `CheckpointError`, or it loads exactly as the
  file says. `tests/test_hostile.py` reads 8,900 files, each within a second of CPU time and 200 MB.
  Size limits are higher than any published CLIP needs: 1 MB for JSON, 5 MB for a tokenizer's file,
  6 MB for a safetensors header, 400 kB for a pickle, 10,000 tensors.
- A file that was damaged in the download from the hub raises an error, and is deleted. A file that
  was changed later raises an error, and is kept.
- The files that a `load` or a conversion reads come from one commit, or from one save, even if
  others push or save at the same time. A process that is killed during a save leaves the old
  checkpoint or the new one. The next save removes the unfinished files, and `upload_folder` never
  publishes them.
- Weights in the file's dtype are memory-mapped. Weights in another dtype are converted a few at a
  time, so that a load needs at most 1.15 times the memory of the model.
- A memory-mapped weight can begin at any address. On some CPUs (seen on an AMD EPYC), MKL then
  rounds differently than for the same weights at aligned addresses. `copy.deepcopy(model)` copies
  the weights to aligned addresses.
- Not promised: if another program shortens a weights file while a model has it memory-mapped, the
  process ends with a bus error. transformers has the same limit.
"""
