"""Several hosts on one Linux machine, joined by links of a chosen rate, to measure slow links.

A host is a network namespace. Each has one interface, ``eth0``, whose other end sits on a bridge in
one more namespace, the switch; a token bucket (tbf) on both ends of a link limits both directions.
All traffic stays inside these namespaces. Needs root and the ``ip`` and ``tc`` tools (iproute2).

    with Network(hosts=2, rate="200mbit") as network:
        processes = [network.run(rank, ["python", "worker.py"]) for rank in range(2)]
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

BURST = "128kb"
"""What tbf lets through at once: only transfers much larger than this see the rate."""
LATENCY = "200ms"
"""How long a packet may wait in tbf before it is dropped."""

_numbers = itertools.count()


class NetworkError(RuntimeError):
    """A command that sets up or reads the network failed."""


class Network:
    """``hosts`` namespaces behind one switch; the context manager makes and removes them.

    Args:
        hosts: number of hosts, 1 to 250; host ``rank`` has address ``10.77.0.<rank + 1>``.
        rate: rate of each link in tc's notation, such as "200mbit"; None: no limit.
    """

    def __init__(self, hosts: int, rate: str | None = None) -> None:
        self.hosts, self.rate = hosts, rate
        name = f"rf{os.getpid()}n{next(_numbers)}"
        self.switch = f"{name}s"
        self.names = [f"{name}h{rank}" for rank in range(hosts)]
        self._cleanup = ExitStack()

    @staticmethod
    def address(rank: int) -> str:
        return f"10.77.0.{rank + 1}"

    def __enter__(self) -> Network:
        with ExitStack() as cleanup:
            self._build(cleanup)
            self.set_rate(self.rate)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def _build(self, cleanup: ExitStack) -> None:
        for namespace in (self.switch, *self.names):
            _call("ip", "netns", "add", namespace)
            cleanup.callback(_call, "ip", "netns", "del", namespace)
            _call("ip", "-n", namespace, "link", "set", "lo", "up")
        _call("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _call("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for rank, host in enumerate(self.names):
            port = f"port{rank}"
            link = ("eth0", "type", "veth", "peer", "name", port, "netns", self.switch)
            _call("ip", "-n", host, "link", "add", *link)
            _call("ip", "-n", host, "addr", "add", f"{self.address(rank)}/24", "dev", "eth0")
            _call("ip", "-n", self.switch, "link", "set", port, "master", "bridge")
            _call("ip", "-n", self.switch, "link", "set", port, "up")
            _call("ip", "-n", host, "link", "set", "eth0", "up")

    def set_rate(self, rate: str | None) -> None:
        """Change the rate of every link, in both directions; None: no limit."""
        ends = [(host, "eth0") for host in self.names]
        ends += [(self.switch, f"port{rank}") for rank in range(self.hosts)]
        for namespace, device in ends:
            if rate:
                limit = ("tbf", "rate", rate, "burst", BURST, "latency", LATENCY)
                _call("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *limit)
            elif self.rate:
                _call("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
        self.rate = rate

    def run(
        self,
        rank: int,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start ``command`` on host ``rank``; it is killed, if still alive, when the network goes.

        ``env`` is added to this process's environment, and so are the variables that
        ``torch.distributed`` reads: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and the interface
        for gloo. ``options`` go to :class:`subprocess.Popen`.
        """
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.hosts),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[rank], *command],
            env={**os.environ, **variables, **(env or {})},
            text=True,
            **options,
        )
        self._cleanup.callback(_stop, process)
        return process

    def sent_bytes(self, rank: int) -> int:
        """Bytes that host ``rank`` has put on its link so far, headers included."""
        return sent_bytes(_call("ip", "netns", "exec", self.names[rank], "cat", "/proc/net/dev"))


def sent_bytes(proc_net_dev: str) -> int:
    """Bytes sent on ``eth0`` according to the text of ``/proc/net/dev``."""
    for line in proc_net_dev.splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "eth0":
            return int(counters.split()[8])
    raise NetworkError("/proc/net/dev has no line for eth0; is this process on a host?")


def available() -> str:
    """Why no :class:`Network` can be made here; an empty text if it can."""
    if os.geteuid() != 0:
        return "it needs root to make network namespaces"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2"
    try:
        with Network(hosts=1, rate="1gbit"):
            return ""
    except NetworkError as error:
        return str(error)


def _call(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise NetworkError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
    return result.stdout


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
