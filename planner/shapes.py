"""Tensors of shapes without values, on which a plan runs a layer."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


@contextlib.contextmanager
def meta_tensors() -> Iterator[None]:
    """Tensors of torch's device `meta`."""
    with without_compiler(), torch.device("meta"):
        yield


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Fake tensors of a CPU, which operators take for real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools import fake_collectives  # noqa: F401  # collectives on fake tensors

    with FakeTensorMode():
        yield


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """What torch keeps out of what it compiles runs as it is, so that its compiler (1.5 s, 130 MB) need not be loaded for that.

    Nothing may be compiled meanwhile. torch remembers on each function what `torch._dynamo.disable` made of it, which is
    forgotten again, since a run may compile afterwards.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    plain: list[Any] = []

    def disable(function: Any, recursive: bool = True, wrapping: bool = True) -> Any:
        plain.append(function)
        return function

    stand_in: Any = ModuleType(name)
    stand_in.disable = disable
    stand_in.config = SimpleNamespace(error_on_nested_fx_trace=True)  # which torch's recomputation asks for
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]
        for function in plain:
            vars(function).pop("__dynamo_disable", None)
