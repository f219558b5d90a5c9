"""The shape of the package: imports run one way, heavy libraries stay in their place, files stay short.

Each check is a function from a folder to a list of faults, so that a second test can feed it a
small tree with faults in it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "postnas"

# A module imports from its own part and from the tiers before its own.
TIERS = (
    ("errors", "files", "progress", "trials", "recipe", "sources", "ops"),
    ("data",),
    ("blocks",),
    ("models",),
    ("train", "generate"),
    ("evaluate",),
    ("search",),
    ("report", "export"),
    ("claim", "check", "run", "warm"),
    ("pipeline",),
    ("commands",),
    ("__main__",),
)
RANK = {part: rank for rank, tier in enumerate(TIERS) for part in tier}
# The leftmost tier is a row of single modules, each free to import from those before it.
FOUNDATION = TIERS[0]
STRANGERS = ({"train", "evaluate"},)

# Where a library may be imported; a name without .py is a module or a folder.
HOMES = {
    "transformers": ("data", "models", "evaluate", "generate"),
    "fla": ("ops/fla.py",),
    "matplotlib": ("report",),
}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LONGEST = 420
SOURCES = (".py", ".yaml", ".yml", ".j2", ".sh")


def modules(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Each Python file's path inside the package, and its syntax tree."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(name: str) -> str:
    """`ops/fla.py` belongs to `ops`, `recipe.py` to `recipe`."""
    return name.split("/")[0].removesuffix(".py")


def imported(name: str, node: ast.AST) -> list[str]:
    """Dotted names that this one statement or call imports, relative ones made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            folders = ["postnas", *name.split("/")[:-1]]
            kept = folders[: len(folders) - node.level + 1]
            source = ".".join([*kept, source] if source else kept)
        return [f"{source}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called, target = ast.unparse(node.func), node.args[0].value
        if called.split(".")[-1] in ("import_module", "__import__") and isinstance(target, str):
            return [target]
    return []


def imports(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, at the top, in functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        for target in imported(name, node):
            yield getattr(node, "lineno", 0), target


def allowed(part: str, target: str) -> bool:
    if part == target:
        return True
    if {part, target} in STRANGERS:
        return False
    if part in FOUNDATION and target in FOUNDATION:
        return FOUNDATION.index(target) < FOUNDATION.index(part)
    return RANK[target] < RANK[part]


def arrow_faults(package: Path) -> list[str]:
    """Imports from the right, from a part beside, or from the package root."""
    faults = []
    for name, tree in modules(package):
        part = part_of(name)
        if name == "__init__.py":
            continue
        if part not in RANK:
            faults.append(f"{name}: {part} stands in no tier; give it its place in TIERS")
            continue
        for line, dotted in imports(name, tree):
            root, *rest = dotted.split(".")
            if root != "postnas" or rest == ["__version__"]:
                continue
            target = rest[0] if rest else "postnas"
            if target not in RANK:
                faults.append(f"{name}:{line}: imports {dotted} from the package root; name its module")
            elif not allowed(part, target):
                faults.append(f"{name}:{line}: {part} imports {dotted}, which is not to its left")
    return faults


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes below `node` that run when the module is imported: not in functions, not for types only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            child = ast.Module(body=child.orelse, type_ignores=[])
        yield child
        yield from run_at_import(child)


def init_faults(package: Path) -> list[str]:
    """Imports of the package's own `__init__` that run when it is imported, the standard library apart."""
    path = package / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return [
        f"__init__.py: imports {target} at once; import it in a function"
        for node in run_at_import(tree)
        for target in imported("__init__.py", node)
        if target.split(".")[0] not in sys.stdlib_module_names
    ]


def library_faults(package: Path) -> list[str]:
    """Libraries imported outside their homes."""
    faults = []
    for name, tree in modules(package):
        for line, dotted in imports(name, tree):
            homes = HOMES.get(dotted.split(".")[0])
            if homes is not None and name not in homes and part_of(name) not in homes:
                faults.append(f"{name}:{line}: imports {dotted}; its place is {', '.join(homes)}")
    return faults


def danger_faults(package: Path) -> list[str]:
    """Whatever could run code that a checkpoint carries: unpickling, torch.load, remote code.

    Only code counts for the word pickle: a message may tell a user why a pickle is refused.
    """
    faults = []
    for name, tree in modules(package):
        text = (package / name).read_text(encoding="utf-8")
        found = {(0, phrase) for phrase in ("torch.load(", "trust_remote_code=True") if phrase in text}
        for line, dotted in imports(name, tree):
            if dotted.split(".")[0] in UNPICKLERS or dotted == "torch.load":
                found.add((line, dotted))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (node.attr in UNPICKLERS or ast.unparse(node) == "torch.load"):
                found.add((node.lineno, ast.unparse(node)))
            elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    found.add((node.value.lineno, f"{node.arg}={ast.unparse(node.value)}"))
            elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
                found.add((node.lineno, "trust_remote_code"))
        faults += [f"{name}:{line}: {what}" for line, what in sorted(found)]
    return faults


def length_faults(root: Path) -> list[str]:
    """Source files of postnas/, tests/ and benchmarks/ that are too long; results (json) are data."""
    faults = []
    for folder in ("postnas", "tests", "benchmarks"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SOURCES:
                lines = len(path.read_text(encoding="utf-8").splitlines())
                if lines > LONGEST:
                    faults.append(f"{path.relative_to(root).as_posix()}: {lines} lines, {LONGEST} at most")
    return faults


def test_imports_run_one_way() -> None:
    assert arrow_faults(PACKAGE) == []


def test_libraries_stay_at_home() -> None:
    assert library_faults(PACKAGE) == []


def test_nothing_unpickles_or_runs_remote_code() -> None:
    assert danger_faults(PACKAGE) == []


def test_files_are_short() -> None:
    assert length_faults(ROOT) == []


def test_package_init_imports_only_in_functions() -> None:
    assert init_faults(PACKAGE) == []


def test_import_postnas_loads_no_heavy_library() -> None:
    program = "import sys, postnas; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root / "postnas"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.py", "from postnas.models.config import HybridConfig"),
        ("data.py", "import postnas.search"),
        ("data.py", "from postnas import blocks"),
        ("data.py", "def late():\n    from postnas.pipeline import run"),
        ("data.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import postnas.blocks"),
        ("data.py", "import importlib\nimportlib.import_module('postnas.report')"),
        ("data.py", "from . import models"),
        ("data.py", "import postnas"),
        ("data.py", "from postnas import convert"),
        ("blocks/jet.py", "from ..models import config"),
        ("train/loop.py", "from postnas.generate.engine import Engine"),
        ("generate/engine.py", "from postnas.train import losses"),
        ("evaluate/suite.py", "from postnas.train import losses"),
        ("train/loop.py", "from postnas.evaluate import perplexity"),
        ("report/html.py", "from postnas.export import gguf"),
        ("errors.py", "from postnas.files import write_text"),
        ("utils.py", ""),
    ],
)
def test_arrow_check_sees(tmp_path: Path, name: str, text: str) -> None:
    assert len(arrow_faults(write_tree(tmp_path, {f"postnas/{name}": text}))) == 1


def test_arrow_check_lets_the_left_pass(tmp_path: Path) -> None:
    files = {
        "postnas/__init__.py": "def convert():\n    from postnas.models.convert import convert",
        "postnas/__main__.py": "from postnas.commands import table",
        "postnas/sources.py": "from postnas.errors import UserError\nfrom postnas import __version__, files",
        "postnas/evaluate/suite.py": "from postnas.generate import engine\nfrom .recall import copy\nimport torch",
        "postnas/search/scores.py": "import postnas.train.align\nfrom ..evaluate import perplexity",
        "postnas/models/llama/names.py": "from ... import ops\nfrom ..config import HybridConfig",
    }
    assert arrow_faults(write_tree(tmp_path, files)) == []


def test_library_check_sees_strays_and_lets_homes_pass(tmp_path: Path) -> None:
    files = {
        "postnas/__init__.py": "def load():\n    from transformers import AutoConfig",
        "postnas/data.py": "from transformers import AutoTokenizer",
        "postnas/models/model.py": "import transformers.modeling_utils",
        "postnas/ops/conv.py": "def late():\n    import fla.ops",
        "postnas/ops/fla.py": "from fla.ops.gated_delta_rule import chunk_gated_delta_rule",
        "postnas/blocks/jet.py": "from postnas.ops.fla import gated_delta_rule",
        "postnas/search/plan.py": "import matplotlib.pyplot as plt",
        "postnas/report/plots.py": "import matplotlib.pyplot as plt",
    }
    faults = library_faults(write_tree(tmp_path, files))
    assert [fault.split(":")[0] for fault in faults] == ["__init__.py", "ops/conv.py", "search/plan.py"]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch import load",
        "import torch\nread = torch.load",
        "# torch.load(path) would do",
        "import torch\ntorch.serialization.pickle",
        "make(trust_remote_code=flag)",
        "make(**{'trust_remote_code': 1})",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "import importlib\nimportlib.import_module('dill')",
    ],
)
def test_danger_check_sees(tmp_path: Path, text: str) -> None:
    assert len(danger_faults(write_tree(tmp_path, {"postnas/data.py": text}))) == 1


def test_danger_check_lets_prose_pass(tmp_path: Path) -> None:
    text = '"""A pickle is refused."""\nmake(trust_remote_code=False, allow_pickle=False)\n'
    assert danger_faults(write_tree(tmp_path, {"postnas/data.py": text})) == []


def test_length_check_sees_long_sources_only(tmp_path: Path) -> None:
    files = {
        "postnas/data.py": "x = 1\n" * (LONGEST + 1),
        "tests/test_data.py": "x = 1\n" * LONGEST,
        "benchmarks/results/a.json": "0\n" * (LONGEST + 1),
    }
    write_tree(tmp_path, files)
    assert length_faults(tmp_path) == [f"postnas/data.py: {LONGEST + 1} lines, {LONGEST} at most"]


def test_init_check_sees_eager_imports_only(tmp_path: Path) -> None:
    text = (
        "import os\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from postnas.models import convert\n"
        "else:\n    import torch\ntry:\n    import postnas.errors\nfinally:\n    pass\n"
        "def load():\n    import transformers\nif os.name:\n    def late():\n        import datasets\n"
    )
    faults = init_faults(write_tree(tmp_path, {"postnas/__init__.py": text}))
    assert [fault.split()[2] for fault in faults] == ["torch", "postnas.errors"]
