"""Everything about disks and hubs.

These files know configs, dictionaries and tensors, and never the classes of the reference. The
classes build themselves from these:

- `hub.py`: a name -> a directory (embedded, local, or downloaded)
- `tensors.py`: a weights file -> its tensors
- `names.py`: the names that three layouts give the tensors
- `configs.py`: transformers' config, or the shapes of OpenAI's weights <-> fields of a config
- `open_clip.py`: open_clip's config
- `published.py`: the published models: their numbers, names and activations
- `models.py`: fields and tensors under our names, for a class to build itself from
- `modules.py`: the names of a model's modules, and whether its config describes them
- `pretrained.py`: from_pretrained and save_pretrained of the classes
- `checks.py`: checks of the numbers of configs, tokenizers and transforms
- `saving.py`: a model, or a whole checkpoint -> a directory
- `vocabularies.py`: a tokenizer's files <-> vocabulary, merges and special tokens
- `images.py`: an image transform's files <-> settings
- `pictures.py`: files, arrays and tensors -> Pillow images
- `pickles.py`: the tensors of .bin and .pt files; their code is never run
- `state_dicts.py`: what such a file holds -> the state dict of one model
- `tars.py`: what lies in a tar, up to where it is damaged
- `reading.py`: JSON and lines of text, with limits
- `writing.py`: atomic writes

What holds for every file (`tests/test_promises.py` names the test of each promise):

- Every tensor in a file has its place in the model, and every parameter its tensor of the same
  shape; otherwise a `CheckpointError` lists all that are missing, unexpected or misshapen. What
  surrounds a CLIP in a larger model's file (Lightning's, Stable Diffusion's) is named in a warning.
- No weight is changed: no folding, no fusing, no invented bias. Load, save, load is bit-exact, and
  so is converting there and back. NaN and infinity are named in a warning.
- The activation, the LayerNorm epsilon and the end token are the checkpoint's. A layout that cannot
  express a model refuses it. Tokenizer and transform must fit the model, when they are loaded or
  saved together. A save into a directory with another model's files is refused.
- Files that cannot be trusted run no code. They end in a `CheckpointError` or in a load that is
  what the file says: `tests/test_hostile.py` tries 8,900 of them, each within a second of CPU time
  and 200 MB. JSON may have 1 MB, a tokenizer's files 5 MB, a safetensors header 6 MB, a pickle 400
  kB and 10,000 tensors: more than any CLIP's. A file that comes damaged from the hub is deleted;
  one that was changed later is an error and stays.
- All files of one `load` or one conversion are of one commit, or of one save, whatever is pushed or
  saved meanwhile. A process that is killed while it saves leaves the old checkpoint or the new one.
  What else it left goes with the next save, and is never published by `upload_folder`.
- Not promised: a weights file that another program cuts short in place, while a model has it
  mapped, ends the process (a bus error), with transformers too.
- In the file's dtype the weights are the mapped file; in another they are converted a few at a
  time, so that the most memory at once stays within 1.15 times the model.
"""
