"""The rules of the repository's layout, checked over every Python file."""

import ast
import collections
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "console",
    "storage",
    "launch",
    "model",
    "data_prep",
    "training",
    "engine",
    "planner",
    "tools",
    "bench",
    "tests",
)
FILES = sorted([*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))])
MAX_LINES = 350

MAY_IMPORT = {
    # package: our modules it may import beside itself
    "console": (),
    "storage": (),
    "launch": ("console",),
    "model": (),
    "data_prep": ("console", "storage"),
    "training": ("model.adapter_config", "model.config", "model.hf.config", "model.visibility", "storage"),
    "engine": ("launch", "model", "training", "storage", "data_prep.foresee"),
    "planner": ("console", "engine", "launch", "model", "storage", "training"),
}
ENGINE_MAY_IMPORT = {
    # folder of the engine ("": its own files): the other folders of it; all may import `OF_ALL_ENGINE`
    "layout": (),
    "reduction": (),
    "ds_json": ("layout", "reduction"),
    "": ("layout", "reduction"),
    "checkpoint": ("", "layout"),
    "run": ("", "layout", "ds_json", "checkpoint"),
}
OF_ALL_ENGINE = ("engine.internals", "engine.safe_load")
MAY_NOT_IMPORT = {
    # path prefix: foreign modules it must do without
    "model/": ("deepspeed", "torch.distributed"),
    "data_prep/": ("torch", "deepspeed"),
    "console/": ("torch", "deepspeed"),
    "launch/": ("deepspeed",),
    "storage/": ("torch", "deepspeed"),
    "training/": ("deepspeed",),
    "planner/": ("deepspeed",),
    "tools/": ("deepspeed",),
    "bench/": ("deepspeed",),
    "train.py": ("deepspeed",),
}
MAY_READ_ENVIRONMENT = {"launch/topology.py", "console/command.py"}
"""The second before torch is imported: which rank complains of a command line."""
MAY_SHADOW = {"data_prep/inspect.py"}
"""Run as `python -m data_prep.inspect`; inside a package it hides nothing."""


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(file: Path, tree: ast.AST) -> set[str]:
    """Absolute names of everything the file imports anywhere: `a.b` and, for `from a import b`, `a` and `a.b`."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found - {""}


def modules_of(names: set[str]) -> set[str]:
    """Those of the names that are files of ours."""
    return {name for name in names if (ROOT / f"{name.replace('.', '/')}.py").is_file()}


def wing_of(module: str) -> str:
    """`engine.layout.mesh` -> `layout`, `engine.step` -> the empty string."""
    return ".".join(module.split(".")[1:-1])


def inside(name: str, modules) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def reads_environment(tree: ast.AST) -> list[int]:
    """Lines that touch `os.environ` or `os.getenv`, however imported, unless they only set a variable for children."""
    written = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    names = {"environ", "environb", "getenv"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names and id(node) not in written)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & names)
    ]


def broken_rules(file: Path, text: str) -> list[str]:
    """Every rule that a file with this text at this place would break."""
    path, tree = relative(file), ast.parse(text)
    top, names, problems = path.split("/")[0], imports(file, tree), []
    if top in MAY_IMPORT:
        ours = {name for name in names if name.split(".")[0] in PACKAGES and name.split(".")[0] != top}
        # `from storage import shards` names `storage` too: the package itself is empty
        ours -= {name for name in ours if name in PACKAGES and any(o.startswith(f"{name}.") for o in ours)}
        problems += [f"imports {name}" for name in sorted(ours) if not inside(name, MAY_IMPORT[top])]
    if top == "engine":
        wing = path.split("/")[1] if path.count("/") == 2 else ""
        problems += [
            f"imports {name}"
            for name in sorted(modules_of(names))
            if name.startswith("engine.") and name not in OF_ALL_ENGINE
            if wing_of(name) not in (wing, *ENGINE_MAY_IMPORT[wing])
        ]
    for prefix, forbidden in MAY_NOT_IMPORT.items():
        if path.startswith(prefix):
            problems += [f"imports {name}" for name in sorted(names) if inside(name, forbidden)]
    if not path.startswith("tests/") and path not in MAY_READ_ENVIRONMENT:
        problems += [f"line {line} reads the environment" for line in reads_environment(tree)]
    if file.stem in sys.stdlib_module_names and path not in MAY_SHADOW:
        problems.append("is named like a module of the standard library")
    if file.stem in ("utils", "common", "helpers", "misc", "support"):
        problems.append("has a name that says nothing")
    if (lines := text.count("\n")) > MAX_LINES:
        problems.append(f"has {lines} lines, at most {MAX_LINES} are read in one sitting")
    return problems


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_every_file_keeps_the_rules(file):
    assert broken_rules(file, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("model/x.py", "import deepspeed"),
        ("model/x.py", "def f():\n    from torch.distributed import all_reduce"),
        ("model/x.py", "from torch import distributed"),
        ("model/x.py", "from training.shards import Manifest"),
        ("data_prep/x.py", "import torch.nn"),
        ("data_prep/x.py", "from training import data"),
        ("storage/x.py", "from training.config import Recipe"),
        ("console/x.py", "from data_prep.records import Unit"),
        ("data_prep/x.py", "from model.config import ModelConfig"),
        ("data_prep/x.py", "from ..training import data"),
        ("storage/shards.py", "import torch"),
        ("training/x.py", "from model.llama import Llama"),
        ("training/x.py", "from engine import optimizer"),
        ("launch/x.py", "from engine.layout.mesh import Mesh"),
        ("launch/x.py", "import deepspeed"),
        ("engine/layout/x.py", "from engine.reduction import wire"),
        ("engine/checkpoint/x.py", "from engine.run.plan import RunPlan"),
        ("engine/x.py", "from engine.run.plan import RunPlan"),
        ("engine/ds_json/x.py", "import engine.step"),
        ("engine/x.py", "from planner.hardware import Hardware"),
        ("tools/x.py", "import deepspeed.comm as dist"),
        ("train.py", "from deepspeed import initialize"),
        ("engine/x.py", "import os\nos.environ['RANK']"),
        ("tools/x.py", "from os import getenv"),
        ("engine/types.py", ""),
        ("training/utils.py", ""),
        ("tests/model/support.py", ""),
        ("engine/x.py", "\n" * 351),
    ],
)
def test_a_breach_is_seen(path, text):
    assert broken_rules(ROOT / path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("data_prep/x.py", "from storage import shards\nfrom storage.shards import Manifest\nfrom .store import S"),
        ("training/x.py", "from model.visibility import Visibility\nfrom . import data\nimport torch.distributed"),
        ("launch/topology.py", "import os\nos.environ['RANK']\nfrom console.output import outlive_readers"),
        ("engine/x.py", "import deepspeed\nfrom model.llama import Llama\nfrom launch.topology import Topology"),
        ("engine/run/x.py", "from engine.step import train_step\nfrom engine.checkpoint.folder import save"),
        ("engine/layout/x.py", "from engine import internals\nfrom engine.layout.mesh import Mesh"),
        ("data_prep/inspect.py", ""),
        ("data_prep/x.py", "import os\nos.environ['TOKENIZERS_PARALLELISM'] = 'false'"),
    ],
)
def test_what_is_allowed_passes(path, text):
    assert broken_rules(ROOT / path, text) == []


def test_no_two_classes_share_a_name():
    places = collections.defaultdict(list)
    for file in FILES:
        if not relative(file).startswith("tests/"):
            classes = (node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef))
            for name in classes:
                places[name].append(relative(file))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_files_import_each_other_in_a_circle():
    """Imports for a type only, and inside functions, count too."""
    ours = {relative(file).removesuffix(".py").replace("/", "."): file for file in FILES}
    arrows = {
        module: modules_of(imports(file, ast.parse(file.read_text()))) & ours.keys() for module, file in ours.items()
    }
    graphlib.TopologicalSorter({module: found - {module} for module, found in arrows.items()}).prepare()


def test_every_test_folder_is_a_package():
    folders = {file.parent for file in FILES if relative(file).startswith("tests/")}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
