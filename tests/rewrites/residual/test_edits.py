"""Rewriting the sources of modules: every spelling of an add, every kind of function, and pickling.

Each block says in ``free`` what it must compute once its skips are gone.
"""

from __future__ import annotations

import copy
import functools
import io
import linecache
import operator
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfcompile.errors import SourceError
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.rewrites.residual.edits import edited, origin_of, rewritten_class
from rfcompile.rewrites.residual.surgery import open_sites
from tests.rewrites.residual import helpers
from tests.rewrites.residual.helpers import nested, plus

WIDTH = 8
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A branch ``f`` and another one ``g``."""

    sites = 1

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def free(self, x: Tensor) -> Tensor:
        return self.f(x)


BLOCKS: dict[str, type[Base]] = {}


def block(cls: type[Base]) -> type[Base]:
    BLOCKS[cls.__name__] = cls
    return cls


# ---- spellings ---------------------------------------------------------------------------------


@block
class SkipFirst(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@block
class BranchFirst(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + x


@block
class Minus(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.f(x)

    def free(self, x: Tensor) -> Tensor:
        return -self.f(x)


@block
class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.f(x)
        return x


@block
class InPlaceMinus(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x -= self.f(x)
        return x

    def free(self, x: Tensor) -> Tensor:
        return -self.f(x)


@block
class OnTheBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y += x
        return y


@block
class TorchAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.f(x))


@block
class TorchAddAlpha(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.f(x), alpha=0.3)

    def free(self, x: Tensor) -> Tensor:
        return 0.3 * self.f(x)


@block
class TensorAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x).add(x)


@block
class Keywords(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(input=x, other=self.f(x), alpha=2)

    def free(self, x: Tensor) -> Tensor:
        return 2 * self.f(x)


@block
class OperatorAdd(Base):
    def forward(self, x: Tensor) -> Tensor:
        return operator.add(x, self.f(x))


@block
class Sub(Base):
    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub(self.f(x))
        return torch.sub(x, self.g(x), alpha=0.5)

    def free(self, x: Tensor) -> Tensor:
        return -0.5 * self.g(-self.f(x))


@block
class IntoAnItem(Base):
    def forward(self, x: Tensor) -> Tensor:
        held = [x, x * 2]
        held[0 + 1] += self.f(held[1])
        return held[1]

    def free(self, x: Tensor) -> Tensor:
        return self.f(x * 2)


@block
class StrictAboutSubclasses(Base):
    def __init_subclass__(cls, *, registered: bool) -> None:
        assert registered

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@block
class AddInPlaceExpression(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x).add_(x)


@block
class AddInPlaceStatement(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y.add_(x)
        return y


@block
class OneLine(Base):
    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x); return x + self.g(x)  # noqa: E702  # fmt: skip

    def free(self, x: Tensor) -> Tensor:
        return self.g(self.f(x))


@block
class OneExpression(Base):
    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        return (y := x + self.f(x)) + self.g(y)

    def free(self, x: Tensor) -> Tensor:
        return self.g(self.f(x))


@block
class ManyLines(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = (
            x
            + self.f(
                x,
            )
        )  # fmt: skip
        return y


@block
class AmongOtherSums(Base):
    """Numbers, lists, sets and texts are added in the same statement and stay what they are."""

    def forward(self, x: Tensor) -> Tensor:
        seen: set[int] = set()
        names = ["a"]
        for i in range(1): x, names, n = self.step(x, i + 1), names + ["b"], f"{1 + 1}"; seen.add(i)  # noqa: E701, E702, RUF005  # fmt: skip
        assert (len(names), n, seen) == (2, "2", {0})
        return x

    def step(self, x: Tensor, times: int) -> Tensor:
        log: list[int] = []
        log += (times + 1,)
        return x + times * self.f(x)


# ---- functions ---------------------------------------------------------------------------------


@block
class Super(SkipFirst):
    """The add is in the base, which is called by super()."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)

    def free(self, x: Tensor) -> Tensor:
        return self.f(x * 2)


@block
class SuperTwice(Super):
    """Three levels, an add in the last and in the first."""

    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.g(x)
        return super().forward(x)

    def free(self, x: Tensor) -> Tensor:
        return self.f(self.g(x) * 2)


@block
class SuperOfTwoBases(SuperTwice):
    """The adds are in two bases, each reached by super()."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x)

    def free(self, x: Tensor) -> Tensor:
        return self.f(self.g(-x) * 2)


@block
class Dunder(Base):
    """Needs its ``__class__`` and has private names."""

    def __init__(self) -> None:
        super().__init__()
        self.__scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        assert __class__ is Dunder  # type: ignore[name-defined]
        assert isinstance(super(), object)
        return x + self.__scale * self.f(x)

    def free(self, x: Tensor) -> Tensor:
        return self.__scale * self.f(x)


@block
class Inherited(SkipFirst):
    pass


def closure(factor: float) -> type[Base]:
    class Closure(Base):
        def forward(self, x: Tensor) -> Tensor:
            def branch(x: Tensor) -> Tensor:
                return x + factor * self.f(x)

            return branch(x)

        def free(self, x: Tensor) -> Tensor:
            return factor * self.f(x)

    return Closure


block(closure(0.25))


@block
class Arguments(Base):
    def forward(self, x: Tensor, /, a: float = 0.5, *, b: float = 2.0, **rest: Any) -> Tensor:
        return x + a * b * self.f(x, **rest)


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * function(*args, **kwargs)

    return wrapper


@block
class Decorated(Base):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def free(self, x: Tensor) -> Tensor:
        return 2 * self.f(x)


@block
class DecoratedTwice(Base):
    @doubled
    @torch.no_grad()
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def free(self, x: Tensor) -> Tensor:
        return 4 * self.f(x)


@block
class Methods(Base):
    """Through two methods, one of them decorated, with another name for self."""

    def forward(this, x: Tensor) -> Tensor:  # noqa: N805, RUF100
        return this.outer(x)

    def outer(me, x: Tensor) -> Tensor:  # noqa: N805, RUF100
        y = me.inner(x)
        return y

    @doubled
    def inner(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def free(self, x: Tensor) -> Tensor:
        return 2 * self.f(x)


@block
class Static(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.plus(x, self.f(x))

    @staticmethod
    def plus(x: Tensor, y: Tensor) -> Tensor:
        return x + y


@block
class TwoNames(Base):
    """``forward`` is known under another name that comes first."""

    def a_forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    forward = a_forward


@block
class WithLambda(Base):
    scale: Any = lambda self, x: 1 * x

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.f(x))


@block
class TakenNames(Base):
    """It has submodules of the names that sites get."""

    def __init__(self) -> None:
        super().__init__()
        self.residual_1 = nn.Linear(WIDTH, WIDTH)
        self.residual_0 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_0(x) + self.residual_1(x)

    def free(self, x: Tensor) -> Tensor:
        return self.residual_1(x)


@block
class PrivateMethod(Base):
    """Its name is another one to Python."""

    def __plus(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        return self.__plus(x, self.f(x))


ZERO = torch.zeros(3, WIDTH)


@block
class Interpolated(Base):
    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        x = x.lerp(self.f(x), weight=0.25)
        return torch.lerp(self.g(x), x, 0.5)

    def free(self, x: Tensor) -> Tensor:
        return torch.lerp(self.g(torch.lerp(ZERO, self.f(x), 0.25)), ZERO, 0.5)


@block
class Products(Base):
    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.f(x), self.g.bias, value=2)
        return x.addmm(x, self.g.weight, beta=0.5, alpha=3)

    def free(self, x: Tensor) -> Tensor:
        x = torch.addcmul(ZERO, self.f(x), self.g.bias, value=2)
        return ZERO.addmm(x, self.g.weight, beta=0.5, alpha=3)


@block
class SumsOfPairs(Base):
    sites = 3

    def forward(self, x: Tensor) -> Tensor:
        x = sum([x, self.f(x)])  # type: ignore[assignment]
        x = torch.stack((x, self.g(x)), -1).sum(dim=-1)
        return torch.sum(torch.stack([self.f(x), x]), 0)

    def free(self, x: Tensor) -> Tensor:
        return self.f(self.g(self.f(x)))


@block
class OtherSums(Base):
    """What looks like a sum of a pair and is none stays as it is."""

    def sum(self, x: Tensor, axis: int = 0) -> Tensor:
        return x.sum(axis, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.free(x)

    def free(self, x: Tensor) -> Tensor:
        y = torch.stack([x, x]).sum() + torch.stack([x, x], 1).sum(0).mean() + sum((1, 2))
        z = torch.stack([x, x]).sum(0, keepdim=True)[0] + torch.sum(torch.stack([x, x]), 1).mean()
        return self.f(torch.sin(self.sum(torch.stack([x, y + z]), 0)[0]))


def here(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@block
class HelperHere(Base):
    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        x = here(x, self.f(x))
        return here(self.g(x), x)

    def free(self, x: Tensor) -> Tensor:
        return self.g(self.f(x))


@block
class HelperElsewhere(Base):
    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        x = plus(x, self.f(x), scale=3.0)
        return helpers.plus(x, y=self.g(x))

    def free(self, x: Tensor) -> Tensor:
        return self.g(3 * self.f(x))


@block
class HelperNested(Base):
    def forward(self, x: Tensor) -> Tensor:
        return nested(self.f(x), x)

    def free(self, x: Tensor) -> Tensor:
        return 2 * self.f(x)


@block
class ManyBlocks(Base):
    """A loop over branches: one site, many adds."""

    def forward(self, x: Tensor) -> Tensor:
        for branch in (self.f, self.g, self.f):
            x = x + branch(x)
        return x

    def free(self, x: Tensor) -> Tensor:
        return self.f(self.g(self.f(x)))


@block
class TrainingOnly(Base):
    """The add that it makes in training is another one."""

    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + 2 * self.f(x)
        return x + self.f(x)

    def free(self, x: Tensor) -> Tensor:
        return (1 + self.training) * self.f(x)


# ---- what must hold ----------------------------------------------------------------------------


class Model(nn.Module):
    """Two blocks between two other things."""

    def __init__(self, block: type[Base]) -> None:
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def sites_of(module: nn.Module) -> dict[str, ResidualSite]:
    return {n: m for n, m in module.named_modules() if isinstance(m, ResidualSite)}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_spelling(name: str) -> None:
    cls = BLOCKS[name]
    model = Model(cls)
    before = {mode: model.train(mode)(X) for mode in (False, True)}
    names, modules = list(model.state_dict()), list(model._modules)
    opened, left = open_sites(model, ((X,), {}))
    assert not left
    assert {site.path for site in opened} == set(sites_of(model))
    assert len(sites_of(model)) == 2 * cls.sites
    assert list(model.state_dict()) == names
    assert list(model._modules) == modules
    assert model.training
    for mode, expected in before.items():
        assert torch.equal(model.train(mode)(X), expected), mode
    for site in sites_of(model).values():
        site.become("free")
    for mode in (False, True):
        first, second = (module.train(mode) for module in (model.first, model.second))
        expected = second.free(torch.tanh(first.free(X)))
        assert torch.equal(model(X), expected), mode
    assert isinstance(model.first, cls)
    assert type(model.first).__name__ == cls.__name__
    assert type(model.first).__qualname__ == cls.__qualname__
    assert type(model.first).__module__ == cls.__module__


def test_example_inputs_stay_as_they_are() -> None:
    class ChangesItsInput(Base):
        def forward(self, x: Tensor) -> Tensor:
            x *= 2
            x += self.f(x)
            return x

    x = X.clone()
    open_sites(ChangesItsInput(), ((x,), {}))
    assert torch.equal(x, X)


def test_only_the_residual_one_of_two_instances() -> None:
    class Sometimes(Base):
        """A sum of two tensors, one of them made of the other or not."""

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + self.f(y)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.residual = Sometimes(), Sometimes()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.residual(z := self.plain(x, y), z)

    model = Both()
    expected = model(X, X + 1)
    opened, _ = open_sites(model, ((X, X + 1), {}))
    assert [site.path for site in opened] == ["residual.residual_0"]
    assert type(model.plain) is Sometimes
    assert torch.equal(model(X, X + 1), expected)


def test_one_block_under_two_names_has_one_site() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = SkipFirst()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Shared()
    expected = model(X)
    opened, _ = open_sites(model, ((X,), {}))
    assert [site.path for site in opened] == ["b.residual_0", "a.residual_0"][::-1]
    assert len(sites_of(model)) == 1
    assert torch.equal(model(X), expected)


def test_hooks_and_state_stay() -> None:
    model = SkipFirst()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.f.register_forward_pre_hook(lambda *_: calls.append("pre"))
    vars(model)["note"] = {"any": "thing"}
    weight = model.f.weight
    open_sites(model, ((X,), {}))
    calls.clear()
    model(X)
    assert calls == ["pre", "forward"]
    assert model.note == {"any": "thing"}
    assert model.f.weight is weight


def test_a_traceback_shows_the_users_line() -> None:
    class Fails(Base):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise ValueError("here")  # the line
            return x + self.f(x)

    model = Fails()
    open_sites(model, ((X,), {}))
    model.fails = True
    with pytest.raises(ValueError, match="here") as error:
        model(X)
    frame = traceback.extract_tb(error.value.__traceback__)[-1]
    assert frame.filename == __file__
    assert frame.line == 'raise ValueError("here")  # the line'


def test_opening_again_keeps_the_sites() -> None:
    model = Model(OneLine)
    first, _ = open_sites(model, ((X,), {}))
    modules = sites_of(model)
    again, _ = open_sites(model, ((X,), {}))
    assert [site.path for site in again] == [site.path for site in first]
    assert sites_of(model) == modules


# ---- copies and files --------------------------------------------------------------------------


def roundtrip(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": roundtrip,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cls", [SkipFirst, Super, DecoratedTwice, HelperNested, Static])
def test_copies(how: str, cls: type[Base]) -> None:
    model = Model(cls)
    open_sites(model, ((X,), {}))
    for site in sites_of(model).values():
        site.become("gain")
        nn.init.constant_(site.gain, 0.5)
    twin = COPIES[how](model)
    assert type(twin.first) is type(model.first)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert torch.equal(twin(X), model(X))
    nn.init.zeros_(next(iter(sites_of(twin).values())).gain)
    assert not torch.equal(twin(X), model(X)), "the copy has sites of its own"


SOURCE = """
import torch
from torch import nn


def plus(x, y):
    return x + y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        x = plus(x, self.f(x))
        return x + self.f(x)
"""


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """A module from a source text, and anew from another one."""
    path = tmp_path / "written_by_a_test.py"

    def load(source: str) -> ModuleType:
        path.write_text(source)
        linecache.checkcache(str(path))
        module = ModuleType("written_by_a_test")
        module.__file__ = str(path)
        exec(compile(source, str(path), "exec"), vars(module))
        sys.modules[module.__name__] = module
        return module

    yield load
    sys.modules.pop("written_by_a_test", None)


def test_a_file_with_another_source(written: Callable[[str], ModuleType]) -> None:
    model = written(SOURCE).Block()
    open_sites(model, ((X,), {}))
    assert len(sites_of(model)) == 2
    file = pickle.dumps(model)
    moved = SOURCE.replace("\n\n\nclass", "\n\n\nA_NEW_LINE = 1\n\n\nclass")
    written(moved)
    assert torch.equal(pickle.loads(file)(X), model(X)), "elsewhere in the file: the same function"
    written(SOURCE.replace("return x + self.f(x)", "return x + 2 * self.f(x)"))
    with pytest.raises(SourceError, match=r"written_by_a_test\.Block\.forward is not the function"):
        pickle.loads(file)
    written(SOURCE.replace("return x + y", "return y + x"))
    with pytest.raises(SourceError, match=r"plus is not the function that was rewritten.*old sour"):
        pickle.loads(file)


def test_a_class_without_source() -> None:
    space: dict[str, Any] = {}
    exec(SOURCE, space)
    model = space["Block"]()
    classes = type(model), list(model._modules)
    with pytest.raises(SourceError, match=r"Block\.forward \(<string>:15\) has no readable source"):
        open_sites(model, ((X,), {}))
    assert (type(model), list(model._modules)) == classes


def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator whose function has no source under its name, as torch 2.15 makes them."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    wrapper.__code__ = wrapper.__code__.replace(co_name="another")
    return wrapper


def generated(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator whose function comes from a text."""
    space: dict[str, Any] = {}
    exec("def make(f):\n def forward(self, x):\n  return f(self, x)\n return forward", space)
    made: Callable[..., Any] = space["make"](function)
    return made


class Renamed(Base):
    @renamed
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Generated(Base):
    @generated
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class WithoutGradient(Base):
    @torch.no_grad()
    @renamed
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@pytest.mark.parametrize("kind", [Renamed, Generated, WithoutGradient])
def test_a_decorator_without_source_holds_the_function_that_adds(kind: type[Base]) -> None:
    model = nn.Sequential(kind(), kind())
    before = model(X)
    opened, left = open_sites(model, ((X,), {}))
    assert (len(opened), len(left)) == (2, 0)
    assert torch.equal(model(X), before)


# ---- the parts ---------------------------------------------------------------------------------


def test_a_class_is_rewritten_once() -> None:
    first, second = SkipFirst(), SkipFirst()
    for model in (first, second):
        open_sites(model, ((X,), {}))
    assert type(first) is type(second)
    origin, recipe = origin_of(type(first))
    assert origin is SkipFirst
    assert origin_of(SkipFirst) == (SkipFirst, ())
    assert rewritten_class(origin, recipe) is type(first)


def test_a_function_keeps_what_it_is() -> None:
    function = Arguments.forward
    new = edited(function, ())["forward"]
    for name in ("__defaults__", "__kwdefaults__", "__qualname__", "__module__", "__globals__"):
        assert getattr(new, name) == getattr(function, name), name
    assert new.__code__.co_filename == function.__code__.co_filename
    assert new.__code__.co_firstlineno == function.__code__.co_firstlineno


def test_a_function_without_self() -> None:
    def nothing() -> None:
        """Has no parameter."""

    with pytest.raises(SourceError, match=r"nothing has no self, so it cannot call a submodule"):
        edited(nothing, ())
