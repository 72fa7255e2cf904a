"""Several prompts of --validation_prompt: a row of the grid each, named in trackers and card."""

import numpy as np
import pytest
import yaml
from PIL import Image
from test_trackers import read_tensorboard, read_wandb

IN_TURN = True  # one script for each test, see conftest.py

PROMPTS = ["sks dog on the beach", 'a "red" car, it\'s new', "a dog"]
TAGS = ["0_sks_dog_on_the_beach", "1_a_red_car_it_s_new", "2_a_dog"]


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def drawn(run, few_steps, tmp_path):
    """Runs a script with some prompts, two images each, drawn after the first and the last update."""

    def drawn(script, prompts, **flags):
        flags |= {"num_validation_images": 2, "validation_epochs": 10, "max_train_steps": 3, "learning_rate": 1e-2}
        return run(script, validation_prompt=prompts, output_dir=tmp_path / str(len(prompts)), **flags)

    return drawn


def test_each_prompt_is_a_row_of_the_images_that_it_gives_alone(script, drawn):
    output = drawn(script, PROMPTS)
    alone = drawn(script, PROMPTS[1:2])
    for pattern in ("image_{}.png", "validation/step-000002-{}.png"):
        images = [pixels(output / pattern.format(number)) for number in range(6)]
        rows = [np.concatenate(images[first : first + 2], axis=1) for first in (0, 2, 4)]
        assert np.array_equal(pixels(output / pattern.format("grid")), np.concatenate(rows))
        assert np.array_equal(rows[1], pixels(alone / pattern.format("grid")))
        assert not np.array_equal(rows[0], rows[1])
        assert not (output / pattern.format(6)).exists()


def test_trackers_show_each_with_its_prompt(lora, drawn):
    output = drawn(lora, PROMPTS, report_to="tensorboard,wandb", tracker_project_name="dogs")
    _, images = read_tensorboard(output / "logs" / "dogs")
    assert images == {f"validation_{tag}": [2] for tag in TAGS} | {f"test_{tag}": [3] for tag in TAGS}
    _, config, _ = read_wandb(output / "logs")
    assert config["validation_prompt"] == " | ".join(PROMPTS)
    sent = {path.name.split("_3_")[0] for path in (output / "logs").rglob("media/images/test_*.png")}
    assert len(list((output / "logs").rglob("media/images/test_*.png"))) == 6
    assert all(any(name.startswith(f"test_{tag}") for name in sent) for tag in TAGS)


def test_the_card_has_each_image_with_its_prompt(script, drawn):
    card = (drawn(script, PROMPTS) / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    wanted = [(prompt, f"image_{2 * row + column}.png") for row, prompt in enumerate(PROMPTS) for column in (0, 1)]
    assert [(image["text"], image["output"]["url"]) for image in header["widget"]] == wanted
    assert f"pipeline({PROMPTS[0]!r}, **size)" in card


def test_unset_steps_and_guidance_are_the_pipeline_s(script, argv):
    import inspect

    defaults = inspect.signature(script.StableDiffusion3Pipeline.__call__).parameters
    args = script.parse_args(argv())
    assert args.validation_num_inference_steps == defaults["num_inference_steps"].default
    assert args.validation_guidance_scale == defaults["guidance_scale"].default
