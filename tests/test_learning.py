"""That training teaches: on the demo's pipeline, which has learned its world, the subject's pictures are learned."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "demo"))

import evaluate  # noqa: E402
import world  # noqa: E402
from classifier import load_classifier  # noqa: E402

PROMPTS = [f"a photo of {world.SUBJECT} {place}" for place in world.PLACES.values()]
FLAGS = {
    "pretrained_model_name_or_path": evaluate.BASE,
    "instance_data_dir": ROOT / "demo" / "subject",
    "instance_prompt": f"a photo of {world.SUBJECT}",
    "resolution": world.SIDE,
    "max_sequence_length": evaluate.TOKENS,
    "train_batch_size": 5,
    "max_train_steps": 100,
    "lr_warmup_steps": 0,
    "cache_latents": True,
    "seed": 0,
    "report_to": "none",
}
METHODS = {"lora": {"rank": 16, "learning_rate": 2e-3}, "full": {"learning_rate": 5e-4}}
GAIN = 0.08  # of evaluate.subject_score: about -0.05 for dogs of the world, 0.17 for the subject as it is drawn


def subject_score(folder):
    pipeline = evaluate.load_pipeline(folder)
    return evaluate.subject_score(load_classifier(), evaluate.draw(pipeline, PROMPTS))


@pytest.fixture(scope="module")
def base_score():
    return subject_score(evaluate.BASE)


@pytest.mark.slow
def test_the_subject_is_learned(kind, script, run, base_score):
    out = run(script, **FLAGS, **METHODS[kind])
    assert subject_score(out) > base_score + GAIN


def test_the_base_draws_what_is_asked():
    """Held-out combinations; the floor leaves room for the few samples that a test has time for."""
    asked = evaluate.held_out_world(24)
    pictures = evaluate.draw(evaluate.load_pipeline(), [text for _, text in asked])
    assert evaluate.prompt_scores(load_classifier(), pictures, [what for what, _ in asked]) >= 0.7
