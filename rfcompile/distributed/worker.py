"""A thread with its own process group that runs collectives during the backward pass.

Two things do not work. A collective in the callback of a gloo future would wait for the thread that
the callback runs on. And on the process group of the training loop, two ranks could run this
collective and another one in different orders. So the worker has one thread and a process group
that nobody else uses, and runs its jobs one after another, in the order in which they came.
"""

from __future__ import annotations

import atexit
import enum
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any

import torch
from torch import Tensor

from rfcompile.errors import RFCompileError, TransportError
from rfcompile.wire.process_groups import give_back, twin


class _Stop(enum.Enum):
    GIVE_BACK = enum.auto()
    """The group, too."""
    LEAVE = enum.auto()


@dataclass(frozen=True)
class _Task:
    site: str
    job: Callable[[], Tensor]
    device: torch.device
    future: Any
    ready: Any
    """On CUDA: the event after which the job's input is there."""


class Worker:
    """Run jobs in order on a thread, with a twin of ``group`` for their collectives.

    Every rank of the group creates one, and submits the same jobs in the same order. On CUDA jobs
    run on a side stream, which first waits for the stream of whoever submits them; waiting for the
    future makes the stream of whoever waits for it wait for the result.

    The thread ends, and destroys the group, after :meth:`close` or when ``owner`` is collected.

    Args:
        group: the process group to imitate: ranks, backend and timeout.
        device: of the tensors that jobs send.
        owner: who submits jobs.
    """

    def __init__(self, group: Any, device: torch.device, owner: object) -> None:
        self.group = twin(group, device)
        self.group_name = str(self.group.group_name)
        self._queue: SimpleQueue[_Task | _Stop] = SimpleQueue()
        # A daemon: a process that ends must not wait for ranks that never come.
        thread = Thread(target=_serve, args=(self._queue, self.group), name="rfcompile")
        thread.daemon = True
        thread.start()
        self._end = weakref.finalize(owner, _end, self._queue, thread)
        self._end.atexit = False  # see _leave
        _WORKERS.add(self)
        self._thread = thread

    def close(self) -> None:
        """End the thread after its last job, and the group; every rank must call."""
        self._end()

    def submit(self, site: str, device: torch.device, job: Callable[[], Tensor]) -> Any:
        """Run ``job`` after all earlier ones; its result, on ``device``, is the future's value.

        The future raises what the job raised: errors of this package as they are, others as
        :class:`~rfcompile.errors.TransportError`. After an error the ranks may be out of step: no
        later job runs, and its future raises the first error again. Not after :meth:`close`.
        """
        on_cuda = device.type == "cuda"
        ready = torch.cuda.current_stream(device).record_event() if on_cuda else None
        future: Any = torch.futures.Future(devices=[device] if on_cuda else None)
        self._queue.put(_Task(site, job, device, future, ready))
        return future


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    """The interpreter is about to end: let the threads end first, the groups end with the process.

    A thread that wakes up in a dying interpreter aborts the process. One that waits for another
    rank, after an error in this one, is left behind.
    """
    for worker in list(_WORKERS):
        worker._queue.put(_Stop.LEAVE)
        worker._thread.join(timeout=1)


def _end(queue: SimpleQueue[_Task | _Stop], thread: Thread) -> None:
    """Let the thread end the group, after its last job: never while a collective runs on it.

    One that waits for another rank does so when that wait is over; nobody waits for it here.
    """
    queue.put(_Stop.GIVE_BACK)
    if thread is not current_thread():
        thread.join(timeout=1)


def _serve(queue: SimpleQueue[_Task | _Stop], group: Any) -> None:
    """The thread. It knows nothing of the worker, which may be collected meanwhile."""
    name = str(group.group_name)
    streams: dict[torch.device, torch.cuda.Stream] = {}
    failure: RFCompileError | None = None
    while isinstance(task := queue.get(), _Task):
        if failure is None:
            try:
                _run(task, streams)
            except RFCompileError as error:
                failure = error
            except Exception as error:
                failure = TransportError(task.site, name, f"{type(error).__name__}: {error}")
                failure.__cause__ = error
        if failure is not None:
            _forget_values(failure)
            task.future.set_exception(failure)
        del task  # else its tensors would live until the next one comes
    if task is _Stop.GIVE_BACK:
        give_back(group)


def _forget_values(error: BaseException | None) -> None:
    """The traceback keeps its lines; what their frames hold, down to the group, is let go."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__


@torch.no_grad()
def _run(task: _Task, streams: dict[torch.device, torch.cuda.Stream]) -> None:
    if task.ready is None:
        task.future.set_result(task.job())
        return
    if task.device not in streams:
        streams[task.device] = torch.cuda.Stream(task.device)
    stream = streams[task.device]
    with torch.cuda.stream(stream):
        stream.wait_event(task.ready)
        task.future.set_result(task.job())
