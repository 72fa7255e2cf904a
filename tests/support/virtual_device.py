"""A simulated CUDA card: running the scripts on it finds tensors, models and generators on the wrong device.

    python tests/support/virtual_device.py train_dreambooth_sd3.py --flags
    python tests/support/virtual_device.py          runs of the scripts, one a line of standard input: see `serve`

The device is PyTorch's PrivateUse1. To the dispatcher, autograd and autocast it is a device like any other; its memory
is the CPU's. One kernel, `fallback`, serves all operators: it refuses arguments on two devices, as CUDA does, and
calls the CPU's kernel on the same memory. So a float32 run ends with the weights of a run on the CPU, bit for bit.
PyTorch does not allow the name "cuda" for such a device. Its name is "cuda" and a NUL, where C++ ends the text it
hands to Python, so `tensor.device.type == "cuda"` holds. In the other direction a TorchFunctionMode replaces "cuda" in
calls of PyTorch, and torch.cuda answers as if there were one card. Accelerate, diffusers and the scripts then run
their code for a GPU.

What it shows: tensors, indices and generators on the wrong device; failing code for CUDA, such as fused and foreach
optimizers, GradScaler, pinned memory and the random states of checkpoints; dtypes under autocast, which follows CUDA's
lists; and how often the host waits for the device, in `counts`.

What it cannot show: how much memory a run needs; races of non-blocking copies, because copies are done at once; CUDA's
kernels, their rounding and what they refuse; several devices; torch.compile; and bitsandbytes' kernels, which here are
those for the CPU.

It depends on private parts of PyTorch (PRIVATE), which can change with any version.
"""

import atexit
import collections
import contextlib
import copyreg
import ctypes
import functools
import json
import operator
import os
import runpy
import sys
import threading
import traceback
import types
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes compiles its steps, half a minute each

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils import backend_registration  # noqa: E402

NAME, OPEN = "cuda\0", "privateuseone"  # the device's name as others read it, and that by which PyTorch finds it
PRIVATE = """_C._rename_privateuse1_backend _C._acc.register_python_privateuseone_hook
_C._acc.register_python_privateuseone_device_guard utils.backend_registration._privateuse1_backend_name
utils.backend_registration._DummyPrivateUse1Hook utils.backend_registration._DummyDeviceGuard _C._to_dlpack
_C._from_dlpack _C.DisableTorchFunction _C._ExcludeDispatchKeyGuard _C.DispatchKeySet
_C.DispatchKey.AutocastPrivateUse1 _C._dispatch_get_all_op_names _C._dispatch_has_kernel_for_dispatch_key
_C._swap_tensor_impl _C.TensorBase.data _has_compatible_shallow_copy_type ops.aten.convolution_overrideable
ops.aten.convolution_backward_overrideable ops.aten._pin_memory ops.aten._copy_from
ops.aten._local_scalar_dense""".split()
CPU, CPU_KERNEL, Device = torch.device("cpu"), torch._C.DispatchKey.CPU, torch.device
aten, counts = torch.ops.aten, collections.Counter()  # what the device did, printed at the end
free_bytes = [2**34]  # what the device says it has left; a run can be given less
# CUDA's autocast (ATen/autocast_mode.h): what it has a rule for and is in none of these lists is done in float32.
LOWER = """_convolution _convolution.deprecated addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d
conv_tbc conv_transpose1d conv_transpose2d.input conv_transpose3d.input einsum gru_cell linalg_multi_dot linalg_vecdot
linear lstm_cell matmul mm mv prelu rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention""".split()
SUMS = "cumprod cumsum log_softmax.int prod prod.dim_int softmax.int sum sum.dim_IntList".split()
WIDEST = "addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot".split()


def missing():
    """Those of PRIVATE that this PyTorch does not have."""

    def found(name):
        try:
            return operator.attrgetter(name)(torch) is not None
        except (AttributeError, RuntimeError):
            return False

    return [name for name in PRIVATE if not found(name)]


def waits():
    """How often the host has waited for something of the device so far."""
    return counts["values read"] + counts["copies from the device"]


# ---------------------------------------------------------------------------------------------------------------------
# The same memory under the name of the other device
# ---------------------------------------------------------------------------------------------------------------------


class Header(ctypes.Structure):
    """The start of a DLPack tensor, which hands memory to the device that it names."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int), ("device_id", ctypes.c_int)]


get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
DL_CPU, DL_OPEN = 1, 12  # DLPack's numbers: kDLCPU, and kDLExtDev, which PyTorch reads as PrivateUse1


def recast(tensor, kind):
    capsule = torch._C._to_dlpack(tensor)
    header = Header.from_address(get_pointer(capsule, b"dltensor"))
    header.device_type, header.device_id = kind, 0
    return torch._C._from_dlpack(capsule)


def is_virtual(value):
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def on_cpu(value):
    """An argument of a kernel as the CPU's kernel takes it."""
    return recast(value, DL_CPU) if is_virtual(value) else CPU if isinstance(value, Device) else value


def on_device(value):
    return recast(value, DL_OPEN) if isinstance(value, torch.Tensor) else value


def become(tensor, new):
    """Gives a tensor of the device the values of one of the CPU, and its shape."""
    if tensor.shape == new.shape:
        on_cpu(tensor).copy_(new)
    else:
        place = on_device(new).untyped_storage(), 0, new.shape, new.stride()
        aten.set_.source_Storage_storage_offset._op_dk(CPU_KERNEL, tensor, *place)
    return tensor


def each(function, *values):
    """The function of a value, or of each in a list; of several, side by side."""
    nested = isinstance(values[0], (list, tuple))
    return [each(function, *items) for items in zip(*values, strict=True)] if nested else function(*values)


# ---------------------------------------------------------------------------------------------------------------------
# The kernel of all operators
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def read_schema(op):
    """What an operator's declaration says of its arguments: which it writes to, which may be of another device."""
    schema, name = op._schema, op._schema.name.removeprefix("aten::")
    labels = [entry.alias_info and [*entry.alias_info.before_set, ""][0] for entry in schema.returns]
    written = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return types.SimpleNamespace(
        name=name,
        names=[argument.name for argument in schema.arguments],
        tensors=[isinstance(argument.type, torch.TensorType) for argument in schema.arguments],
        written={argument.name: [*argument.alias_info.before_set, ""][0] for argument in written},
        outs=[argument.name for argument in schema.arguments if argument.is_out],
        returned=labels,
        is_view=any(label is not None for label in labels) and not written,
        # CUDA computes with a number that is a tensor of the CPU, and takes indices from there
        takes_number=torch.Tag.pointwise in op.tags or name.startswith(("_foreach", "fill", "masked_fill", "index_p")),
        elsewhere={"indices"} if "index" in name else {"lr"} if "_fused" in name else set(),
    )


def check(op, schema, name, value):
    """Refuses an argument of the CPU where CUDA would. Errors: RuntimeError in CUDA's words."""
    if name == "generator" and value is not None and value._cdata not in Generator.known:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    foreign = isinstance(value, torch.Tensor) and not is_virtual(value) and name not in schema.elsewhere
    if foreign and (value.dim() or name in schema.written or not schema.takes_number):
        both = f"found at least two devices, cuda:0 and {value.device}! ({name} of {op})"
        raise RuntimeError(f"Expected all tensors to be on the same device, but {both}")


def copy_from(source, target):
    counts["copies from the device"] += not is_virtual(target)
    counts["copies to the device"] += not is_virtual(source)
    on_cpu(target).copy_(on_cpu(source))
    return target


def fallback(op, *args, **kwargs):
    """Any operator: its arguments are checked, the CPU computes, and the results are of the device."""
    with torch._C.DisableTorchFunction():
        schema = read_schema(op)
        counts["operators"] += 1
        counts["values read"] += schema.name == "_local_scalar_dense"
        if schema.name == "_copy_from":
            return copy_from(*args[:2])
        pairs = zip(args, schema.tensors, strict=False)  # C++ hands a number in a tensor's place over as a number
        args = [torch.tensor(value) if fits and isinstance(value, (int, float)) else value for value, fits in pairs]
        values = dict(zip(schema.names, args, strict=False)) | kwargs
        for name, value in values.items():
            each(functools.partial(check, op, schema, name), value)
        if schema.is_view or schema.name == "set_":
            return op._op_dk(CPU_KERNEL, *args, **kwargs)  # which does not look into the memory
        if schema.name == "resize_":
            return become(args[0], op(on_cpu(args[0]).clone(), args[1]))
        if kwargs.pop("pin_memory", None):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        if "generator" in schema.names and kwargs.get("generator") is None:
            kwargs["generator"] = default_generator
        new = {name: each(on_cpu, value) for name, value in kwargs.items()}
        new |= {name: each(torch.clone, new[name]) for name in schema.outs}  # shared memory could not be resized
        result = op(*each(on_cpu, args), **new)
        for name in schema.outs:
            each(become, kwargs[name], new[name])
        written = {label: values[name] for name, label in schema.written.items()}
        pairs = zip(schema.returned, result if len(schema.returned) > 1 else [result], strict=False)
        results = [written[label] if label else each(on_device, item) for label, item in pairs]
        return tuple(results) if len(results) > 1 else results[0] if results else None


def autocast(op, name, *args, **kwargs):
    """An operator under autocast, with its floating-point arguments in the precision of CUDA's lists."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        dtypes, named = set(), any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))

        def cast(dtype, value):
            if not (is_virtual(value) and value.is_floating_point() and value.dtype != torch.float64):
                return value
            dtypes.add(value.dtype)
            return value.to(dtype) if dtype else value

        each(functools.partial(cast, None), [*args, *kwargs.values()])
        if name in SUMS:
            return op(*args, **kwargs) if named or not dtypes else op(*args, **kwargs, dtype=torch.float32)
        wide = name not in LOWER + WIDEST or (name in WIDEST and torch.float32 in dtypes)
        cast = functools.partial(cast, torch.float32 if wide else torch.get_autocast_dtype("cuda"))
        return op(*each(cast, args), **{key: each(cast, value) for key, value in kwargs.items()})


def register_operators(libraries=[]):  # noqa: B006  a registration lasts as long as its library
    def convert(tensor, **kwargs):
        if kwargs.get("device") == CPU and kwargs.get("non_blocking"):
            kwargs["non_blocking"] = False  # else it looks for the device's allocator of pinned memory
        return aten._to_copy.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, tensor, **kwargs)

    def convolution_backward(gradient, pixels, weight, *rest):
        return fallback(aten.convolution_backward.default, gradient, pixels, weight, [gradient.shape[1]], *rest)

    def pin(tensor, device=None):
        counts["pinned"] += 1
        return tensor.clone()

    every, ops = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    libraries += [every, ops]
    every.fallback(fallback, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    ops.impl("_pin_memory", pin, "CPU")
    ops.impl("_to_copy", convert, "PrivateUse1")
    ops.impl("convolution_overrideable", functools.partial(fallback, aten.convolution.default), "PrivateUse1")
    ops.impl("convolution_backward_overrideable", convolution_backward, "PrivateUse1")
    for name in "native_group_norm native_layer_norm silu_backward".split():  # else composed of other operators
        ops.impl(name, functools.partial(fallback, getattr(aten, name).default), "PrivateUse1")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            op = getattr(getattr(aten, packet), overload or "default")
            ops.impl(name, functools.partial(autocast, op, name.removeprefix("aten::")), "AutocastPrivateUse1")


# ---------------------------------------------------------------------------------------------------------------------
# "cuda" in Python
# ---------------------------------------------------------------------------------------------------------------------


def make_device(*args, **kwargs):
    """In place of torch.device: "cuda" is the virtual device, of which there is one."""
    with torch._C.DisableTorchFunction():
        device = Device(*args, **kwargs)
        kind, *index = device.__reduce__()[1]
        if kind == "cuda" and index not in ([], [0]):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return Device(OPEN, *index) if kind == "cuda" else device


class StandIn(type):
    """A class in place of another: calls `make`; its instances are those of `real`."""

    def __call__(cls, *args, **kwargs):
        return cls.make(*args, **kwargs)

    def __instancecheck__(cls, value):
        return isinstance(value, cls.real)


class Names(TorchFunctionMode):
    """Replaces "cuda" in calls of PyTorch, and finds a generator of the device that draws on the CPU."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        def rename(value):
            named = isinstance(value, str) and value.partition(":")[0] == "cuda"
            return make_device(value) if named or isinstance(value, Device) else value

        if func is Device:
            return make_device(*args, **(kwargs or {}))
        kwargs = {name: rename(value) for name, value in (kwargs or {}).items()}
        if str(kwargs.get("device", "cpu")) == "cpu":
            counts["pinned"] += bool(kwargs.pop("pin_memory", False))  # there is no allocator of pinned memory
        result = func(*map(rename, args), **kwargs)
        if isinstance(kwargs.get("generator"), Generator) and isinstance(result, torch.Tensor) and result.is_cpu:
            raise RuntimeError("Expected a 'cpu' device type for generator but found 'cuda'")
        return result


class Generator(torch.Generator):
    """A generator of the device: one of the CPU under another name, so that it draws the same."""

    known = set()  # C++ hands generators over without their class
    device = property(lambda self: make_device("cuda", 0))

    def __init__(self, device):
        self.known.add(self._cdata)

    def __del__(self):
        self.known.discard(self._cdata)

    @staticmethod
    def make(device="cpu", real=torch.Generator):
        return (Generator if make_device(device).type == "cuda" else real)("cpu")


default_generator = Generator("cpu")


def replace_in_torch():
    """Has torch itself take the name, move parameters as between CUDA and the CPU, and copy and pickle storages."""

    def by_name(function, name="cuda", *rest):
        return function(OPEN if name == "cuda" else name, *rest)

    def copied(storage):  # the device has no allocator of bare storage
        return torch.empty(len(storage), dtype=torch.uint8, device="cuda").untyped_storage().copy_(storage)

    def may_swap(input, from_):  # noqa: A002  Dynamo compares the names
        return may_set(input, from_) or {input.device.type, from_.device.type} == {"cpu", "cuda"}

    def set_data(tensor, value):
        if tensor.device.type == value.device.type:
            return data.__set__(tensor, value)
        value = value.detach().as_subclass(torch.Tensor).clone().requires_grad_(tensor.requires_grad)
        value.grad = None if tensor.grad is None else tensor.grad.to(value.device)
        return torch._C._swap_tensor_impl(tensor, value)

    def moved(storage, *, device, **kwargs):
        return copied(storage) if make_device(device).type == "cuda" else move(storage, device=device, **kwargs)

    for name in "is_autocast_enabled set_autocast_enabled get_autocast_dtype set_autocast_dtype".split():
        setattr(torch, name, functools.partial(by_name, getattr(torch, name)))
    torch.device = StandIn("device", (), {"real": Device, "make": staticmethod(make_device)})
    torch.Generator = StandIn("Generator", (), {"real": torch.Generator, "make": Generator.make})
    torch.Tensor.is_cuda, torch.Tensor.cuda = property(is_virtual), lambda tensor, *_, **__: tensor.to("cuda")
    data, may_set = torch._C.TensorBase.data, torch._has_compatible_shallow_copy_type
    torch.Tensor.data = property(data.__get__, set_data)  # so that Module.to keeps the parameters, as with CUDA
    torch._has_compatible_shallow_copy_type = may_swap
    copyreg.pickle(Device, lambda device: (make_device, device.__reduce__()[1]))
    clone, move, torch.UntypedStorage.to = torch.UntypedStorage.clone, torch.UntypedStorage.to, moved
    torch.UntypedStorage.clone = lambda storage: (copied if storage.device.type == "cuda" else clone)(storage)


def replace_in_cuda():
    """Has torch.cuda answer as with one card of the Ampere kind."""
    cuda, generator = torch.cuda, default_generator
    traits = types.SimpleNamespace(name="virtual device", total_memory=2**34, major=8, minor=0)
    answers = dict.fromkeys("set_device synchronize empty_cache ipc_collect reset_peak_memory_stats".split())
    answers |= dict.fromkeys("memory_allocated max_memory_allocated memory_reserved max_memory_reserved".split(), 0)
    answers |= dict.fromkeys("is_available is_initialized is_bf16_supported".split(), True)
    answers |= {"device_count": 1, "current_device": 0, "get_device_name": traits.name}
    answers |= {"get_device_capability": (8, 0), "get_device_properties": traits}
    for name, answer in answers.items():
        setattr(cuda, name, functools.partial(lambda answer, *_, **__: answer, answer))
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # bitsandbytes wants it as it is imported
    cuda._lazy_init, cuda._initialized = lambda: None, True
    cuda.device = type("device", (contextlib.nullcontext,), {})
    methods = dict.fromkeys(("__init__", "wait_stream", "wait_event", "record_event"), lambda *_: None)
    cuda.Stream, cuda.Event = type("Stream", (), methods), type("Event", (), {})
    cuda.current_stream, cuda.stream = cuda.Stream, contextlib.nullcontext
    cuda.mem_get_info = lambda device=None: (free_bytes[0], 2**34)
    cuda.default_generators, cuda.initial_seed = (generator,), generator.initial_seed
    cuda.manual_seed = cuda.manual_seed_all = generator.manual_seed
    cuda.get_rng_state, cuda.get_rng_state_all = lambda *_: generator.get_state(), lambda: [generator.get_state()]
    cuda.set_rng_state = lambda state, *_: generator.set_state(state)
    cuda.set_rng_state_all = lambda states: generator.set_state(states[0])


def install():
    """To be called before the first tensor is made, once and for good in a process."""
    torch.cuda._lazy_init = lambda: None
    torch._C._rename_privateuse1_backend(NAME)
    backend_registration._privateuse1_backend_name = NAME
    torch._C._acc.register_python_privateuseone_hook(backend_registration._DummyPrivateUse1Hook())
    torch._C._acc.register_python_privateuseone_device_guard(backend_registration._DummyDeviceGuard())
    for change in (register_operators, replace_in_torch, replace_in_cuda, Names().__enter__):
        change()
    start = threading.Thread.run

    def run(thread):  # a mode is a thread's own
        with Names():
            start(thread)

    threading.Thread.run = run
    process = os.getpid()
    atexit.register(lambda: os.getpid() == process and print("virtual device:", dict(counts), file=sys.stderr))


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def try_out():
    """Does in small what the scripts do. Errors: AssertionError, or what a PyTorch that has changed raises."""
    layer, pixels = torch.nn.Linear(4, 4).to("cuda"), torch.ones(2, 4, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        lower = layer(pixels)
    lower.float().square().mean().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()
    drawn = [torch.randn(3, generator=torch.Generator(d).manual_seed(0), device=d).cpu() for d in ("cpu", "cuda")]
    assert lower.dtype == torch.bfloat16 and lower.device.type == "cuda" and layer.weight.grad.is_cuda
    assert torch.equal(*drawn) and waits()
    try:
        layer(torch.ones(2, 4))
    except RuntimeError as error:
        assert "same device" in str(error)
    else:
        raise AssertionError("tensors of two devices are not refused")


def serve():
    """Runs a script for each line of standard input, and answers with a line, both JSON; the first answer is "ready".

    A line is [free bytes, path, flags]. The answer has "error", empty or a traceback; "waits", how often the host had
    waited for the device, after each step of the optimizer; and "away", the models that were sent to the CPU.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        install()
        try_out()
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), file=answers, flush=True)
        return
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import accelerate
    from conftest import isolated, pytest
    from diffusers import training_utils
    from ranks import draw_fast

    seen, errors, kept, away = [], sys.stderr, [], set()
    cpu_offload, offload_models = accelerate.cpu_offload, training_utils.offload_models

    def note_offload(model, *inputs):
        away.add(type(model).__name__)
        return cpu_offload(model, *inputs)

    def note_models(*models, device, offload=True):
        if offload and str(device) == "cpu":
            away.update(f"{type(model).__name__} while decoding" for model in models)
        return offload_models(*models, device=device, offload=offload)

    accelerate.cpu_offload, training_utils.offload_models = note_offload, note_models  # scripts import them anew
    draw_fast(pytest.MonkeyPatch())
    register_optimizer_step_post_hook(lambda *_: seen.append(waits()))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        free_bytes[0], *sys.argv[:] = json.loads(line)
        seen.clear()
        away.clear()
        try:
            with isolated():
                runpy.run_path(sys.argv[0], run_name="__main__")
            error = ""
        except (Exception, SystemExit):
            error = traceback.format_exc()
        kept.append(sys.stderr)  # a script puts its own there, which closes the file when it is forgotten
        sys.stderr = errors
        for name in [name for name, module in sys.modules.items() if module is None]:
            del sys.modules[name]  # what a script has hidden from the libraries
        print(json.dumps({"error": error, "waits": seen, "away": sorted(away)}), file=answers, flush=True)


if __name__ == "__main__":
    sys.modules["virtual_device"] = sys.modules["__main__"]
    if not sys.argv[1:]:
        serve()
        sys.exit()
    install()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
