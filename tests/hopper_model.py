"""A model of one Hopper multiprocessor, on which the warp-specialised Gluon kernel runs as plain Python.

The kernel's own functions run, on torch tensors, one thread per partition. Which partition goes on, and when a copy lands, is
drawn at random. Barriers count arrivals and bytes as `mbarrier` does; a buffer that is read before its copy has landed, or
written while somebody may still read it, raises Race; when nobody can go on, Deadlock.
"""

from __future__ import annotations

import random
import sys
import threading
from types import FunctionType, ModuleType, SimpleNamespace

import torch


class Race(Exception):
    pass


class Deadlock(Exception):
    pass


class Stopped(Exception):
    """Raised in every partition that is left when a run ends."""


class Registers(torch.Tensor):
    """A tensor with the attribute that kernels read layouts from."""

    type = SimpleNamespace(layout=None)


def registers(tensor: torch.Tensor) -> Registers:
    return tensor.as_subclass(Registers)


class Barrier:
    def __init__(self) -> None:
        self.arrivals = self.missing = self.bytes = self.completed = 0

    def count_down(self, arrivals: int = 0, size: int = 0) -> None:
        self.missing -= arrivals
        self.bytes -= size
        if self.missing < 0:
            raise Race("more arrivals than the barrier's count in one phase")
        if self.missing == 0 and self.bytes == 0:
            self.completed += 1
            self.missing = self.arrivals

    def passes(self, parity: int) -> bool:
        return self.completed & 1 != parity


class Buffer:
    """One slot of a ring. `writing`, `reading`, `leaving`: copies into it, products and copies out of it under way."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.writing, self.reading, self.leaving, self.unfenced = data, 0, 0, 0, False

    def check_free(self, what: str) -> None:
        if self.writing or self.reading or self.leaving:
            raise Race(f"{what} a buffer in use (writing {self.writing}, reading {self.reading}, leaving {self.leaving})")


class View:
    """A slot, reshaped or permuted."""

    def __init__(self, device: Device, buffer: Buffer, data: torch.Tensor) -> None:
        self.device, self.buffer, self.data = device, buffer, data

    def reshape(self, shape) -> View:
        return View(self.device, self.buffer, self.data.reshape(shape))

    def permute(self, order) -> View:
        return View(self.device, self.buffer, self.data.permute(order))

    def load(self, _layout) -> torch.Tensor:
        if self.buffer.writing or self.buffer.unfenced:
            raise Race("a buffer is read before it is filled")
        self.device.step()
        return registers(self.data.clone())

    def store(self, value: torch.Tensor) -> None:
        self.buffer.check_free("stored into")
        self.data.copy_(value)
        self.buffer.unfenced = True
        self.device.step()


class Ring:
    def __init__(self, device: Device, dtype: torch.dtype, shape: list[int]) -> None:
        self.device, self.dtype, self.shape = device, dtype, shape
        self.slots = [Buffer(torch.full(shape[1:], float("nan"), dtype=dtype)) for _ in range(shape[0])]

    def index(self, at: int) -> View:
        return View(self.device, self.slots[at], self.slots[at].data)


class Barriers:
    def __init__(self, shape: list[int]) -> None:
        self.slots = [Barrier() for _ in range(shape[0])]

    def index(self, at: int) -> Barrier:
        return self.slots[at]


class Product:
    """A matrix product under way: nothing can be done with it before the wait."""

    def __init__(self, value: torch.Tensor, buffers: list[Buffer]) -> None:
        self.value, self.buffers, self.done = value, buffers, False


class Pointer:
    def __init__(self, flat: torch.Tensor, at) -> None:
        self.flat, self.at = flat, at

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.as_strided((size,), (1,), 0), tensor.storage_offset())

    def __add__(self, offset) -> Pointer:
        return Pointer(self.flat, self.at + offset)


class Descriptor:
    """A host tensor descriptor: boxes of a tensor, 0 outside."""

    def __init__(self, described) -> None:
        self.tensor = described.base.as_strided(described.shape, described.strides)
        self.dtype, self.layout = described.base.dtype, None
        elements = torch.Size(described.block_shape).numel()
        self.block_type = SimpleNamespace(shape=list(described.block_shape), nbytes=elements * self.dtype.itemsize)

    def box(self, where) -> torch.Tensor:
        return self.tensor[tuple(slice(at, at + size) for at, size in zip(where, self.block_type.shape))]

    def read(self, where) -> torch.Tensor:
        found = torch.zeros(self.block_type.shape, dtype=self.dtype)
        box = self.box(where)
        found[tuple(slice(size) for size in box.shape)] = box
        return found

    def write(self, where, data: torch.Tensor) -> None:
        box = self.box(where)
        box.copy_(data[tuple(slice(size) for size in box.shape)])


class Role(threading.Thread):
    """A partition. It runs only between `go` and the next `step`."""

    def __init__(self, device: Device, function, arguments) -> None:
        super().__init__(daemon=True)
        self.device, self.function, self.arguments = device, function, arguments
        self.go, self.ready, self.error, self.finished = threading.Semaphore(0), lambda: True, None, False
        self.products: list[Product] = []
        self.leaving: list[Buffer] = []

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.device.stopped:
                self.function(*self.arguments)
        except Exception as error:
            self.error = error
        self.finished = True
        self.device.back.release()


class Device:
    """Runs one program of the grid."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs, self.random = program, programs, random.Random(seed)
        self.back, self.copies, self.stopped = threading.Semaphore(0), [], False
        self.role: Role | None = None

    def step(self, ready=lambda: True) -> None:
        """Ends the current role's go; it goes on at some time when `ready()`."""
        role = self.role
        role.ready = ready
        self.back.release()
        role.go.acquire()
        if self.stopped:
            raise Stopped

    def run(self, work, _warps, _registers) -> None:
        roles = [Role(self, function, arguments) for function, arguments in work]
        for role in roles:
            role.start()
        try:
            while any(not role.finished for role in roles) or self.copies:
                able = [role for role in roles if not role.finished and role.ready()] + self.copies
                if not able:
                    raise Deadlock([role.finished for role in roles])
                chosen = self.random.choice(able)
                if not isinstance(chosen, Role):
                    self.copies.remove(chosen)
                    chosen()
                    continue
                self.role = chosen
                chosen.go.release()
                self.back.acquire()
                if chosen.error is not None:
                    raise chosen.error
        finally:
            self.stopped = True
            for role in roles:
                role.go.release()

    # What kernels call.

    def load(self, desc: Descriptor, where, barrier: Barrier, view: View) -> None:
        view.buffer.check_free("copied into")
        view.buffer.writing += 1

        def land() -> None:
            view.data.copy_(desc.read(where))
            view.buffer.writing -= 1
            barrier.count_down(size=desc.block_type.nbytes)

        self.copies.append(land)
        self.step()

    def store(self, desc: Descriptor, where, view: View) -> None:
        if view.buffer.unfenced or view.buffer.writing:
            raise Race("copied out before the fence, or while being written")
        view.buffer.leaving += 1
        self.role.leaving.append(view.buffer)

        def land() -> None:
            desc.write(where, view.data)
            view.buffer.leaving -= 1

        self.copies.append(land)
        self.step()

    def store_wait(self, most: int) -> None:
        buffers = self.role.leaving
        self.step(lambda: sum(buffer.leaving for buffer in buffers) <= most)

    def fence(self, rings: list[Ring]) -> None:
        for ring in rings:
            for buffer in ring.slots:
                buffer.unfenced = False

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        barrier.count_down(arrivals=1)
        self.step()

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        barrier.count_down(arrivals=count)
        self.step()

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.step(lambda: barrier.passes(parity))

    def multiply(self, a, b: View, acc, use_acc: bool = True, is_async: bool = False) -> Product:
        buffers = [operand.buffer for operand in (a, b) if isinstance(operand, View)]
        if any(buffer.writing or buffer.unfenced for buffer in buffers):
            raise Race("a product reads a buffer before it is filled")
        for buffer in buffers:
            buffer.reading += 1
        left, right = (operand.data if isinstance(operand, View) else operand for operand in (a, b))
        value = left.float() @ right.float()
        product = Product(registers(value + acc if use_acc else value), buffers)
        self.role.products.append(product)
        self.step()
        return product

    def multiply_wait(self, most: int, deps: tuple):
        while len(self.role.products) > most:
            product = self.role.products.pop(0)
            product.done = True
            for buffer in product.buffers:
                buffer.reading -= 1
        if any(isinstance(dep, Product) and not dep.done for dep in deps):
            raise Race("a product is used before it is complete")
        self.step()
        values = tuple(dep.value if isinstance(dep, Product) else dep for dep in deps)
        return values if len(values) > 1 else values[0]


def language(device: Device, rings: list[Ring]) -> dict:
    """What stands for `gl`, `tma`, `mbarrier` and the matrix instructions while a kernel runs on `device`."""

    def allocate(dtype, shape, _layout):
        if dtype == torch.int64:
            return Barriers(shape)
        rings.append(Ring(device, dtype, shape))
        return rings[-1]

    def store(pointer: Pointer, value, mask=True) -> None:
        mask = torch.as_tensor(mask)
        at, value, mask = torch.broadcast_tensors(pointer.at, value, mask)
        pointer.flat[at[mask]] = value[mask].to(pointer.flat.dtype)

    def initialise(barrier: Barrier, count: int) -> None:
        barrier.arrivals = barrier.missing = count

    def maximum(a, b):
        return torch.maximum(a, torch.as_tensor(b)) if isinstance(a, torch.Tensor) else max(a, b)

    def make(create):
        return lambda shape, *rest: registers(create(shape, *rest))

    nothing = lambda *_, **__: None  # noqa: E731
    gl = SimpleNamespace(
        float32=torch.float32, int64=torch.int64, cdiv=lambda a, b: -(-a // b), static_range=range, cast=lambda value, _: value,
        program_id=lambda _: device.program, num_programs=lambda _: device.programs, allocate_shared_memory=allocate,
        load=lambda pointer: pointer.flat[pointer.at] if pointer.flat.is_floating_point() else int(pointer.flat[pointer.at]),
        store=store, maximum=maximum, where=lambda c, a, b: registers(torch.where(c, a, b)), exp2=torch.exp2, log2=torch.log2,
        abs=torch.abs, sqrt=torch.sqrt,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), convert_layout=lambda x, _, assert_trivial=False: x,
        arange=lambda a, b, _: registers(torch.arange(a, b)), zeros=make(lambda shape, dtype, _: torch.zeros(shape, dtype=dtype)),
        full=make(lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype)), warp_specialize=device.run,
        NVMMADistributedLayout=nothing, DotOperandLayout=nothing, SliceLayout=nothing, BlockedLayout=nothing, static_assert=nothing,
    )  # fmt: skip
    return {
        "gl": gl,
        "tma": SimpleNamespace(store_wait=device.store_wait),
        "copy_in": device.load,
        "copy_out": device.store,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=nothing, init=initialise, expect=device.expect, arrive=device.arrive, wait=device.wait
        ),
        "warpgroup_mma": device.multiply,
        "warpgroup_mma_wait": device.multiply_wait,
        "fence_async_shared": lambda: device.fence(rings),
    }


class ModelKernel:
    """Stands for a Gluon kernel of `module`: `kernel[grid](...)` runs every program on its own model, one after the other.

    `changes` replaces functions of the module by name, to see what a mistake in them would do.
    """

    def __init__(self, module: ModuleType, name: str, seed: int = 0, changes: dict | None = None) -> None:
        self.module, self.name, self.seed, self.changes = module, name, seed, changes or {}

    def __getitem__(self, grid):
        def launch(*, num_warps: int, num_stages: int, **values) -> None:
            values = {name: self.argument(value) for name, value in values.items()}
            for program in range(grid[0]):
                device = Device(program, grid[0], self.seed + program)
                names = {}
                for name, value in self.module_names().items():
                    function = getattr(value, "fn", None)
                    names[name] = FunctionType(function.__code__, names) if function else getattr(value, "value", value)
                names.update(language(device, []) | self.changes)
                names[self.name](**values)

        return launch

    def module_names(self) -> dict:
        """What the kernel's module and those that its functions come from define."""
        functions = [value.fn for value in vars(self.module).values() if hasattr(value, "fn")]
        modules = {function.__module__: sys.modules[function.__module__] for function in functions}
        return {name: value for module in modules.values() for name, value in vars(module).items()} | vars(self.module)

    @staticmethod
    def argument(value):
        if isinstance(value, torch.Tensor):
            return Pointer.to(value)
        return Descriptor(value) if hasattr(value, "block_shape") else value
