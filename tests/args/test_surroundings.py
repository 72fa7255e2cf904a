"""What surrounds a run: file systems without locks, loader processes that are spawned, tracebacks, packages' lines."""

import errno
import logging
import multiprocessing
import types

import pytest
import tiny_sd3
from conftest import isolated
from ranks import watch_updates


def test_a_file_system_without_locks_is_said(lora, run, monkeypatch, caplog, tmp_path):
    def acquire(lock, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lora.FileLock, "acquire", acquire)
    run(lora, max_train_steps=1)
    assert f"{tmp_path / 'out'} cannot be locked, so see to it that no other run writes to it" in caplog.text


def test_an_environment_variable_shows_tracebacks(lora, argv, monkeypatch):
    monkeypatch.setenv("SHOW_TRACEBACKS", "1")
    with isolated(), pytest.raises(OSError, match="nowhere does not appear to have a file") as end:
        lora.main(lora.parse_args(argv(pretrained_model_name_or_path="nowhere")))
    assert any(entry.name == "read_pipeline" for entry in end.traceback)


def test_bitsandbytes_does_not_warn_of_a_kernel_that_is_not_needed(script):
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


@pytest.mark.slow
def test_loader_processes_may_be_spawned(lora, run, monkeypatch, tmp_path):
    """As on macOS and Windows: each imports the script by itself, and the losses are the same."""
    losses = {}
    for method in ("fork", "spawn"):
        monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
        multiprocessing.set_start_method(method, force=True)
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled: a second less to import
        with watch_updates(lora) as updates:
            run(lora, dataloader_num_workers=1, max_train_steps=3, random_flip=True, output_dir=tmp_path / method)
        losses[method] = [update["loss"] for update in updates]
    assert losses["fork"] == losses["spawn"] and len(losses["fork"]) == 3


def test_other_files_named_metadata_leave_a_folder_what_it_is(lora, argv, tmp_path):
    tiny_sd3.images(tmp_path, 2)
    (tmp_path / "metadata.txt").write_text("taken in May")
    images, captions = lora.read_folder(lora.parse_args(argv()), "--instance_data_dir", tmp_path)
    assert (len(images), captions) == (2, [None, None])


def test_class_images_that_need_too_much_memory(lora, argv, monkeypatch, capsys, tmp_path):
    def draw_images(*inputs, **options):
        raise MemoryError("out of memory")

    monkeypatch.setattr(lora, "draw_images", draw_images)
    flags = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": tmp_path / "class"}
    with isolated(), pytest.raises(SystemExit) as end:
        lora.main(lora.parse_args(argv(**flags)))
    assert end.value.code == 2
    assert "lower --sample_batch_size if memory ran out" in capsys.readouterr().err


def test_a_checkpoint_of_before_a_flag_was_there_resumes(lora, argv):
    """Its manifest lacks the name: there is nothing to compare."""
    now = vars(lora.parse_args(argv())) | {"processes": 1, "images": 1, "method": lora.METHOD}
    then = {name: value for name, value in now.items() if name not in ("rank", "use_ema", "learning_rate")}
    accelerator = types.SimpleNamespace(distributed_type=types.SimpleNamespace(value="NO"))
    lora.compare_runs(accelerator, "checkpoint-1", {"run": then}, now)
