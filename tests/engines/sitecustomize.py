"""accelerate's FSDP2 and DeepSpeed code over gloo: on a CPU accelerate would pass FSDP2 over in silence."""

import os

if os.environ.get("ENGINE"):
    from accelerate import state, utils

    state.PartialState._prepare_backend = lambda self, *_, **__: ("gloo", state.DistributedType.MULTI_CPU)
    start = state.AcceleratorState.__init__

    def start_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        fresh = not state.AcceleratorState._shared_state
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh:
            self.distributed_type = state.DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin or utils.FullyShardedDataParallelPlugin()

    def copy_out(*args, **kwargs):
        """Gathered tensors may still be on their way; the copy from the GPU, absent here, would wait for them."""
        return {name: tensor.clone() for name, tensor in get_model_state_dict(*args, **kwargs).items()}

    if os.environ["ENGINE"] == "fsdp":
        from torch.distributed.checkpoint import state_dict

        get_model_state_dict, state_dict.get_model_state_dict = state_dict.get_model_state_dict, copy_out
        state.AcceleratorState.__init__ = start_fsdp
