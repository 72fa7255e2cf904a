"""torch.compile, by accelerate's settings: what is compiled when, and that the files show nothing of it."""

import functools

import pytest
import tiny_sd3
import torch._dynamo
from ranks import watch_updates
from safetensors.torch import load_file


def train(script, run, **flags):
    """Losses by update, and the trained weights."""
    with watch_updates(script) as updates:
        folder = run(script, **flags)
    weights = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("transformer/*.safetensors")]
    return {update["step"]: update["loss"] for update in updates}, load_file(*weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora"])  # of the other in tests/engines/test_table.py
def test_blocks_are_compiled_once_a_shape(script, run, tmp_path, monkeypatch):
    """As `accelerate launch --dynamo_backend eager --dynamo_use_regional_compilation` sets it, with two shapes."""
    for number, size in enumerate([(64, 64), (64, 64), (96, 32)]):
        tiny_sd3.images(tmp_path / f"{number}", 1, size=size)[0].rename(tmp_path / f"{number}.png")
        (tmp_path / f"{number}").rmdir()
    flags = {"instance_data_dir": tmp_path, "use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "32,32;16,64"}
    flags |= {"max_train_steps": 6, "checkpointing_steps": 4, "gradient_checkpointing": True}
    flags |= {"validation_prompt": "a dog", "num_validation_images": 1, "output_dir": tmp_path / "plain"}
    plain_losses, plain_weights = train(script, run, **flags)

    for name in ("REGIONAL_COMPILATION", "DYNAMIC"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_USE_{name}", str(name != "DYNAMIC"))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    graphs, update_weights, counters = [], script.update_weights, torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()

    @functools.wraps(update_weights)
    def record(*args):
        update_weights(*args)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(script, "update_weights", record)
    compiled = tmp_path / "compiled"
    losses, weights = train(script, run, **flags | {"output_dir": compiled})
    shapes = [graphs[0], graphs[2]]  # an epoch has both
    assert 2 <= shapes[0] < shapes[1] <= 2 * shapes[0] + 2
    assert graphs[2:] == [shapes[1]] * 4
    assert not counters["graph_break"]
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    assert weights.keys() == plain_weights.keys()
    assert (compiled / "image_0.png").read_bytes() == (tmp_path / "plain/image_0.png").read_bytes()

    flags |= {"output_dir": tmp_path / "on", "resume_from_checkpoint": compiled / "checkpoint-4"}
    later, again = train(script, run, **flags)
    assert later == {step: loss for step, loss in losses.items() if step > 4}
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
