"""List the promises of README and of the header of `miniclip/files`, and the tests of each promise.

A list entry quotes some words of a promise, so this test fails if the sentence changes. Tests that
need a GPU are skipped on other machines. Tests of the real hub run only with MINICLIP_HUB=1.
miniclip promises nothing if another program shortens a memory-mapped weights file. Then Python ends
with a bus error. The same happens with transformers.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PLACES = [HERE.parent / "README.md", HERE.parent / "miniclip/files/__init__.py"]

TABLE = """
loads `openai/clip-vit-*`
    official: an_official_checkpoint_gives_the_ids_pixels_and_logits_of_transformers
    layouts: presets_have_the_shapes_of_the_published_files
draw this picture offline, in seconds
    readme: each_command_in_readme_works
Six files are the reference
    structure: no_file_of_the_reference_imports_a_file_later_in_reading_order
    structure: the_reference_has_at_most_a_thousand_lines
    structure: definitions_come_before_their_use
the reference imports no instrument
    structure: the_reference_imports_no_subpackage_except_files_and_text
Each notebook runs offline in under three minutes
    notebooks: each_notebook_runs_without_an_error_or_a_warning
`load` takes the name of an embedded checkpoint, a directory
    checkpoint: model_tokenizer_and_transform_load_from_every_form_of_a_path
    hub: model_names_of_openai_load_the_matching_repository_of_the_hub
    hub: from_pretrained_accepts_a_pasted_address_of_a_repository
`subfolder="text_encoder"` reads the text tower
    brought: a_checkpoint_in_a_subfolder_of_a_directory_is_loaded
    hub: a_checkpoint_in_a_subfolder_of_a_repository_is_loaded
`config=` gives the sizes
    brought: a_file_needs_a_config_if_its_shapes_were_published_with_different_activations
reads and writes all of these
    layouts: conversion_to_any_layout_and_back_changes_no_bit
logits and every block, float32, CPU
    model: logits_equal_those_of_transformers
    model: float32_outputs_are_bit_equal_to_those_of_transformers_at_every_batch_size
every block, head and site, float64
    model: every_site_gives_the_same_tensor_as_in_transformers
    model: the_gradients_of_all_parameters_equal_those_of_transformers
both loading the same file
    checkpoint: a_file_like_openai_clip_vit_base_patch32_gives_the_logits_of_transformers
operations in another order
    export: the_model_compiles_into_one_graph
    export: an_exported_graph_with_eager_attention_gives_the_outputs_of_the_model
1.1 times the error of transformers
    model: half_precision_is_as_accurate_as_in_transformers
equal, every code point
    tokenizer: texts_have_the_ids_of_transformers
    tokenizer: texts_have_the_ids_of_openai
    tokenizer: every_code_point_has_the_ids_of_the_reference
transformers' PIL back end
    transform: every_mode_of_pillow_gives_the_pixels_of_the_reference
    transform: images_of_a_hundred_sizes_give_the_pixels_of_the_reference
    transform: difficult_files_give_the_pixels_of_the_reference
transformers on the same GPU
    model: logits_are_close_to_those_of_transformers_on_every_device
published logits and embeddings
    official: miniclip_reproduces_the_values_that_other_projects_published
The same command now names the first site that differs, vision.pooled
    forks: compare_reports_a_fault_in_a_model_with_tokens_as_the_first_axis
causality makes them unnecessary
    model: tokens_after_the_end_token_do_not_change_the_embedding
sites add no operation and change no bit
    sites: unused_sites_add_no_operation_and_change_no_bit
exact sum over layers, heads or tokens
    lens: the_parts_sum_to_the_embedding
The given model does not change
    surgery_shapes: a_resized_model_shares_unchanged_tensors_with_the_given_model
keep each bit of the new model
    surgery_shapes: a_model_after_surgery_is_saved_and_loaded_bit_for_bit
each in ten lines, and compares each with its paper
    published: each_modification_takes_at_most_ten_lines
compares our versions with the authors' code
    originals: decompose_gives_the_same_contributions_as_clip_prs
a larger example, SigLIP in one file
    subclasses: siglip_gives_the_outputs_of_transformers
lists all tensors that are missing, unexpected or misshapen
    checkpoint: the_error_lists_all_missing_and_unexpected_tensors_and_wrong_shapes
warning lists the other tensors
    brought: issue_284_of_openai_clip_a_lightning_module_with_a_head_is_loaded
    brought: issue_8435_of_diffusers_the_text_encoder_in_a_stable_diffusion_file_is_loaded
Saving and loading a model changes no bit
    checkpoint: load_save_load_is_bit_exact
A warning lists the tensors with NaN or infinity
    layouts: load_warns_of_weights_that_are_not_finite_and_does_not_change_them
end token come from the checkpoint
    model: the_custom_end_token_and_the_largest_id_have_different_positions
    brought: metaclip_2_pools_a_text_at_its_first_token_with_id_2
    layouts: the_model_uses_the_heads_and_eps_of_an_open_clip_config
layout that cannot express the model
    layouts: the_error_names_the_field_that_a_layout_cannot_express
does not fit the model
    checkpoint: a_tokenizer_with_more_tokens_than_the_model_is_an_error
    checkpoint: a_transform_and_a_model_with_different_image_sizes_are_an_error
    checkpoint: a_square_transform_for_a_model_of_wide_images_is_an_error
would read another model's files
    saving: a_save_over_another_checkpoint_replaces_it_or_is_an_error
Code in a file never runs
    checkpoint: pickled_code_is_an_error_and_does_not_run
    hostile: faulty_pickles_raise_an_error_or_load_as_the_file_says
    hostile: pickles_made_by_hand_raise_an_error_or_load_as_the_file_says
    layouts: a_torchscript_archive_is_loaded_without_running_its_code
or it loads exactly as the file says
    hostile: faulty_safetensors_raise_an_error_or_load_as_the_file_says
    hostile: a_faulty_index_of_shards_raises_an_error_or_loads_as_the_file_says
    hostile: a_faulty_config_raises_an_error_or_loads_as_the_file_says
    hostile: a_faulty_tokenizer_raises_an_error_or_loads_as_the_files_say
    hostile: a_faulty_transform_file_raises_an_error_or_loads_as_it_says
    hostile: a_checkpoint_with_missing_or_contradictory_files_raises_an_error_or_loads
within a second of CPU time and 200 MB
    hostile: a_named_pipe_raises_an_error_without_waiting
    hostile: very_long_files_take_little_memory_and_give_short_error_messages
    tokenizer: cleaning_many_combining_marks_does_not_take_quadratic_time
    tokenizer: splitting_at_added_tokens_does_one_lookup_per_position_and_token_length
from the hub raises an error, and is deleted
    hub: a_damaged_weights_file_raises_an_error_and_is_not_cached
    hub: if_the_cache_has_no_symlinks_the_hashes_come_from_the_hub
changed later raises an error, and is kept
    hub: a_file_that_was_changed_after_the_check_is_checked_again
come from one commit
    hub: a_load_or_conversion_uses_one_commit_even_if_the_branch_moves
    hub: cached_features_are_stored_with_the_commit_of_their_model
or from one save
    saving: a_load_during_a_save_reads_the_files_of_one_save
The next save removes
    saving: a_save_removes_files_of_killed_processes_but_not_of_running_processes
never publishes them
    hub: files_left_by_a_crashed_save_are_not_published
leaves the old checkpoint or the new one
    saving: a_process_killed_while_saving_leaves_the_old_or_the_new_checkpoint
    saving: two_saves_at_the_same_time_leave_one_complete_checkpoint
    saving: a_full_disk_raises_an_error_and_leaves_the_old_checkpoint
at most 1.15 times the memory of the model
    checkpoint: loading_needs_only_the_memory_of_the_weights_in_the_requested_dtype
"""
PROMISES: dict[str, list[str]] = {}  # {quoted words: names of the tests}
for line in TABLE.strip().splitlines():
    if line.startswith("    "):
        [*PROMISES.values()][-1].append(line.strip())
    else:
        PROMISES[line] = []


@pytest.mark.parametrize("words", PROMISES)
def test_each_promise_is_in_the_docs_and_its_tests_exist(words):
    assert words in docs()
    assert PROMISES[words]
    for test in PROMISES[words]:
        file, name = test.split(": ")
        assert f"test_{name}" in names(file)


@cache
def docs():
    """The text of all `PLACES`, as one line."""
    return " ".join(" ".join(path.read_text(encoding="utf-8") for path in PLACES).split())


@cache
def names(file):
    """The names of the functions in a test file."""
    tree = ast.parse((HERE / f"test_{file}.py").read_text(encoding="utf-8"))
    return {getattr(node, "name", "") for node in tree.body}
