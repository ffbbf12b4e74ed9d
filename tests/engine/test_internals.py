"""The list of internals is complete, true of the code, and true of the installed releases."""

import ast
import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch

from engine.internals import INTERNALS, READ_IN
from tests.processes import ROOT
from tests.test_architecture import FILES, relative

OF_PYTHON = {"_asdict", "_fields", "_replace", "_exit", "_current_frames"}
OF_OURS = {"_scaled", "_shards"}
OURS = ("engine/", "launch/", "model/", "planner/", "training/", "train.py")


def private_names(tree: ast.AST) -> set[str]:
    """Names with one underscore that are read from objects other than `self` and `cls`, or defined to be found by others."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value) not in ("self", "cls")
    }


def set_attributes(tree: ast.AST) -> set[str]:
    """`object.name` wherever it is assigned to, but for `self`, `cls` and autograd's `ctx`."""
    return {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) not in ("self", "cls", "ctx")
    } | {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"
    }


ON_OBJECTS_OF_OURS = {
    "engine/build.py": {
        "late.daemon",
        "engine.head_loss.contrast",
        "engine.head_loss.whole_rows",
        "engine.prior",
        "model.activation_checkpointing",
        "optimizer.groups",
    },
    "engine/checkpoint/transplant.py": {"part.data"},
    "engine/layout/sequence.py": {"documents.exchange", "module.attend"},
    "engine/layout/tensor.py": {
        "linear.first_input",
        "module.multiply",
        "setattr(owner, leaf, _part(getattr(owner, leaf), dimension, parts))",
        "setattr(module, last, RowMap(getattr(module, last), parts))",
        "setattr(module, name, SharedNorm(norm, parts))",
    },
    "engine/reduction/compression.py": {"parameter.grad"},
    "engine/reduction/wire.py": {"traffic.calls", "traffic.bytes", "traffic.ring_bytes"},
    "engine/document_losses.py": {"engine.head_loss.of_documents"},
    "engine/gate.py": {"optimizer.refuses", "holder.grad"},
    "engine/layer_statistics.py": {"place.attend"},
    "engine/run/begin.py": {"engine.base", "loop.state.decisions"},
    "engine/run/loop.py": {"loop.state"},
    "engine/run/validation.py": {"engine.head_loss.sources_apart"},
    "engine/run/rewind.py": {"state.decisions"},
    "engine/run/outputs.py": {"self.clock.flops_per_token"},
    "engine/run/stopping.py": {"stop.name"},
    "engine/run/watchdog.py": {"roll_call.exit_code"},
}
"""Fields of our classes, submodules that a module of ours is given, and the public `data` and `grad` of a tensor."""


@cache
def tree(file: str) -> ast.AST:
    return ast.parse((ROOT / file).read_text())


@pytest.mark.parametrize("file", [relative(file) for file in FILES if relative(file).startswith(OURS)])
def test_every_private_name_is_listed(file):
    listed = {internal.name for internal in INTERNALS if internal.used_in == file}
    assert private_names(tree(file)) - OF_PYTHON - OF_OURS <= listed


@pytest.mark.parametrize(
    "file", [relative(file) for file in FILES if relative(file).startswith("engine/") and file.stem != "internals"]
)
def test_nothing_is_set_on_objects_of_others(file):
    assert set_attributes(tree(file)) == ON_OBJECTS_OF_OURS.get(file, set())


def test_the_keys_of_files_are_listed():
    """What is taken out of DeepSpeed's dictionaries by a constant."""
    file = "engine/checkpoint/deepspeed_files.py"
    keys = {
        node.value
        for parent in ast.walk(tree(file))
        for node in (
            [parent.slice]
            if isinstance(parent, ast.Subscript)
            else parent.args[:1]
            if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Attribute) and parent.func.attr == "get"
            else []
        )
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    ours = {"model", "optimizer", "weight"}  # of the manifest's recipe, and our own
    of_torch = {"state", "step"}
    listed = {internal.name for internal in INTERNALS if internal.used_in == file}
    assert keys - ours - of_torch <= listed


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: f"{internal.used_in}:{internal.name}")
def test_a_listed_internal_is_used_and_exists(internal):
    assert internal.name in (ROOT / internal.used_in).read_text()
    assert internal.test == "a GPU" or (ROOT / internal.test).exists()
    if internal.module == "torch":
        assert any(hasattr(place, internal.name) for place in (torch, torch.ops.aten))
    elif internal.module not in ("transformers", "older torch"):
        origin = importlib.util.find_spec(internal.module).origin
        assert internal.name in Path(origin).read_text()


def test_the_list_was_read_in_the_installed_releases():
    """After an upgrade: go through the list, then state the new release."""
    for package, release in READ_IN.items():
        assert importlib.metadata.version(package).partition("+")[0] == release


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x._world.pg_map", {"_world"}),
        ("self._own + cls._own + x.__class__", set()),
        ("optimizer._hp", {"_hp"}),
    ],
)
def test_a_private_name_is_seen(text, found):
    assert private_names(ast.parse(text)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("engine.mesh = 1", {"engine.mesh"}),
        ("engine.a, x.b = 1, 2", {"engine.a", "x.b"}),
        ("engine.n += 1", {"engine.n"}),
        ("self.a = 1\nctx.b = 2", set()),
        ("setattr(engine, 'x', 1)", {"setattr(engine, 'x', 1)"}),
    ],
)
def test_an_attribute_that_is_set_is_seen(text, found):
    assert set_attributes(ast.parse(text)) == found
