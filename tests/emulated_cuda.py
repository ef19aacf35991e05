"""A CUDA device played by the host: `pytest tests/gpu --emulate-cuda` runs the tests of a GPU where there is none.

Tensors "on cuda" hold a tensor of the host, and every operation on them is run there. So the numbers are the host's,
but what a GPU would refuse is refused: operations on tensors of two devices, in sync debug mode "error" whatever makes
the host wait for the device, and in a capture both that and whatever comes from the host's memory. A captured graph is
the list of its operations: a replay runs them again and writes where they wrote, so what the host decided in between
stays as it was at the capture, as on a GPU. Compiled pieces are their operations
one by one. Not played: streams, memory, and the code that a compiler makes.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from sdekit import _tensor, tracing
from sdekit.solver import newton

_setup_privateuseone_for_python_backend("played")

aten = torch.ops.aten
_MEMORY = 2**32  # bytes that the device says to have
CUDA = torch.device("cuda", 0)
_CARRIER = torch.device("played", 0)  # the name by which the C++ side of torch knows it
_ASKS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_dim.default,
    aten._unique2.default,
}


class Cuda(torch.Tensor):
    """A tensor of the host under the name of the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=_CARRIER, **like)
        made.held = held
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    data_ptr = lambda self: self.held.data_ptr()  # noqa: E731
    get_device = lambda self: 0  # noqa: E731

    def __repr__(self, **_):
        return f"Cuda({self.held!r})"

    def __deepcopy__(self, memo):
        made = Cuda(self.held.detach().clone()).requires_grad_(self.requires_grad)
        made.__dict__.update({name: value for name, value in self.__dict__.items() if name == "_is_param"})
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _is_cuda(device):
    return device is not None and torch.device(device).type in (_CARRIER.type, CUDA.type)


def _held(leaf):
    return leaf.held if isinstance(leaf, Cuda) else leaf


class _State:
    """What the device is at: whether waiting is an error, and the graph that is captured, if one is."""

    def __init__(self):
        self.mode = "default"
        self.capturing = None


STATE = _State()


def _run(func, args, kwargs):
    """An operation, on the host in the place of the device, after a look at whether the device would take it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Cuda)]
    device = kwargs.get("device")
    made = _is_cuda(device) if device is not None else bool(there)
    if not there and not made:
        return func(*args, **kwargs)
    if func not in (aten._to_copy.default, aten.copy_.default):
        _one_device(func, args, tensors, there)
    if STATE.mode != "default" or STATE.capturing is not None:
        _at_once(func, args, kwargs, there, made)
    given, options = tree_map(_held, args), tree_map(_held, kwargs)
    if device is not None:
        options["device"] = torch.device("cpu")
    func = aten.zeros.default if func is aten._efficientzerotensor.default else func  # its zeros have no memory
    if STATE.capturing is not None:
        STATE.capturing.remember(func, given)
    found = func(*given, **options)
    if func is aten._to_copy.default and any(found is value for value in tree_leaves(given)):
        found = found.clone()
    known = {id(tensor.held): tensor for tensor in there}
    out = args[0] if func is aten.copy_.default else tree_map(lambda leaf: _named(leaf, known) if made else leaf, found)
    if STATE.capturing is not None:
        STATE.capturing.add(func, given, options, found)
    return out


def _named(leaf, known):
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return known[id(leaf)] if id(leaf) in known else Cuda(leaf)


def _one_device(func, args, tensors, there):
    """Raises where tensors of two devices meet; numbers (0-d) of the host may meet any, and indices a tensor."""
    indices = tree_leaves(args[1]) if func in (aten.index.Tensor, aten.index_put_.default) else ()
    for tensor in tensors:
        if there and not isinstance(tensor, Cuda) and tensor.ndim and not any(tensor is index for index in indices):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of cuda:0 and cpu")


def _at_once(func, args, kwargs, there, made):
    """Raises where the host would wait for the device, or hand it something of its own memory."""
    waits = bool(there) and func in _ASKS
    if func is aten._to_copy.default:
        waits = not (made and there) and not (getattr(args[0], "pinned", False) and kwargs.get("non_blocking", False))
    if func is aten.copy_.default:
        waits = len(there) < 2 and not (len(args) > 2 and args[2])
    if func in (aten.index.Tensor, aten.index_put_.default):
        chosen = [index for index in tree_leaves(args[1]) if isinstance(index, torch.Tensor)]
        waits = any(index.dtype in (torch.bool, torch.uint8) or not isinstance(index, Cuda) for index in chosen)
    if waits and (STATE.mode == "error" or STATE.capturing is not None):
        raise RuntimeError(f"called a synchronizing CUDA operation: {func}")
    if waits:
        warnings.warn(f"called a synchronizing CUDA operation: {func}", stacklevel=1)


class _Operations(TorchDispatchMode):
    """Takes operations that make a tensor on the device from none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator of the host under the name of a device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.named = CUDA if torch.device(device).type == "cuda" else torch.device(device)

    device = property(lambda self: self.named)


def _one_generator(args, kwargs):
    """Raises where a generator of one device is to fill a tensor of the other."""
    like = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
    device = torch.device(kwargs.get("device") or (like.device if like is not None else "cpu"))
    device = CUDA if _is_cuda(device) else device
    if kwargs["generator"].device != device:
        raise RuntimeError(f"Expected a '{device}' device type for generator but found '{kwargs['generator'].device}'")


class _Functions(TorchFunctionMode):
    """Calls the device by the name that the C++ side knows, and sees to what goes there below operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_known, tuple(args)), tree_map(_known, kwargs or {})
        if isinstance(kwargs.get("generator"), torch.Generator):
            _one_generator(args, kwargs)
        kwargs.pop("pin_memory", None)  # of the host's: all of it can be copied from
        if func is torch.Tensor.pin_memory:
            copied = args[0].clone()
            copied.pinned = True
            return copied
        if func is torch.Tensor.cuda:
            return args[0].to(_CARRIER)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") == _CARRIER:
            rest = {name: value for name, value in kwargs.items() if name != "device"}
            return func(*args, **rest).to(_CARRIER)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], Cuda) and isinstance(args[1], list):
            return func(args[0], torch.tensor(args[1], dtype=torch.int64))  # else it is made one below operations
        if func is torch.Tensor.tolist and isinstance(args[0], Cuda):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


def _known(leaf):
    named = isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.startswith("cuda"))
    return _CARRIER if named and torch.device(leaf).type == "cuda" else leaf


class Graph:
    """The operations of a capture, and where each wrote; a capture itself leaves everything as it was."""

    def __init__(self):
        self.operations = []
        self.before = {}

    def remember(self, func, args):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.setdefault(id(value), (value, value.clone()))

    def undo(self):
        for value, before in self.before.values():
            value.copy_(before)
        self.before.clear()

    def add(self, func, args, kwargs, found):
        if func is not aten.detach.default and not func.is_view:
            self.operations.append((func, args, kwargs, found))

    def reset(self):
        self.operations.clear()

    def replay(self):
        for func, args, kwargs, found in self.operations:
            again = func(*args, **kwargs)
            for wrote, value in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(wrote, torch.Tensor) and wrote is not value:
                    wrote.copy_(value)


@contextmanager
def _graph(graph, **_):
    STATE.capturing = graph
    try:
        yield
    finally:
        STATE.capturing = None
        graph.undo()


@contextmanager
def _nothing(*_, **__):
    yield


class _Event:
    """What was asked is known from the second question on: the host goes ahead of the device by a step."""

    def __init__(self, *_, **__):
        self.asked = 0

    def record(self, *_):
        pass

    def query(self):
        self.asked += 1
        return self.asked > 1

    def synchronize(self):
        self.asked = 2


class _Stream:
    """What is given to it is done at once."""

    def __init__(self, *_):
        self.cuda_stream, self.device = id(self), CUDA

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass


def _trace(real):
    """Traces with examples of the host."""
    return lambda function, batches, *fixed: real(function, [_held(leaf) for leaf in batches], *map(_held, fixed))


def _program(real):
    """Its constants on the device."""

    def made(parent, runs):
        program = real(parent, runs)
        there = [value.to(_CARRIER) if isinstance(value, torch.Tensor) else value for value in program.rest]
        return program._replace(rest=there)

    return made


def _fused(piece, examples):
    """A piece whose operations make their tensors on the device."""
    for node in piece.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", _CARRIER)
    piece.recompile()
    return piece


def _sync_mode(mode):
    STATE.mode = mode


def install():
    """Puts the device in the place of torch.cuda's, for the rest of the process."""
    stream = _Stream()
    stood_for = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (7, 0),  # no TF32: the numbers are the host's
        "current_stream": lambda *_: stream,
        "Stream": _Stream,
        "is_current_stream_capturing": lambda: STATE.capturing is not None,
        "stream": _nothing,
        "graph": _graph,
        "CUDAGraph": Graph,
        "Event": _Event,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": _sync_mode,
        "mem_get_info": lambda *_: (_MEMORY, _MEMORY),
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "memory_allocated": lambda *_: 0,
    }
    for name, value in stood_for.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator
    torch.accelerator.current_accelerator = lambda *_, **__: CUDA
    stays = _tensor.may_stay
    for module in (_tensor, newton):
        module.may_stay = lambda made: stays(made) or (isinstance(made, Cuda) and stays(made.held))
    tracing.trace, tracing._program, tracing.fused = _trace(tracing.trace), _program(tracing._program), _fused
    _Operations().__enter__()
    _Functions().__enter__()
