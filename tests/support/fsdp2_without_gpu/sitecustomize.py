"""Lets accelerate's FSDP2 code run over gloo: on a CPU accelerate would ignore FSDP2 silently."""

import os

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from accelerate import state, utils

    state.PartialState._prepare_backend = lambda self, *_, **__: ("gloo", state.DistributedType.MULTI_CPU)
    start = state.AcceleratorState.__init__

    def start_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        fresh = not state.AcceleratorState._shared_state
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.distributed_type = state.DistributedType.FSDP
        if fresh:
            self.fsdp_plugin = fsdp_plugin or utils.FullyShardedDataParallelPlugin()
            if self._mixed_precision != "no":  # as accelerate does on a GPU
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)

    state.AcceleratorState.__init__ = start_fsdp
