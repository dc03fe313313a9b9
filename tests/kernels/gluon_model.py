"""A model of a Hopper multiprocessor that runs a Gluon kernel's roles as threads, so that a CPU can check its protocol.

The kernel's own Python source runs, with its module's names replaced: tensors are torch tensors, barriers count phases
as the hardware does, copies arrive late and leave NaN in memory until then, and a matrix product reads shared memory
only when somebody waits for it. A barrier that is forgotten shows as a wrong number, one too many as a deadlock.

Layouts, registers and speed are not modelled; what the compiler does with the source is another test's business.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import random
import threading
import time
from collections import Counter, deque
from types import FunctionType, SimpleNamespace
from unittest import mock

import torch

NAMED = 100  # what is added to the number of a named barrier to tell it from a ring
PATIENCE = 20.0  # seconds until a wait counts as a deadlock
POISON = {torch.int8: 113, torch.int32: -1}  # of types without NaN
_drawing = threading.Lock()  # groups that work alone draw beside one another
_failures: list[BaseException] = []  # of the roles that run
_here = (
    threading.local()
)  # each role's number of the program, its products under way, how many threads it stands for


class Deadlock(AssertionError):
    """A role waits for something that never comes."""


class Number(int):
    """A scalar of the kernel: an int that arithmetic keeps, with the methods that the source calls."""

    def to(self, _dtype):
        return self


def _closed(name):
    method = getattr(int, name)

    def operate(self, other):
        if not isinstance(other, int):
            return NotImplemented
        return Number(method(self, other))

    return operate


for _name in "add radd sub rsub mul rmul mod floordiv and rand xor rxor rshift".split():
    setattr(Number, f"__{_name}__", _closed(f"__{_name}__"))


class Tile(torch.Tensor):
    """A tensor of the kernel; its layout is not modelled."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else super().to(dtype)


class Pointer:
    """An address in global memory: a flat tensor and an offset, or a tensor of offsets."""

    def __init__(self, flat: torch.Tensor, offset=0):
        self.flat, self.offset = flat, offset
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, other):
        return Pointer(self.flat, self.offset + other)

    def __sub__(self, other):
        return Pointer(self.flat, self.offset - other)


class Memory:
    """Shared memory: a stack of blocks, or one block of it."""

    def __init__(self, data: torch.Tensor):
        self.data, self.dtype = data, data.dtype

    def index(self, i: int) -> Memory:
        return Memory(self.data[i])

    def reshape(self, shape) -> Memory:
        return Memory(self.data.view(shape))

    def permute(self, axes) -> Memory:
        return Memory(self.data.permute(axes))

    def load(self, _layout) -> torch.Tensor:
        return self.data.clone().as_subclass(Tile)

    def store(self, tile: torch.Tensor) -> None:
        assert not any(self.data.data_ptr() == source.data_ptr() for source, _ in _here.copies_out), (
            "written while it is being copied"
        )
        self.data.copy_(tile)


class Barrier:
    """An mbarrier: a phase ends once all arrivals and all announced bytes have come."""

    def __init__(self, deaf: bool):
        self.deaf = deaf  # nobody waits
        self.changed = threading.Condition()
        self.phase, self.count, self.missing, self.bytes = 0, 0, 0, 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def note(self, arrivals: int, size: int) -> None:
        if self.deaf:
            return
        with self.changed:
            self.missing -= arrivals
            self.bytes += size
            assert self.missing >= 0 or not arrivals, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        if self.deaf:
            return
        with self.changed:
            limit = time.monotonic() + PATIENCE
            while self.phase == phase:
                self.changed.wait(0.02)
                if _failures or time.monotonic() > limit:
                    raise Deadlock(f"nobody ended phase {phase}")


class Barriers(list):
    def index(self, i):
        return self[i]


class NamedBarriers:
    """The processor's barriers that count threads: each opens for those that wait once enough have come."""

    def __init__(self, deaf: int | None):
        self.deaf = deaf
        self.changed = threading.Condition()
        self.come = Counter()
        self.opened = Counter()

    def arrive(self, which: int, threads: int) -> int:
        """Returns how often it must have opened before one that waits may go on."""
        with self.changed:
            round_ = self.opened[which] + 1
            self.come[which] += _here.threads
            assert self.come[which] <= threads, "more threads than the barrier counts"
            if self.come[which] == threads:
                self.come[which] = 0
                self.opened[which] += 1
                self.changed.notify_all()
            return round_

    def wait(self, which: int, threads: int) -> None:
        round_ = self.arrive(which, threads)
        if which == self.deaf:
            return
        with self.changed:
            limit = time.monotonic() + PATIENCE
            while self.opened[which] < round_:
                self.changed.wait(0.02)
                if _failures or time.monotonic() > limit:
                    raise Deadlock(f"named barrier {which} never opened")


class Descriptor:
    """A TMA descriptor of `[B, H, S, D]`; rows behind the end arrive as zeros."""

    def __init__(self, tensor: torch.Tensor, block: list[int]):
        self.tensor, self.block, self.dtype, self.layout = tensor, block, tensor.dtype, None
        self.block_type = SimpleNamespace(nbytes=block[2] * block[3] * tensor.element_size())

    def read(self, where) -> torch.Tensor:
        b, h, row, column = where
        rows, columns = self.block[2:]
        found = torch.zeros(rows, columns, dtype=self.dtype)
        part = self.tensor[b, h, row : row + rows, column : column + columns]
        found[: part.shape[0], : part.shape[1]] = part
        return found.view(1, 1, rows, columns)


class Product:
    """A matrix product under way."""

    def __init__(self, a, b, acc, use_acc):
        self.operands, self.value = (a, b, acc, use_acc), None

    def resolve(self) -> None:
        a, b, acc, use_acc = self.operands
        a, b = (x.data if isinstance(x, Memory) else x for x in (a, b))
        product = (a.float() @ b.float()).to(acc.dtype)
        self.value = (product + acc if use_acc else product).as_subclass(Tile)


def _mma(a, b, acc, use_acc=True, is_async=False):
    product = Product(a, b, acc, use_acc)
    _here.products.append(product)
    assert is_async
    return product


def _mma_wait(pending, deps):
    while len(_here.products) > pending:
        _here.products.popleft().resolve()
    found = [d.value if isinstance(d, Product) and d.value is not None else d for d in deps]
    return found[0] if len(found) == 1 else tuple(found)


def _copy_in(descriptor, where, barrier, target: Memory):
    target.data.fill_(POISON.get(target.data.dtype, torch.nan))
    if barrier.deaf:
        return  # what nobody waits for may come too late for everybody

    def arrive():
        time.sleep(random.random() * 2e-3)
        target.data.copy_(descriptor.read(where))
        barrier.note(0, -descriptor.block_type.nbytes)

    threading.Thread(target=arrive, daemon=True).start()


def _copy_out(descriptor, where, source: Memory):
    _here.copies_out.append((source.data, (descriptor, where)))


def _wait_for_copies_out(pending):
    """The copies read memory as late as they may."""
    while len(_here.copies_out) > pending:
        data, (descriptor, (b, h, row, _)) = _here.copies_out.pop(0)
        place = descriptor.tensor[b, h, row : row + data.shape[-2]]
        assert bool(place.isnan().all()), "a place is written twice"
        place.copy_(data.reshape(data.shape[-2:])[: place.shape[0]])


def _load(pointer: Pointer):
    if isinstance(pointer.offset, int):
        value = pointer.flat[pointer.offset].item()
        return Number(value) if isinstance(value, int) else value
    return pointer.flat[pointer.offset].as_subclass(Tile)


def _store(pointer: Pointer, value, mask=None):
    offset = torch.as_tensor(pointer.offset)
    value = torch.as_tensor(value, dtype=pointer.flat.dtype).expand(offset.shape)
    mask = torch.ones((), dtype=torch.bool) if mask is None else mask
    mask = mask.expand(offset.shape)
    if pointer.flat.is_floating_point():  # flags may be set twice
        assert bool((pointer.flat[offset[mask]].isnan()).all()), "a place is written twice"
    pointer.flat[offset[mask]] = value[mask]


def _draw(pointer: Pointer):
    with _drawing:
        before = _load(pointer)
        pointer.flat[pointer.offset] += 1
        return before


def _sum(x, axis):
    total = x.sum(axis)
    return Number(total) if total.dim() == 0 and total.dtype in (torch.int32, torch.int64) else total


def _pair(tensors, scalars):
    """A function of two tensors or of two scalars."""

    def run(a, b):
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return tensors(torch.as_tensor(a), torch.as_tensor(b))
        return Number(scalars(a, b))

    return run


def _where(condition, a, b):
    if not any(isinstance(x, torch.Tensor) for x in (condition, a, b)):
        return Number(a if condition else b)
    return torch.where(torch.as_tensor(condition), a, b)


def _names(deaf: int | None) -> dict:
    """What stands for Gluon's names in the kernel's modules."""
    nothing = lambda *_args, **_kwargs: None  # noqa: E731
    layouts = (
        *("NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout"),
        *("SliceLayout", "BlockedLayout", "DistributedLinearLayout"),
    )

    rings = itertools.count()
    named = NamedBarriers(None if deaf is None else deaf - NAMED)

    def share(_dtype, shape, layout=None):
        if layout == "barriers":
            ring = next(rings)
            return Barriers(Barrier(ring == deaf) for _ in range(shape[0]))
        return Memory(torch.full(shape, 0, dtype=_dtype).fill_(POISON.get(_dtype, torch.nan)))

    def specialise(roles, warps, _registers):
        program = _here.program
        _failures.clear()
        named.come.clear()  # of the program before, which may have left some

        def play(role, arguments, warps):
            _here.program, _here.products, _here.threads = program, deque(), 32 * warps
            _here.copies_out = []
            try:
                role(*arguments)
                assert not _here.copies_out, "ended before its copies had read memory"
            except BaseException as error:  # a thread's failure is the test's
                _failures.append(error)

        threads = [
            threading.Thread(target=play, args=(*role, n)) for role, n in zip(roles, (4, *warps), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if _failures:
            raise _failures[0]

    gl = SimpleNamespace(
        **dict.fromkeys(layouts, nothing),
        constexpr=lambda x: x,
        int64=torch.int64,
        int8=torch.int8,
        int32=torch.int32,
        float32=torch.float32,
        float8e4nv=torch.float8_e4m3fn,
        static_range=lambda n: map(Number, range(n)),
        join=lambda a, b: torch.stack([a, b], -1),
        program_id=lambda _axis: _here.program[0],
        num_programs=lambda _axis: _here.program[1],
        load=_load,
        store=_store,
        where=_where,
        maximum=_pair(torch.maximum, max),
        minimum=_pair(torch.minimum, min),
        arange=lambda *args, layout=None: torch.arange(*args).as_subclass(Tile),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype).as_subclass(Tile),
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype).as_subclass(Tile),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        ceil=torch.ceil,
        exp2=torch.exp2,
        log2=torch.log2,
        fma=lambda a, b, c: a * b + c,
        split=lambda x: (x[..., 0], x[..., 1]),
        SwizzledSharedLayout=lambda *_args: None,
        max=lambda x, axis: x.amax(axis),
        sum=_sum,
        allocate_shared_memory=share,
        warp_specialize=specialise,
    )
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, phase, pred=True: barrier.wait(phase) if pred else None,
        arrive=lambda barrier, count, pred=True: barrier.note(count, 0) if pred else None,
        expect=lambda barrier, size: barrier.note(0, size) or barrier.note(1, 0),
    )
    return {
        "gl": gl,
        "mbarrier": mbarrier,
        "copy_in": _copy_in,
        "warpgroup_mma": _mma,
        "warpgroup_mma_wait": _mma_wait,
        "fence_async_shared": nothing,
        "range": lambda *ends: map(Number, range(*ends)),
        "named_arrive": named.arrive,
        "named_wait": named.wait,
        "LN_2": math.log(2),
        "pin": lambda x: x,
        "draw": _draw,
        "open_ticket": lambda ticket: ticket,
        "copy_out": _copy_out,
        "copy_out_wait": lambda pending: _wait_for_copies_out(pending),
        "hold_queries": lambda queries, _head: queries,
        "unpack_weights": lambda packed, _dtype, _columns, _layout: packed,
    }


@contextlib.contextmanager
def modelled(kernel, programs: int, deaf: int | None = None):
    """`kernel.block_sparse` runs on the model, its tiles shared by `programs` programs.

    Args:
        kernel: the module `dit_accel.kernels.block_sparse.hopper`.
        deaf: nobody waits for this ring of barriers, numbered as the (only) program allocates them; or for the named
            barrier of this number plus `NAMED`.
    """
    from triton.experimental.gluon import language

    from dit_accel.kernels.block_sparse import (
        hopper_attend,
        hopper_barriers,
        hopper_kernel,
        hopper_load,
        hopper_softmax,
        hopper_tiles,
    )

    modules = (hopper_barriers, hopper_tiles, hopper_softmax, hopper_load, hopper_attend, hopper_kernel)
    ours = {k: v for module in modules for k, v in vars(module).items()}
    names = {}
    for name, value in ours.items():
        function = getattr(value, "fn", None)
        if isinstance(value, language.constexpr):
            names[name] = value.value
        elif isinstance(function, FunctionType):
            names[name] = FunctionType(function.__code__, names, name, function.__defaults__)
    names |= _names(deaf)
    names["pack_weights"] = lambda weights, dtype, _columns: weights.to(dtype)
    # Multiples of 2^-24, the smallest numbers of fp16: rounded to it their bits are integers.
    names["pack_codes"] = lambda codes, columns: (
        names["in_token_order"](codes, columns)
        .relu()
        .half()
        .view(torch.int16)
        .to(torch.uint8)
        .view(torch.float8_e4m3fn)
    )
    run = names["block_sparse_kernel"]

    class Launcher:
        def __getitem__(self, grid):
            return lambda *args, num_warps, enable_fp_fusion, **kwargs: _launch(run, grid[0], args, kwargs)

    chip = SimpleNamespace(multi_processor_count=programs)
    with (
        mock.patch.object(kernel, "block_sparse_kernel", Launcher()),
        mock.patch.object(kernel, "_describe", lambda x, block: Descriptor(x, [1, 1, *block])),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _device: chip),
        mock.patch.object(torch.cuda, "device", lambda _device: contextlib.nullcontext()),
    ):
        yield


def _launch(run, programs: int, args, kwargs) -> None:
    given = inspect.signature(run).bind(*args, **kwargs).arguments
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            length = value.untyped_storage().nbytes() // value.element_size()
            given[name] = Pointer(value.as_strided((length,), (1,), 0), Number(value.storage_offset()))
        elif isinstance(value, int):
            given[name] = Number(value)
    for program in range(programs):
        _here.program, _here.copies_out = (Number(program), Number(programs)), []
        run(**given)
