"""Process groups: their names and sizes, and the check that all ranks have the same plan.

Private torch symbols used here, tried on torch 2.13 and present in 2.11:
``torch._C._distributed_c10d._resolve_process_group`` (what functional collectives use themselves),
``torch.testing._internal.distributed.fake_pg`` (a process group that sends nothing),
``torch._dispatch.python.no_python_dispatcher`` (see :func:`agree`),
``ProcessGroup._get_backend(device).options._timeout``, ``_new_process_group_helper``,
``_get_default_store`` and ``_world.pg_group_ranks`` of ``distributed_c10d`` (see :func:`twin`), its
``_world.pg_names`` and ``_world.group_count`` (see :func:`sole_group`).
"""

from __future__ import annotations

import contextlib
import uuid
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._dispatch.python import no_python_dispatcher
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from rfcompile.codec.compiling import constant_while_compiling
from rfcompile.codec.fingerprint import package_version, source_digest
from rfcompile.errors import (
    OptionError,
    ProcessGroupError,
    RankMismatchError,
    RFCompileError,
    TransportError,
)

_TWIN = "rfcompile_"
"""How the names of groups begin that :func:`twin` makes."""

_AGREED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def resolve(group: Any) -> Any:
    """The ProcessGroup behind a group, a group's name, or None for the default group.

    Raises:
        ProcessGroupError: no such group, or torch.distributed is not initialized.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ProcessGroupError(
            "there is no process group: call torch.distributed.init_process_group first (torchrun "
            "sets the environment it needs). A collective needs one even with a single process."
        )
    if group is None:
        return dist.group.WORLD
    if isinstance(group, DeviceMesh) and group.ndim == 1:
        group = group.get_group()
    if isinstance(group, dist.ProcessGroup):
        return group
    if not isinstance(group, str):
        raise ProcessGroupError(
            f"{group!r} is no process group of this process: pass a ProcessGroup that this rank is "
            "in, its name, a DeviceMesh of one dimension, or None for the default group."
        )
    name = group
    try:
        return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ProcessGroupError(
            f"process group {name!r} does not exist in this process: pass a ProcessGroup, or the "
            "group_name of one that has not been destroyed."
        ) from error


def sole_group() -> Any:
    """The default group where ranks can mean no other, None where they can.

    For a rank with an error before it knows the group that the others wait in. Once this process
    took part in the making of another group, in it or not, they may wait there, or not at all.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    others = [name for name in c10d._world.pg_names.values() if not name.startswith(_TWIN)]
    return dist.group.WORLD if len(others) == 1 and c10d._world.group_count <= 1 else None


def check_source(src: object, world_size: int) -> None:
    """Refuse a source of a broadcast that is no rank of the group.

    Raises:
        OptionError.
    """
    if type(src) is not int or not 0 <= src < world_size:
        raise OptionError("src", src, f"a rank of the group: 0 to {world_size - 1}.")


def name_of(group: Any) -> str:
    """The name that functional collectives use."""
    return group if isinstance(group, str) else str(group.group_name)


@contextlib.contextmanager
def transport(group: Any, site: str) -> Iterator[None]:
    """Errors of the collectives inside become TransportError; those of this package pass."""
    try:
        yield
    except RFCompileError:
        raise
    except Exception as error:
        raise TransportError(site, name_of(group), f"{type(error).__name__}: {error}") from error


def twin(group: Any, device: torch.device) -> Any:
    """A new process group of the same ranks, backend and timeout; all of those ranks must call.

    For collectives of ``device``'s tensors that must not mix with those of ``group``.
    :func:`give_back` ends it.

    Its name is drawn by the first rank. ``new_group`` with ``use_local_synchronization`` takes one
    from the number of groups that a rank knows: ranks that know other groups would wait for each
    other, and after a group was destroyed the next one would meet its keys in the store.

    No rank goes on before all have connected: one that gave its half back would cut the others off.

    Raises:
        TransportError: a rank died, or did not call within the timeout of ``group``.
    """
    with transport(group, "a process group for traffic beside the backward pass"):
        made = _connected(group, device)
        if not sends_nothing(group):
            _barrier(group)
    return made


def _connected(group: Any, device: torch.device) -> Any:
    names = [f"{_TWIN}{uuid.uuid4().hex}"]
    dist.broadcast_object_list(names, group=group, group_src=0)
    ranks, world = dist.get_process_group_ranks(group), resolve(None)
    made, _ = c10d._new_process_group_helper(
        group.size(),
        group.rank(),
        ranks,
        _backend_of(group, device),
        c10d._get_default_store(),
        c10d.GroupName(names[0]),
        timeout=group._get_backend(device).options._timeout,
        device_id=world.bound_device_id,
    )
    c10d._world.pg_group_ranks[made] = {rank: place for place, rank in enumerate(ranks)}
    return made


def _backend_of(group: Any, device: torch.device) -> str:
    """The backend for ``device``: of "cpu:gloo,cuda:nccl" one, of "gloo" all."""
    config = dist.get_backend_config(group)
    backends = dict(item.split(":") for item in config.split(",") if ":" in item)
    return dist.Backend(backends.get(device.type, config))


def give_back(group: Any) -> None:
    """Destroy a group, unless that is done: ``destroy_process_group()`` ends all of them."""
    if dist.is_initialized() and group in c10d._world.pg_group_ranks:
        dist.destroy_process_group(group)


@constant_while_compiling
def agree(group: str, plan: str) -> bool:
    """Check once per group and plan that every rank has the same plan; True, or an error on all.

    Under torch.compile it runs while compiling. A plan that is known costs no message. A rank that
    alone meets a new one waits in a barrier, which no backend takes for one of the collectives that
    carry payloads: nothing mixes, and all ranks fail when the timeout of the group has passed.

    Raises:
        RankMismatchError: some rank has another plan or other package sources.
        TransportError: another rank died, or did not ask for a new plan too, within the timeout.
    """
    process_group = resolve(group)
    agreed = _AGREED.setdefault(process_group, set())
    if plan not in agreed:
        _meet(process_group, plan)
        require_same(process_group, plan)
        agreed.add(plan)
    return True


def has_agreed(group: str, plan: str) -> bool:
    """:func:`agree` was called with this plan for a group that lives on; sends nothing."""
    try:
        return plan in _AGREED.get(resolve(group), ())
    except ProcessGroupError:
        return False


def _barrier(group: Any) -> None:
    on_cuda = "nccl" in dist.get_backend(group)
    dist.barrier(group, device_ids=[torch.cuda.current_device()] if on_cuda else None)


def _meet(group: Any, plan: str) -> None:
    try:
        if sends_nothing(group):
            return
        with no_python_dispatcher():
            _barrier(group)
    except RuntimeError as error:
        reason = (
            "no answer to the first call of this kind here. Either a rank died, or it raised an "
            "error of its own before it sent anything (see its output), or the others are in a "
            f"call of another format, dtype or shape. {type(error).__name__}: {error}"
        )
        raise TransportError(plan, name_of(group), reason) from error


def sends_nothing(group: Any) -> bool:
    """There are no other ranks, or only fake ones."""
    return group.size() == 1 or dist.get_backend(group) == "fake"


def require_same(group: Any, plan: str) -> None:
    """Compare plan and package sources with those of the other ranks now; all of them must call.

    Raises:
        RankMismatchError: as :func:`agree`. TransportError: a rank died, or did not call in time.
    """
    with transport(group, plan):
        if sends_nothing(group):
            return
    mine = f"{plan} [rfcompile {package_version()}, sources {source_digest()}]"
    plans: list[Any] = [None] * group.size()
    # While compiling, torch dispatches through Python and holds the interpreter's lock in the call:
    # a gloo thread that needs it to free the tensors of the last collective would never end.
    with no_python_dispatcher(), transport(group, plan):
        dist.all_gather_object(plans, mine, group=group)
    if any(other != mine for other in plans):
        raise RankMismatchError(name_of(group), dict(enumerate(plans)))


@contextlib.contextmanager
def simulated(world_size: int) -> Iterator[None]:
    """A default process group of ``world_size`` ranks that sends nothing: this process is rank 0.

    Graphs are those of a real run; numbers are not. An existing group is left alone.
    """
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
