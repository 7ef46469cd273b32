"""The rooms of docs/rooms.md: who may import whom, what stays lazy, and that this page and the README's file map tell the truth."""

import ast
import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from switch_sae.models import ROUTERS, SAES

ROOT = Path(__file__).resolve().parents[1]

PAGE = ROOT / "docs" / "rooms.md"


def table(heading: str) -> list[list[str]]:
    """Cells of the Markdown table under a heading of docs/rooms.md, without its header."""
    part = PAGE.read_text().split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return rows[2:]


# Bottom to top: a room imports itself, rooms named here, and nothing else of the project.
ROOMS: dict[str, set[str]] = {
    room.strip("`"): {name for cell in below for name in cell.split(", ") if name} for room, _, *below in table("Who may import whom, bottom to top")
}
# What a module may import when it is loaded, beyond the standard library. Everything else waits inside the function that needs it.
ALWAYS = {"torch", "numpy", "safetensors"}
AT_IMPORT = {"switch_kernels": {"torch", "triton", "numpy", "numba"}, "progress": ALWAYS | {"tqdm"}}
_HUGGING_FACE = ("transformer_lens", "transformers", "huggingface_hub", "datasets")
LAZY = ("hydra", "omegaconf", *_HUGGING_FACE, "wandb", "matplotlib", "tqdm", "scipy", "sklearn", "pandas", "pyarrow", "numba")


def modules() -> list[Path]:
    return sorted([*(ROOT / "switch_sae").rglob("*.py"), *(ROOT / "kernels" / "switch_kernels").rglob("*.py")])


def room_of(name: str) -> str:
    """The room of a dotted module name of the project."""
    parts = name.split(".")
    return parts[1] if parts[0] == "switch_sae" and len(parts) > 1 else parts[0]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted names of all imported modules and members; `from switch_sae import runs` gives switch_sae.runs; relative ones are in `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or package, f"line {node.lineno}: a relative import hides which room it enters"
            above = package[: len(package) + 1 - node.level] if node.level else ()
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


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
        ("switch_sae.models.topk", "from switch_sae.training import Trainer", "models may import checks, choices, invocation, rows, switch_kernels"),
        ("switch_sae.models.topk", "def f():\n    from switch_sae import runs", "models may import checks"),
        ("switch_kernels.encode", "import switch_sae.plain", "may import no other room"),
        ("switch_sae.training", "if not TYPE_CHECKING:\n    import wandb", "when it is loaded"),
        ("switch_sae.orchestrator", "def f():\n    import hydra", "command line"),
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
    assert {room_of(dotted(path)) for path in modules()} == set(ROOMS)


def test_what_can_be_added_says_where_and_the_table_is_there():
    rows = table("How to add")
    for what, file, line, needs in rows:
        for path in re.findall(r"`([\w/.]+NAME\.\w+)`", file):
            assert list((ROOT / path).parent.glob(f"*{Path(path).suffix}")), f"{what}: nothing is like {path}"
        if line:
            name, module = re.fullmatch(r"`(\w+)` in `([\w/.]+)`", line).groups()
            names = {target.id for node in ast.parse((ROOT / module).read_text()).body for target in assigned(node)}
            assert name in names, f"{what}: {module} assigns no {name}"
            assert needs
    assert {"an architecture", "a router", "an analysis", "a file format"} <= {row[0] for row in rows}


def assigned(node: ast.stmt) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target for target in targets if isinstance(target, ast.Name)]


def test_the_import_graph_of_experiments_has_no_circle_and_commands_are_short():
    graph = {}
    for path in (ROOT / "experiments").rglob("*.py"):
        names = imported(ast.parse(path.read_text()), path.relative_to(ROOT).parts[:-1]) if "notebooks" not in path.parts else ()
        graph[".".join(path.relative_to(ROOT).with_suffix("").parts)] = set(names)
    graph = {
        name: {other for other in graph if other != name and any(n == other or n.startswith(f"{other}.") for n in names)}
        for name, names in graph.items()
    }
    while leaves := [name for name, below in graph.items() if not below]:
        graph = {name: below - set(leaves) for name, below in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"
    shared = ("__init__", "__main__", "arguments", "compose", "command", "errors", "mistakes")  # what all commands have in common
    commands = {path.stem: len(path.read_text().splitlines()) for path in (ROOT / "experiments").glob("*.py") if path.stem not in shared}
    assert max(commands.values()) <= 110 and sum(commands.values()) <= 60 * len(commands), commands


@pytest.mark.parametrize("path", [path for path in modules() if "models" not in path.parts and path.is_relative_to(ROOT / "switch_sae")], ids=dotted)
def test_no_room_but_models_knows_an_architecture_or_a_router_by_name_or_class(path):
    classes = {cls.__name__ for table in (SAES, ROUTERS) for cls in table.values()}
    found = []
    for node in ast.walk(tree := ast.parse(path.read_text())):
        if isinstance(node, ast.Compare) and any(
            isinstance(c, ast.Constant) and c.value in (*SAES, *ROUTERS) for c in (node.left, *node.comparators)
        ):
            found.append(ast.unparse(node))
    found += [name for name in imported(tree) if name.rpartition(".")[2] in classes]
    assert not found or dotted(path) == "switch_sae", found  # the package gives its readers the two main classes


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
    names.remove("switch_kernels.pursuit_rows")  # likewise where numba is missing
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
    plain = "# Where things are\ntext\n```\nswitch_sae/        the library\n  runs.py  plain.py  files and topk.py\n"
    plain += "  models/\n    topk.py  # dense\nconf/  data\n```\n"
    lines = "## File map\n\n```text\nswitch_sae/\n├── runs.py, plain.py\n└── models/\n    └── topk.py\nconf/\n```\n"
    expected = {"switch_sae/", "switch_sae/runs.py", "switch_sae/plain.py", "switch_sae/models/", "switch_sae/models/topk.py", "conf/"}
    assert file_map(plain) == file_map(lines) == expected
    with pytest.raises(ValueError, match="no fenced tree"):
        file_map("# Where things are\nnowhere\n# Other\n```\nx/\n```\n")
