"""A second device without one: tensors that say they are on "cuda:0", keep their values on the CPU and never mix.

``with simulated_gpu():`` makes a GPU be there: ``x.to("cuda")``, factories, `Module.to`, generators, events and
`torch.cuda`'s questions work, and everything computed on such tensors has the values that the CPU gives, gradients
included. What a GPU refuses raises `MixUp`: a tensor of one or more dimensions on the CPU in one call with one on the
GPU, a generator of the other device, `numpy()` of a GPU's tensor. It is stricter than a GPU in one thing: an index on
the CPU into a tensor on the GPU, which would make the host copy and wait, is a mix-up, too.

The calls are caught where Python makes them (`__torch_function__`), not in the dispatcher: below it autograd would ask
for a device guard, which a build of torch for CPUs does not have. What gets past to the dispatcher is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # optimizers import it, and it looks through all of torch.cuda: before that is another
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
RealGenerator = torch.Generator
CALLS: Counter[tuple[str, str]] = Counter()


class MixUp(RuntimeError):
    """Something that tensors on two devices cannot do together."""


class GPUTensor(Tensor):
    """A tensor on the simulated GPU; `value` is where its numbers are."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> GPUTensor:
        assert type(value) is not GPUTensor
        wrapper = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=GPU)
        wrapper.value = value
        return wrapper

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} reached the dispatcher: the simulation did not see who called it")


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`func` as on a machine with a GPU."""
    try:
        special = SPECIAL.get(func)
    except TypeError:  # not hashable
        special = None
    if special is not None:
        return special(*args, **kwargs)
    return _generic(func, args, kwargs)


def _generic(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    wrapped = [x for x in tree_leaves((args, kwargs)) if isinstance(x, GPUTensor)]
    place = GPU if wrapped else CPU
    if kwargs.get("device") is not None:
        place = _simulated(kwargs["device"])
        kwargs = kwargs | {"device": CPU if place == GPU else place}
    kwargs.pop("pin_memory", None)
    _check_generator(func, kwargs.get("generator"), place)
    CALLS[getattr(func, "__name__", ""), place.type] += 1
    if wrapped:
        _check_together(func, args, kwargs)
        owner = {id(x.value): x for x in wrapped}
        result = func(*_values(args), **_values(kwargs))
        return _on_gpu(result, owner) if place == GPU else result
    result = func(*args, **kwargs)
    return _on_gpu(result, {}) if place == GPU else result


def _check_together(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """On one device only; a number, that is a tensor without dimensions, may come along."""
    on_cpu = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, GPUTensor)]
    if any(x.ndim and x.device.type != "meta" for x in on_cpu):
        shapes = [list(x.shape) for x in on_cpu]
        raise MixUp(f"{getattr(func, '__name__', func)}: tensors on {GPU} and on the CPU {shapes}")


def _check_generator(func: Any, generator: Any, place: torch.device) -> None:
    if isinstance(generator, RealGenerator) and place.type != "meta" and generator.device != place:
        raise MixUp(f"{getattr(func, '__name__', func)}: a generator on {generator.device} for numbers on {place}")


def _values(tree: Any) -> Any:
    return tree_map(lambda x: x.value if isinstance(x, GPUTensor) else x, tree)


def _on_gpu(tree: Any, owner: dict[int, GPUTensor]) -> Any:
    """Tensors as ones on the GPU; a value that one has already, as after an operation in place, as that one."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return owner[id(x)] if id(x) in owner else GPUTensor(x)

    if isinstance(tree, Tensor):  # not every result is a tree: parameters and modules are left alone
        return one(tree)
    return tree_map(one, tree)


def _simulated(device: Any) -> torch.device:
    """The device that is meant; of GPUs there is one."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal {device.index}")
    return GPU if device.type == "cuda" else device


# -- calls that differ ---------------------------------------------------------------------------------------------


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
    if other is not None:
        args = (call(Tensor.device.__get__, (other,), {}), other.dtype, *args[1:])
    if args and isinstance(args[0], int):
        args = (torch.device("cuda", args[0]), *args[1:])
    copy = bool(kwargs.pop("copy", False))
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    before = GPU if isinstance(x, GPUTensor) else x.device
    after = before if device is None else _simulated(device)
    options: dict[str, Any] = {} if memory_format is None else {"memory_format": memory_format}
    value = x.value if isinstance(x, GPUTensor) else x
    if before == after or after.type == "meta":
        target = after if after.type == "meta" else value.device
        moved = value.to(target, dtype or value.dtype, copy=copy, **options)
        return x if moved is value else _placed(moved, after)
    if CPU not in (before, after):
        return _placed(value.to(after, dtype or value.dtype, **options), after)
    return _placed(value.to(dtype=dtype or value.dtype, copy=True, **options), after)  # no shared memory


def _placed(value: Tensor, place: torch.device) -> Tensor:
    return GPUTensor(value) if place == GPU else value


def _as_tensor(func: Any) -> Callable[..., Tensor]:
    def made(data: Any, *args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        before = data.device if isinstance(data, Tensor) else CPU
        after = before if device is None else _simulated(device)
        if isinstance(data, Tensor) and before != after:
            return call(Tensor.to, (data, after), {"dtype": kwargs.get("dtype")})
        value = func(_values(data), *args, device=None if after == GPU else device, **kwargs)
        if isinstance(data, GPUTensor) and value is data.value:
            return data
        return _placed(value, after)

    return made


def _setitem(x: Tensor, index: Any, value: Any) -> None:
    """Into a slice a GPU copies from any device; with tensors as the index all must be on one."""
    by_tensor = any(isinstance(i, Tensor) and i.ndim for i in tree_leaves(index))
    if by_tensor:
        _check_together(Tensor.__setitem__, (x, index, value), {}) if isinstance(x, GPUTensor) else _check_cpu(index)
        if not isinstance(x, GPUTensor) and isinstance(value, GPUTensor) and value.ndim:
            raise MixUp("__setitem__: a tensor on the GPU by index into one on the CPU")
    _values(x)[_values(index)] = _values(value)


def _check_cpu(index: Any) -> None:
    if any(isinstance(i, GPUTensor) for i in tree_leaves(index)):
        raise MixUp("__setitem__: an index on the GPU into a tensor on the CPU")


def _copy_(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _values(x).copy_(_values(source))
    return x


def _data(x: Tensor, new: Any) -> None:
    if isinstance(x, GPUTensor) != isinstance(new, GPUTensor):
        raise MixUp("data: a tensor of another device")
    Tensor.data.__set__(_values(x), _values(new))


def _numpy(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, GPUTensor):
        raise MixUp("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    with torch._C.DisableTorchFunction():
        return x.numpy(*args, **kwargs)


def _array(x: Tensor, dtype: Any = None) -> Any:
    array = _numpy(x)
    return array if dtype is None else array.astype(dtype, copy=False)


def _deepcopy(x: Tensor, memo: Any) -> Tensor:
    copied = Tensor.__deepcopy__(_values(x), memo)
    if not isinstance(x, GPUTensor):
        return copied
    copied = GPUTensor(copied)
    if getattr(x, "_is_param", False):
        copied._is_param = True
    return copied


def _pinned(x: Tensor, *args: Any) -> Tensor:
    if isinstance(x, GPUTensor):
        raise MixUp("cannot pin memory of a tensor that is not on the CPU")
    return x.clone()


def _for_gpu(on_gpu: Any, func: Any) -> Callable[..., Any]:
    """What `on_gpu` says of a tensor on the GPU, what `func` says of any other."""
    return lambda x, *args, **kwargs: on_gpu if isinstance(x, GPUTensor) else func(x, *args, **kwargs)


SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cuda: lambda x, *a, **k: _to(x, GPU),
    Tensor.cpu: lambda x, *a, **k: _to(x, CPU),
    Tensor.device.__get__: _for_gpu(GPU, Tensor.device.__get__),
    Tensor.is_cuda.__get__: _for_gpu(True, Tensor.is_cuda.__get__),
    Tensor.is_cpu.__get__: _for_gpu(False, Tensor.is_cpu.__get__),
    Tensor.get_device: _for_gpu(0, Tensor.get_device),
    Tensor.data.__set__: _data,
    Tensor.copy_: _copy_,
    torch._has_compatible_shallow_copy_type: lambda x, y: isinstance(x, GPUTensor) == isinstance(y, GPUTensor),
    Tensor.__setitem__: _setitem,
    Tensor.__iter__: lambda x: iter(call(Tensor.unbind, (x,), {})),
    Tensor.__deepcopy__: _deepcopy,
    Tensor.__repr__: lambda x, **k: f"{_values(x)!r} on {x.device}",
    Tensor.numpy: _numpy,
    Tensor.__array__: _array,
    Tensor.pin_memory: _pinned,
    torch.tensor: _as_tensor(torch.tensor),
    torch.as_tensor: _as_tensor(torch.as_tensor),
    torch.asarray: _as_tensor(torch.asarray),
}


# -- what there is beside tensors ----------------------------------------------------------------------------------


class GPUGenerator(RealGenerator):
    """Draws as a generator on the CPU does, for tensors on the GPU only."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return GPU


class _GeneratorType(type):
    def __call__(cls, device: Any = "cpu") -> RealGenerator:
        return GPUGenerator() if _simulated(device) == GPU else RealGenerator(device)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, RealGenerator)


class _Generator(metaclass=_GeneratorType):
    """`torch.Generator` where there is a GPU."""


class _Event:
    """An event, or the stream: all is done when it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `from_pretrained`, which asks for a place for each weight: load, then move."""

    def from_pretrained(*args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        return model if device_map is None else model.to(device_map)

    return from_pretrained


@contextmanager
def simulated_gpu(memory: int = 2**34) -> Iterator[Counter[tuple[str, str]]]:
    """A machine with a GPU, `GPU`, of which `torch.cuda` speaks as of any other; slow at bfloat16.

    Yields:
        how often each function of torch was called on "cuda" and on "cpu".
    """
    import transformers

    stream = _Event()
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda including_emulation=True: including_emulation,
        "get_device_name": lambda *a: "a simulated GPU",
        "get_device_capability": lambda *a: (8, 0),
        "get_device_properties": lambda *a: SimpleNamespace(total_memory=memory, major=8, minor=0),
        "is_current_stream_capturing": lambda: False,
        "max_memory_allocated": lambda *a: 0,
        "get_rng_state": lambda *a: torch.get_rng_state(),
        "Event": _Event,
        "current_stream": lambda *a: stream,
        "stream": lambda *a: nullcontext(),
    }
    quiet = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_rng_state", "manual_seed_all")
    cuda |= dict.fromkeys(quiet, _nothing)
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", _nothing))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
            stack.enter_context(mock.patch.object(auto, "from_pretrained", _loaded(auto.from_pretrained)))
        stack.enter_context(mock.patch.object(torch.nn.Module, "compile", _nothing))  # a compiler sees no values
        stack.enter_context(_Mode())
        CALLS.clear()
        yield CALLS
