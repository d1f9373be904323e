"""Real process groups: the fixture ``ranks`` runs a function of a test module on gloo processes.

``ranks(4, f, *args)`` calls ``f(rank, *args)`` on four processes, each with a :class:`Rank`, and
returns the four results. Importing torch and its compiler takes seconds, so the processes live as
long as the session and a call takes the first of them; the process group is new for each call.
After a failure they are forked anew from processes that did nothing but import (a nursery).
This file is also what the processes run.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import io
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from rfcompile.errors import RFCompileError

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
"""Else gloo looks for the interface of the host's name, which a sandbox may not have."""
GRACE_SECONDS = 2.0
"""How long the other ranks may take to fail after the first one did."""
NURSERIES = 2
"""Ranks of one nursery share the seed of their hashes; neighbours must not, as under torchrun."""
IMPORTED = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch._inductor.lowering",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "rfcompile.inductor.backend",
    "rfcompile.adapters",
    "rfcompile.distributed",
    "rfcompile.training",
)
"""What many tests use; a nursery imports it once for all ranks."""


class RunRanks(Protocol):
    """The type of the fixture ``ranks``."""

    def __call__(
        self,
        world: int,
        f: Callable[..., Any],
        *args: Any,
        timeout: float = ...,
        grace: float = ...,
    ) -> list[Any]: ...


class RankError(Exception):
    """Ranks raised, died or did not answer; holds the traceback of each."""

    def __init__(self, name: str, failures: dict[int, str]) -> None:
        listing = "\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items()))
        super().__init__(f"{name} failed\n{listing}")
        self.failures = failures


@dataclass(frozen=True)
class Rank:
    """What a function under test knows about its place, and how it compares with the others."""

    index: int
    world: int

    def gathered(self, x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        """``x`` of every rank, exactly; shapes must agree."""
        mine = x.detach().clone(memory_format=torch.contiguous_format)
        sent = mine.reshape(-1).view(torch.uint8)
        others = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
        dist.all_gather(others, sent, group=group)
        return [other.view(mine.dtype).reshape(mine.shape) for other in others]

    def assert_same(
        self, x: Tensor, what: object = "", group: dist.ProcessGroup | None = None
    ) -> None:
        """Every rank has the same bytes in ``x``; all ranks raise if not."""
        first, *others = (y.reshape(-1).view(torch.uint8) for y in self.gathered(x, group))
        wrong = [r for r, other in enumerate(others, 1) if not torch.equal(first, other)]
        assert not wrong, f"{what}: ranks {wrong} differ from rank 0"


def error_of(f: Callable[[], object]) -> RFCompileError:
    """What ``f`` raises, which must be an error of this package."""
    from rfcompile.errors import RFCompileError  # ranks find the package when they have started

    error = any_error_of(f)
    if not isinstance(error, RFCompileError):
        raise error
    return error


def any_error_of(f: Callable[[], object]) -> Exception:
    """What ``f`` raises."""
    try:
        f()
    except Exception as error:
        return error
    raise AssertionError("no error")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRanks]:
    """Run a function on some gloo processes; see the module."""
    folder = tmp_path_factory.mktemp("ranks")
    nurseries = [_Nursery(number, folder) for number in range(NURSERIES)]
    pool: list[_Process] = []

    def run(
        world: int,
        f: Callable[..., Any],
        *args: Any,
        timeout: float = 300,
        grace: float = GRACE_SECONDS,
    ) -> list[Any]:
        __tracebackhide__ = True
        started = len(pool)
        try:
            for rank in range(started, world):
                pool.append(_Process(rank, folder, nurseries[rank % NURSERIES]))
            for process in pool[started:]:
                process.wait_until_ready()
            return _run(pool[:world], folder, f, args, timeout, grace)
        except BaseException:  # the processes may be in any state: start anew
            while pool:
                pool.pop().stop()
            raise

    yield run
    for process in (*pool, *nurseries):
        process.stop()


# ---- the parent --------------------------------------------------------------------------------


class _Nursery:
    """A process that has imported what ranks need, and is forked into them."""

    def __init__(self, number: int, folder: Path) -> None:
        self.connection, theirs = Pipe()
        environment = (
            os.environ
            | LOOPBACK
            | {
                "OMP_NUM_THREADS": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else each rank starts a pool of its own
            }
        )
        self.log = folder / f"nursery{number}.log"
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=environment,
                stdout=log,
                stderr=log,
            )
        theirs.close()

    def fork(self, rank: int, log: Path, connection: Connection) -> int:
        """The id of a new process that is a rank at the other end of ``connection``."""
        try:
            self.connection.send((rank, str(log)))
            send_handle(self.connection, connection.fileno(), self.popen.pid)
            return int(self.connection.recv())
        except (EOFError, OSError) as error:
            raise RankError("the start", {rank: self.log.read_text()[-2000:]}) from error

    def exit_code(self, pid: int) -> int:
        """Waits until that process has ended; ask once."""
        self.connection.send(pid)
        return int(self.connection.recv())

    def stop(self) -> None:
        self.connection.close()
        self.popen.kill()
        self.popen.wait()


class _Process:
    """A rank: a Python process that waits for jobs."""

    def __init__(self, rank: int, folder: Path, nursery: _Nursery) -> None:
        self.rank, self.nursery = rank, nursery
        self.connection, theirs = Pipe()
        self.log = folder / f"rank{rank}.log"
        self.log.write_text("")
        self.exit_code: int | None = None
        self.pid = nursery.fork(rank, self.log, theirs)
        theirs.close()

    def wait_until_ready(self) -> None:
        """Importing may take long on a busy machine: no test's time should run meanwhile."""
        if not self.connection.poll(120) or self.connection.recv_bytes() != b"ready":
            raise RankError("the start", {self.rank: self.last_words(2000)})

    def where_it_is(self) -> str:
        """The stacks of a process that hangs, if it can still write them."""
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self.last_words(6000)

    def last_words(self, length: int) -> str:
        return self.log.read_text(errors="replace")[-length:]

    def ended(self) -> int:
        """The exit code of a process that ends."""
        if self.exit_code is None:
            self.exit_code = self.nursery.exit_code(self.pid)
        return self.exit_code

    def stop(self) -> None:
        self.connection.close()
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.ended()


def _run(
    processes: list[_Process],
    folder: Path,
    f: Callable[..., Any],
    args: Any,
    timeout: float,
    grace: float,
) -> list[Any]:
    __tracebackhide__ = True
    store = folder / f"store{time.monotonic_ns()}"  # a file: no port that others could take
    job = (f.__code__.co_filename, f.__qualname__, args, len(processes), str(store))
    for process in processes:
        process.connection.send_bytes(pickle.dumps(job))
    results: list[Any] = [None] * len(processes)
    failures: dict[int, str] = {}
    waiting = {process.connection: rank for rank, process in enumerate(processes)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                result, failure = pickle.loads(connection.recv_bytes())
            except EOFError:
                code = processes[rank].ended()
                text = f"died with exit code {code}\n{processes[rank].last_words(2000)}"
                result, failure = None, text
            results[rank] = result
            if failure:
                failures[rank] = failure
                deadline = min(deadline, time.monotonic() + grace)
    for rank in waiting.values():
        failures[rank] = f"no answer\n{processes[rank].where_it_is()}"
    if failures:
        raise RankError(f.__qualname__, failures)
    return results


# ---- a nursery, and a rank -----------------------------------------------------------------------


def _raise_ranks(control: Connection) -> None:
    """Fork when asked to, and tell how a process ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector of a rank need not look at what was imported
    while True:
        try:
            request = control.recv()
        except EOFError:
            return
        if isinstance(request, int):
            _, status = os.waitpid(request, 0)
            control.send(os.waitstatus_to_exitcode(status))
            continue
        handle = recv_handle(control)
        pid = os.fork()
        if pid == 0:
            control.close()
            _become_rank(handle, *request)
        os.close(handle)
        control.send(pid)


def _become_rank(handle: int, index: int, log: str) -> None:
    """Never returns."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    code = 1
    try:
        _serve(Connection(handle), index)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(connection: Connection, index: int) -> None:
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    connection.send_bytes(b"ready")
    while True:
        try:
            file, name, args, world, store = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        result, failure = None, ""
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=index,
                world_size=world,
                timeout=timedelta(seconds=120),
            )
            torch.manual_seed(0)
            result = _load(file, name)(Rank(index, world), *args)
            dist.destroy_process_group()
            _forget()
        except BaseException:
            failure = _both_ends(traceback.format_exc())
        try:
            answer = pickle.dumps((result, failure))
        except Exception:
            answer = pickle.dumps((None, traceback.format_exc()))
        connection.send_bytes(answer)


def _forget() -> None:
    """What is kept of a job: reports, graphs, and DTensors of a group that another job has not."""
    if "rfcompile" in sys.modules:
        sys.modules["rfcompile"].reports(clear=True)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        debug._clear_sharding_prop_cache()


def _both_ends(text: str) -> str:
    return text if len(text) < 9000 else f"{text[:3000]}\n...\n{text[-6000:]}"


def _load(file: str, name: str) -> Callable[..., Any]:
    """The function ``name`` of a test module, imported from its file."""
    module = sys.modules.get(file)
    if module is None:
        spec = importlib.util.spec_from_file_location(file, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[file] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    found: Callable[..., Any] = getattr(module, name)
    return found


if __name__ == "__main__":
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # arguments are of test modules
    _raise_ranks(Connection(int(sys.argv[1])))
