"""configs/: `accelerate launch --config_file` reads each file as it was meant."""

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT

FOLDER = ROOT / "configs"
MEANT = {
    "one_gpu": ("NO", 1, {}),
    "several_gpus": ("MULTI_GPU", 2, {}),
    "compile": ("NO", 1, {"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": True}),
    "fsdp2": ("FSDP", 2, {"fsdp_version": 2, "fsdp_transformer_layer_cls_to_wrap": "JointTransformerBlock"}),
}


def test_every_file_is_in_the_table():
    assert {path.stem for path in FOLDER.iterdir()} == MEANT.keys()


@pytest.mark.parametrize("name", MEANT)
def test_accelerate_reads_it(name):
    kind, processes, options = MEANT[name]
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert config.num_processes == processes
    assert config.mixed_precision == "bf16"
    read = config.dynamo_config | config.fsdp_config
    assert read.items() >= options.items()


@pytest.mark.parametrize("name", MEANT)
def test_every_key_is_an_option_of_accelerate_launch(name):
    """accelerate takes unknown keys inside a section in silence."""
    known = vars(launch_command_parser().parse_args(["script.py"]))
    sections = [value for value in yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).values()]
    keys = {key for section in sections if isinstance(section, dict) for key in section}
    assert keys <= known.keys()
