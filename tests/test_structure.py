"""The rooms of DESIGN.md: who may import whom, what stays lazy, and that the README's file map tells the truth."""

import ast
import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Bottom to top: a room imports itself, rooms named here, and nothing else of the project.
ROOMS: dict[str, set[str]] = {
    "switch_kernels": set(),
    "plain": set(),
    "bundled": set(),
    "models": {"switch_kernels"},
    "files": set(),
    "runs": {"models", "plain", "files"},
    "activations": {"files"},
    "metrics": {"models", "activations"},
    "interop": {"models"},
    "analysis": {"models", "metrics", "activations"},
    "evaluation": {"metrics", "models", "activations"},
    "engines": {"models", "switch_kernels"},
    "training": {"models", "runs", "metrics", "engines", "switch_kernels"},
    "memory": {"training"},
    "progress": {"training"},
    "wandb_logger": set(),
    "config": {"switch_kernels", "activations", "models", "plain", "runs", "training", "wandb_logger"},
    "pipeline": {
        *(
            "switch_kernels",
            "config",
            "training",
            "evaluation",
            "activations",
            "analysis",
            "metrics",
            "models",
            "runs",
            "memory",
            "progress",
            "wandb_logger",
        ),
    },
    "report": {"runs", "metrics", "models", "analysis", "evaluation"},
    "sweep": {
        *("switch_kernels", "config", "training", "models", "runs", "files", "plain", "memory", "pipeline", "progress", "wandb_logger", "report"),
    },
    "switch_sae": {"models", "runs"},
}
# What a module may import when it is loaded, beyond the standard library. Everything else waits inside the function that needs it.
ALWAYS = {"torch", "numpy", "safetensors"}
AT_IMPORT = {"switch_kernels": {"torch", "triton"}, "progress": ALWAYS | {"tqdm"}}
LAZY = ("hydra", "omegaconf", "transformer_lens", "transformers", "datasets", "wandb", "matplotlib", "tqdm", "scipy", "sklearn", "pandas", "pyarrow")


def modules() -> list[Path]:
    return sorted([*(ROOT / "switch_sae").rglob("*.py"), *(ROOT / "kernels" / "switch_kernels").rglob("*.py")])


def room_of(name: str) -> str:
    """The room of a dotted module name of the project."""
    parts = name.split(".")
    return parts[1] if parts[0] == "switch_sae" and len(parts) > 1 else parts[0]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imported modules and members; `from switch_sae import runs` gives switch_sae.runs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: a relative import hides which room it enters"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[str]:
    """As `imported`, only what runs when the module is loaded."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def violations(source: str, name: str) -> list[str]:
    """What a module called `name` imports against the tables above."""
    tree, room = ast.parse(source), room_of(name)
    if room not in ROOMS:
        return [f"{name} is in no room of the table"]
    found = []
    for target in imported(tree):
        if target.split(".")[0] in ("switch_sae", "switch_kernels") and room_of(target) in ROOMS and room_of(target) not in {room, *ROOMS[room]}:
            found.append(f"{name} imports {target}: {room} may import {', '.join(sorted(ROOMS[room])) or 'no other room'}")
        if target.split(".")[0] in ("experiments", "tests", "hydra", "omegaconf"):
            found.append(f"{name} imports {target}: that belongs to the command line")
    for target in at_import(tree):
        top = target.split(".")[0]
        if top not in sys.stdlib_module_names and top not in ("switch_sae", "switch_kernels") and top not in AT_IMPORT.get(room, ALWAYS):
            found.append(f"{name} imports {target} when it is loaded; import it inside the function that needs it")
    return found


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_a_module_imports_only_rooms_below_and_is_not_too_long(path):
    source = path.read_text()
    assert violations(source, dotted(path)) == []
    assert len(source.splitlines()) <= 400, "split it"


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("switch_sae.models.topk", "from switch_sae.training import Trainer", "models may import switch_kernels"),
        ("switch_sae.models.topk", "def f():\n    from switch_sae import runs", "models may import switch_kernels"),
        ("switch_kernels.encode", "import switch_sae.plain", "may import no other room"),
        ("switch_sae.training", "if not TYPE_CHECKING:\n    import wandb", "when it is loaded"),
        ("switch_sae.pipeline", "def f():\n    import hydra", "command line"),
        ("switch_sae.helpers", "", "no room of the table"),
    ],
)
def test_the_check_finds_what_it_is_for(name, source, complaint):
    assert len(found := violations(source, name)) == 1 and complaint in found[0]
    fine = "if TYPE_CHECKING:\n    import wandb\ndef f():\n    import wandb\n    from switch_sae.models import SAES"
    assert violations(fine, "switch_sae.training") == []


def test_the_table_has_no_way_up_and_every_room_exists():
    order = list(ROOMS)
    for room, below in ROOMS.items():
        assert below <= set(order[: order.index(room)]), f"{room} imports a room above it"
    future = {"interop"}
    assert {room_of(dotted(path)) for path in modules()} | future == set(ROOMS)


def test_kernels_is_a_source_root_and_not_a_package():
    """transformers imports any top-level module that is called `kernels` and has a version."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()] == ["switch_kernels"]


def python(code: str) -> str:
    """Runs `code` in a fresh interpreter at the repository root, whose folders are importable there."""
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_does_not_take_our_kernels_folder_for_a_package():
    out = python(
        "import importlib.util, transformers.utils\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(spec is None or spec.origin is None or 'site-packages' in spec.origin, transformers.utils.is_kernels_available())"
    )
    assert out.split()[0] == "True"
    assert out.split()[1] == str(installed("kernels"))


def installed(distribution: str) -> bool:
    return python(f"import importlib.metadata as m\nprint(any(d.metadata['Name'] == {distribution!r} for d in m.distributions()))").strip() == "True"


def test_importing_the_library_needs_and_loads_nothing_but_torch():
    out = python(
        f"""
import sys
import torch
before = set(sys.modules)  # torch itself loads some of them where they are installed
import switch_sae, switch_kernels
print(sorted((set(sys.modules) - before) & set({LAZY})))
"""
    )
    assert out.strip() == "[]"


def test_every_module_can_be_imported_where_the_optional_packages_are_missing():
    no_triton = importlib.util.find_spec("triton") is None  # as on macOS, where nothing imports its kernels
    names = [name for path in modules() if not ((name := dotted(path)).startswith("switch_kernels.gpu") and no_triton)]
    blocked = [name for name in LAZY if name != "tqdm"]  # the progress bar needs it
    out = python(
        f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
for name in {names}:
    importlib.import_module(name)
print(len({names}), set({blocked}) & set(sys.modules))
"""
    )
    assert out.split() == [str(len(names)), "set()"]


def file_map(readme: str) -> set[str]:
    """Paths in the fenced tree under the README's heading "File map" or "Where things are".

    Folders end with "/", and indentation or tree lines nest. A line starts with a name; words after it are names too as long as they look like
    paths (`runs.py`, `conf/`), and a description from the first that does not. Raises ValueError where there is no such tree.
    """
    found = re.search(
        r"^#+ [^\n]*(?:file map|where things are)[^\n]*\n(?:(?!^#).)*?^```[^\n]*\n(.*?)^```", readme, re.IGNORECASE | re.MULTILINE | re.DOTALL
    )
    if found is None:
        raise ValueError('README.md has no fenced tree under a heading with "File map" or "Where things are"')
    paths: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in found[1].splitlines():
        text = line.lstrip(" │├└─|`+-\t")
        first, *others = text.replace(",", " ").split() or [""]
        if not first:
            continue
        names = [first, *itertools.takewhile(re.compile(r"[\w./*-]*(/|\.\w+)").fullmatch, others)]
        indent = len(line) - len(text)
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        for name in names:
            paths.add(parent + name)
            if name.endswith("/"):
                folders.append((indent, parent + name))
    return paths


def test_the_readmes_file_map_names_what_exists_and_all_of_the_package():
    paths = file_map((ROOT / "README.md").read_text())
    missing = sorted(path for path in paths if not list(ROOT.glob(path.rstrip("/"))))
    assert not missing, f"the file map names {missing}, which do not exist"
    package = ROOT / "switch_sae"
    rooms = {f"switch_sae/{path.name}" for path in package.glob("*.py") if path.name != "__init__.py"}
    rooms |= {f"switch_sae/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert not (left_out := sorted(rooms - paths)), f"the file map leaves out {left_out}"


def test_file_maps_are_read_in_both_styles():
    plain = "# Where things are\ntext\n```\nswitch_sae/        the library\n  runs.py  plain.py  files and topk.py\n  models/\n    topk.py  # dense\nconf/  data\n```\n"
    lines = "## File map\n\n```text\nswitch_sae/\n├── runs.py, plain.py\n└── models/\n    └── topk.py\nconf/\n```\n"
    expected = {"switch_sae/", "switch_sae/runs.py", "switch_sae/plain.py", "switch_sae/models/", "switch_sae/models/topk.py", "conf/"}
    assert file_map(plain) == file_map(lines) == expected
    with pytest.raises(ValueError, match="no fenced tree"):
        file_map("# Where things are\nnowhere\n# Other\n```\nx/\n```\n")
