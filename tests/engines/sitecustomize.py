"""accelerate's FSDP2 and DeepSpeed code over gloo: on a CPU accelerate would pass FSDP2 over in silence."""

import importlib
import os

if os.environ.get("ENGINE"):
    from accelerate import state, utils

    state.PartialState._prepare_backend = lambda self, *_, **__: ("gloo", state.DistributedType.MULTI_CPU)
    start = state.AcceleratorState.__init__

    def start_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        fresh = not state.AcceleratorState._shared_state
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.distributed_type = state.DistributedType.FSDP
        if fresh:
            self.fsdp_plugin = fsdp_plugin or utils.FullyShardedDataParallelPlugin()

    if os.environ["ENGINE"] == "fsdp2":
        state.AcceleratorState.__init__ = start_fsdp
    else:
        communication = importlib.import_module("deepspeed.comm.torch")
        communication.build_shm_op = lambda: None  # for CPUs it would compile an extension, which takes minutes
