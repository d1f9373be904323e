"""Copies models whose ``forward`` was replaced, so that a copy calls its own parts.

``copy.deepcopy`` copies no function, so that what ``model.forward = torch.compile(model.forward)``,
a closure or a hook holds would still be a part of the model that was copied. Here such a function
is made anew, with the copies in its closure.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from rfcompile.errors import CaptureError

_LRU = type(functools.lru_cache(lambda: None))
_LEAVES = (Tensor, type, ModuleType, str, bytes, int, float, complex, bool, type(None))


class Bound:
    """A bound method of a module in a copy. Without ``function`` it is the forward of the module's
    class, whichever class the module has when it is called.
    """

    def __init__(self, module: Any = None, function: Any = None) -> None:
        self.module, self.function = module, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.function is not None:
            return self.function(self.module, *args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __self__(self) -> Any:
        return self.module

    @property
    def __func__(self) -> Any:
        return type(self.module).forward if self.function is None else self.function

    @property
    def __name__(self) -> str:
        return str(getattr(self.__func__, "__name__", "forward"))

    @property
    def __code__(self) -> CodeType:
        code: CodeType = self.__func__.__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(self.__func__)
        return whole.replace(parameters=list(whole.parameters.values())[1:])


def runs_its_class(module: nn.Module) -> bool:
    """The module computes with the forward of its class: it has no other, or one around that."""
    own = vars(module).get("forward")
    if own is None:
        return True
    return any(_is_forward_of(value, module) for value in _reachable(own))


def _is_forward_of(value: object, module: nn.Module) -> bool:
    if isinstance(value, Bound):
        return value.module is module and value.function is None
    if isinstance(value, MethodType):
        return value.__self__ is module and value.__func__ is type(module).forward
    return False


def _reachable(value: object) -> Iterator[object]:
    seen: dict[int, object] = {}
    todo = [value]
    while todo:
        value = todo.pop()
        if id(value) not in seen and not isinstance(value, (nn.Module, *_LEAVES)):
            seen[id(value)] = value
            yield value
            todo += _parts(value, is_copied=False)


def _parts(value: Any, *, is_copied: bool) -> list[Any]:
    """What a value holds; of an object that a copy would share, only if it can be called."""
    if isinstance(value, FunctionType):
        cells = [content_of(cell) for cell in value.__closure__ or ()]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *vars(value).values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values(), *vars(value).values()]
    if isinstance(value, _LRU):
        return [value.__wrapped__]
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if is_copied or callable(value):
        return list(getattr(value, "__dict__", {}).values())
    return []


def content_of(cell: CellType) -> Any:
    """What a closure holds in a cell; None before it is filled."""
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


class Rebinding:
    """The functions and methods in a model's attributes that hold parts of it, made anew.

    Give :attr:`memo` to ``copy.deepcopy``, then call :meth:`finish`.

    Raises:
        CaptureError: a ``forward`` on an instance calls a part of the model by a global name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.memo: dict[int, Any] = {}
        self._own = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
        self._holders: dict[int, Any] = {}
        self._cells: dict[int, tuple[CellType, CellType]] = {}
        number = -1
        while len(self._holders) > number:  # until functions that hold each other are found
            number = len(self._holders)
            self._seen: dict[int, Any] = {}
            for path, module in model.named_modules():
                self._search(path, module)
        for value in self._holders.values():
            self._begin(value)
        for value in self._holders.values():
            if isinstance(value, _LRU):
                inner = value.__wrapped__
                remade = functools.lru_cache(**value.cache_parameters())
                self.memo[id(value)] = remade(self.memo.get(id(inner), inner))

    def _search(self, path: str, module: nn.Module) -> None:
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                self._visit(value, is_copied=True)
        own = vars(module).get("forward")
        for value in _reachable(own) if own is not None else ():
            if isinstance(value, FunctionType):
                self._check_globals(path, type(module).__name__, value)

    def _visit(self, value: Any, *, is_copied: bool) -> bool:
        """The value holds a part of the model."""
        if id(value) in self._own:
            return True
        if isinstance(value, _LEAVES) or id(value) in self._seen:
            return id(value) in self._holders
        self._seen[id(value)] = value  # kept, so that the id stays its own
        shares = isinstance(value, (FunctionType, _LRU)) or not is_copied
        parts = _parts(value, is_copied=not shares)
        found = [self._visit(part, is_copied=not shares) for part in parts]
        if any(found):
            self._holders[id(value)] = value
        return id(value) in self._holders

    def _check_globals(self, path: str, cls: str, function: FunctionType) -> None:
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            held = getattr(value, "__self__", value)
            if isinstance(held, nn.Module) and id(held) in self._own:
                raise CaptureError(
                    f"the forward of {path or 'the model'} ({cls}) was replaced by "
                    f"{function.__qualname__}, which calls a part of this model by the global name "
                    f"{name!r}: a copy would call the original. Transform the model first and "
                    "replace its forward then, or hold that part in a closure."
                )

    def _begin(self, value: Any) -> None:
        if isinstance(value, FunctionType):
            closure = tuple(self._cell(cell) for cell in value.__closure__ or ())
            clone = FunctionType(
                value.__code__, value.__globals__, value.__name__, value.__defaults__, closure
            )
            clone.__kwdefaults__ = value.__kwdefaults__
            clone.__qualname__, clone.__module__ = value.__qualname__, value.__module__
            clone.__doc__, clone.__annotations__ = value.__doc__, value.__annotations__
            self.memo[id(value)] = clone
        elif isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            is_forward = value.__func__ is type(value.__self__).forward
            if is_forward or id(value.__func__) in self._holders:
                self.memo[id(value)] = Bound()

    def _cell(self, cell: CellType) -> CellType:
        content = content_of(cell)
        if id(content) not in self._own and id(content) not in self._holders:
            return cell
        return self._cells.setdefault(id(cell), (cell, CellType()))[1]

    def finish(self, memo: dict[int, Any]) -> None:
        """Fill what was made with the copies."""
        for old, new in self._cells.values():
            new.cell_contents = copy.deepcopy(old.cell_contents, memo)
        for value in self._holders.values():
            made: Any = self.memo.get(id(value))
            if isinstance(value, FunctionType):
                made.__defaults__ = self._copied(value.__defaults__, memo)
                made.__kwdefaults__ = self._copied(value.__kwdefaults__, memo)
                vars(made).update({k: self._copied(v, memo) for k, v in vars(value).items()})
            elif isinstance(made, Bound):
                made.module = copy.deepcopy(value.__self__, memo)
                if value.__func__ is not type(value.__self__).forward:
                    made.function = copy.deepcopy(value.__func__, memo)

    def _copied(self, value: Any, memo: dict[int, Any]) -> Any:
        is_held = id(value) in self._own or id(value) in self._holders
        is_held |= any(id(part) in self._holders or id(part) in self._own for part in _items(value))
        return copy.deepcopy(value, memo) if is_held else value


def _items(value: Any) -> list[Any]:
    return _parts(value, is_copied=False) if isinstance(value, (tuple, dict)) else []


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
