"""A GPU made of CPU memory that computes, and knows what is ordered after what.

Under :class:`FakeCuda` tensors may be made on the device "cuda" (or "cuda:1", ...). They lie in CPU memory
and hold values, but say that they are on the device, and mixing them with tensors of the host fails as it
would on a GPU. ``torch.cuda`` has streams and events with vector clocks (Fidge, 1988; Mattern, 1989). Work on
the device belongs to the current stream; the host goes on beside it, until it waits or reads a value.

Memory that was given a name (:meth:`FakeCuda.watch`) remembers who read and wrote which bytes of it and when,
as in FastTrack (Flanagan and Freund, PLDI 2009). Two accesses of which one is a write are a race if neither
is ordered after the other: :attr:`FakeCuda.races`. That does not depend on the order in which they happen to
run here.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from support.live_bytes import LiveBytes, tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "is_nonzero", "numpy"}
"""Methods by which the host waits for a value."""
TRANSFERS = {"to", "cpu", "cuda"}
Clock = dict[str, int]


def join(clock: Clock, other: Clock) -> None:
    """Order what comes after ``clock`` after ``other`` as well."""
    for name, time in other.items():
        if time > clock.get(name, 0):
            clock[name] = time


class Actor:
    """Something that works in order: a thread of the host, or a stream of the device."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {name: 1}

    def tick(self) -> None:
        self.clock[self.name] += 1


class Thread(Actor):
    """A thread of the host."""

    device = 0
    """Index of the device that is current."""


class Watched:
    """Memory whose accesses are kept, in granules. ``keep`` is what keeps it alive."""

    def __init__(self, name: str, begin: int, nbytes: int, granule: int, keep: object = None) -> None:
        self.name, self.begin, self.granule = name, begin, granule
        self.end = begin + nbytes
        self.size = -(-max(1, nbytes) // granule)
        self._keep = keep
        self.last: dict[tuple[str, bool], np.ndarray] = {}
        """By actor and whether it wrote: the actor's time when it last touched each granule; -1: never."""

    def touch(self, ranges: np.ndarray, actor: Actor, write: bool) -> str | None:
        """Note an access to the addresses ``ranges`` [n, 2]; returns whose access it races with."""
        own, found = actor.clock[actor.name], None
        mine = self.last.setdefault((actor.name, write), np.full(self.size, -1, np.int64))
        for low, high in ranges - self.begin:
            part = slice(low // self.granule, -(-high // self.granule))
            for (other, wrote), times in self.last.items():
                conflicts = other != actor.name and (write or wrote)
                if conflicts and (times[part] > actor.clock.get(other, -1)).any():
                    found = f"{'written' if wrote else 'read'} by {other}"
            mine[part] = own
        return found


class FakeCuda(contextlib.ExitStack):
    """The device. Use as a context; ``index`` is the number of the device that everything has to use, and
    ``total`` its memory in bytes, which is only counted."""

    def __init__(self, index: int = 0, total: int = 2**40) -> None:
        super().__init__()
        self.index, self.total = index, total
        self.live = LiveBytes()
        """Bytes of the tensors on the device."""
        self.threads: dict[str, Thread] = {}
        self.thread = self._thread("main")
        self.thread.device = index
        self.streams = [Stream(self, name="steps")]
        self.current: dict[str, Stream] = {}
        """The current stream by thread; the first one if it is not here."""
        self.waits = 0
        """How often the host waited for the device, or read a value from it."""
        self.staged = 0
        """Copies, meant to be asynchronous, of memory that is not page-locked: the driver may wait."""
        self.wrong_device: list[str] = []
        """Calls in threads whose current device is another one."""
        self.races: list[str] = []
        self._watched: list[Watched] = []
        """In the order of addresses."""
        self._busy = False

    def __enter__(self) -> FakeCuda:
        super().__enter__()
        cuda = {
            "Stream": lambda device=None, **_: self._new_stream(),
            "Event": lambda **_: Event(self),
            "current_stream": lambda device=None: self.stream,
            "stream": self._within,
            "device": self._on,
            "mem_get_info": lambda device=None: (self.total - self.live.peak, self.total),
        }
        self.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        self.enter_context(_Functions(self))
        self.enter_context(_Operations(self))
        return self

    # Threads and streams

    def _thread(self, name: str) -> Thread:
        return self.threads.setdefault(name, Thread(name))

    def now(self) -> Clock:
        """What this thread knows to have happened, to be told to another."""
        self.thread.tick()
        return dict(self.thread.clock)

    @contextlib.contextmanager
    def in_thread(self, name: str, told: Clock) -> Iterator[None]:
        """Run as the thread ``name``, which knows of no more than its own past and ``told``."""
        before, self.thread = self.thread, self._thread(name)
        join(self.thread.clock, told)
        try:
            yield
        finally:
            self.thread = before

    def hear(self, told: Clock) -> None:
        """Let this thread know what another one knew when it said so."""
        join(self.thread.clock, told)

    @property
    def stream(self) -> Stream:
        return self.current.get(self.thread.name, self.streams[0])

    def called(self, what: str) -> None:
        """Note a call of the driver."""
        if self.thread.device != self.index:
            self.wrong_device.append(f"{what} in {self.thread.name}")

    def _new_stream(self) -> Stream:
        self.streams.append(Stream(self, name=f"stream {len(self.streams)}"))
        return self.streams[-1]

    @contextlib.contextmanager
    def _within(self, stream: Stream | None) -> Iterator[None]:
        before, device = self.stream, self.thread.device
        if stream is not None:
            self.current[self.thread.name], self.thread.device = stream, self.index
        yield
        self.current[self.thread.name], self.thread.device = before, device

    @contextlib.contextmanager
    def _on(self, device: torch.device | int | str) -> Iterator[None]:
        before = self.thread.device
        number = device if isinstance(device, int) else torch.device(device).index
        self.thread.device = self.thread.device if number is None else number
        yield
        self.thread.device = before

    def wait(self) -> None:
        """Let the host wait for the current stream."""
        self.waits += 1
        join(self.thread.clock, self.stream.clock)

    # Memory

    def is_pinned(self, tensor: Tensor) -> bool:
        return bool(getattr(tensor, "_pinned", False))

    def watch(self, name: str, tensor: Tensor, granule: int = 64) -> None:
        """Keep the accesses to all memory of this tensor, in pieces of ``granule`` bytes."""
        storage = tensor.untyped_storage()
        if self._at(storage.data_ptr()) is None:
            self._watch(Watched(name, storage.data_ptr(), storage.nbytes(), granule, storage))

    def _watch(self, watched: Watched) -> None:
        bisect.insort(self._watched, watched, key=lambda each: each.begin)

    def _at(self, address: int) -> Watched | None:
        place = bisect.bisect_right(self._watched, address, key=lambda each: each.begin) - 1
        found = self._watched[place] if place >= 0 else None
        return found if found is not None and address < found.end else None

    def access(self, function: Any, arguments: Sequence[Any], options: dict[str, Any], actor: Actor) -> None:
        """Note what an operation reads and writes."""
        for argument, schema in zip(arguments, function._schema.arguments, strict=False):
            alias = schema.alias_info
            for tensor in tensors(argument):
                watched = self._at(tensor.data_ptr()) if tensor.numel() else None
                if watched is None:
                    continue
                if function.is_view or (alias is not None and not alias.is_write):
                    continue
                write = alias is not None and alias.is_write
                if (other := watched.touch(_hull(tensor), actor, write)) is not None:
                    did = "written" if write else "read"
                    self.races.append(f"{watched.name}: {did} by {actor.name} ({function}), {other}")


def _hull(tensor: Tensor) -> np.ndarray:
    """[1, 2] first and last + 1 address of a tensor."""
    length = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + np.array([[0, length * tensor.itemsize]])


class Stream(Actor):
    """Stand-in for :class:`torch.cuda.Stream`."""

    def __init__(self, world: FakeCuda, name: str) -> None:
        super().__init__(name)
        self._world = world
        self.device = torch.device("cuda", world.index)

    def launch(self) -> None:
        """Enqueue one operation."""
        join(self.clock, self._world.thread.clock)
        self._world.thread.tick()
        self.tick()

    def wait_event(self, event: Event) -> None:
        self._world.called("Stream.wait_event")
        join(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        join(self.clock, other.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._world)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._world.waits += 1
        join(self._world.thread.clock, self.clock)


class Event:
    """Stand-in for :class:`torch.cuda.Event`."""

    def __init__(self, world: FakeCuda) -> None:
        self._world = world
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._world.stream
        self._world.called("Event.record")
        join(stream.clock, self._world.thread.clock)
        self.clock = dict(stream.clock)
        stream.tick()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._world.stream).wait_event(self)

    def synchronize(self) -> None:
        self._world.waits += 1
        join(self._world.thread.clock, self.clock)

    def query(self) -> bool:
        return False


def is_there(value: object) -> bool:
    """Whether it is a tensor on the device."""
    return isinstance(value, Tensor) and getattr(value, "_there", False)


def _named(device: object) -> bool:
    """Whether an argument names the device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class _Functions(TorchFunctionMode):
    """Lets tensors be made on the device, and copied to and from it."""

    def __init__(self, world: FakeCuda) -> None:
        super().__init__()
        self._world = world

    def __torch_function__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "__get__":
            found = (
                is_there(args[0]) if function in (Tensor.device.__get__, Tensor.is_cuda.__get__) else False
            )
            if found:
                return torch.device("cuda", self._world.index) if function == Tensor.device.__get__ else True
            return function(*args, **kwargs)
        if name in TRANSFERS and args and isinstance(args[0], Tensor):
            return self._transfer(function, name, args, kwargs)
        if name == "copy_" and is_there(args[0]) != is_there(args[1]):
            return self._copy(
                args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            )
        if name in READS and args and is_there(args[0]):
            self._world.wait()
        if name == "is_pinned":
            return self._world.is_pinned(args[0])
        pinned = kwargs.pop("pin_memory", False)
        there = _named(kwargs.get("device"))
        if there:
            kwargs["device"] = "cpu"
        if pinned:
            self._world.called("pinned memory")
        out = function(*args, **kwargs)
        if there and isinstance(out, Tensor):
            out._there = True
            self._world.live.note([out])
        if pinned:
            out._pinned = True
        return out

    def _copy(self, to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        world = self._world
        torch.ops.aten.copy_(to, source)  # belongs to the stream, because one of the two does
        host = source if is_there(to) else to
        if not non_blocking:
            world.wait()
        elif not world.is_pinned(host):
            world.staged += 1
        return to

    def _transfer(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        named = [a for a in (*rest, kwargs.get("device")) if isinstance(a, (torch.device, str))]
        target = named[0] if named else ("cpu" if name == "cpu" else "cuda" if name == "cuda" else None)
        if target is None and rest and isinstance(rest[0], Tensor):
            target = rest[0].device
        if target is None or _named(target) == is_there(tensor):
            rest = ["cpu" if _named(a) else a for a in rest]
            if "device" in kwargs:
                kwargs["device"] = "cpu"
            if name == "cuda" or (target is not None and name == "cpu"):
                return tensor
            return function(tensor, *rest, **kwargs)
        dtypes = [a for a in (*rest, kwargs.get("dtype")) if isinstance(a, torch.dtype)]
        out = torch.empty_like(tensor, dtype=dtypes[0] if dtypes else tensor.dtype)
        # ``empty_like`` is on the side of its argument.
        out._there = _named(target)
        if out._there:
            self._world.live.note([out])
        return self._copy(out, tensor, bool(kwargs.get("non_blocking", False)))


class _Operations(TorchDispatchMode):
    """Orders every operation, and notes what it reads and writes."""

    def __init__(self, world: FakeCuda) -> None:
        super().__init__()
        self._world = world

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, which takes seconds, to keep it out of this mode."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, world = kwargs or {}, self._world
        if world._busy:
            return function(*args, **kwargs)
        inputs = tensors((args, kwargs))
        there = any(is_there(tensor) for tensor in inputs)
        name = function._schema.name
        if there and name != "aten::copy_":
            stray = [t for t in inputs if not is_there(t) and t.dim() > 0]
            assert not stray, f"{function}: a tensor of the host among those of the device"
        world._busy = True
        try:
            if there and not function.is_view:
                world.stream.launch()
            actor: Actor = world.stream if there else world.thread
            if world._watched:
                world.access(function, args, kwargs, actor)
            out = function(*args, **kwargs)
        finally:
            world._busy = False
        if there:
            known = {id(tensor) for tensor in inputs}
            made = [leaf for leaf in tensors(out) if id(leaf) not in known]
            for leaf in made:
                leaf._there = True
            world.live.note(made, inputs)
        return out
