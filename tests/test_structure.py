"""The direction of imports: a reader can take each layer for itself."""

import ast
import re
import statistics
from pathlib import Path

import timm_tokens

PACKAGE = Path(timm_tokens.__file__).parent
ALLOWED = {  # what may import what, inside the package
    "ops": {"ops", "distributed"},
    "distributed": set(),
    "losses": {"losses", "ops", "distributed"},
    "fewshot": {"fewshot", "ops", "distributed"},
    "data": {"data", "ops", "seeding", "files"},
    "probing": {"probing", "ops"},
    "timm_types": set(),  # everything may import it
    "rotary": set(),
    "blocks": {"rotary"},
    "hooks": set(),
    "tracing": set(),
    "meta_copy": set(),
    "keys": {"hooks", "outputs"},
    "parts": {"parts", "ops", "blocks", "hooks", "keys"},
    "flops": {"parts", "ops", "blocks", "classification", "last_block"},
    "loading": {"blocks"},
    "saving": {"blocks", "identity"},
    "protocol": {"blocks", "loading", "saving", "tracing", "parts"},
    "last_block": {"parts", "blocks", "hooks"},
    "driver": {"parts", "ops", "blocks", "hooks", "last_block", "rotary", "tracing"},
    "features": {"driver", "parts", "blocks"},
    "forward_type": {"features", "parts"},
    "classification": {"driver", "parts", "ops"},
    "drawing": {"drawing", "files"},
    "vit": {
        "driver",
        "features",
        "forward_type",
        "parts",
        "ops",
        "blocks",
        "classification",
        "flops",
        "meta_copy",
        "outputs",
        "protocol",
        "tracing",
        "hooks",
    },
    "dense": {"vit", "blocks", "driver"},
    "identity": {"distributed"},
    "merger_file": {"distributed", "identity", "parts", "files", "digests"},
    "hub": {"merger_file", "identity", "vit", "tables"},
    "wrap": {"vit", "parts", "ops", "blocks", "merger_file"},
    "models": {"models", "vit", "wrap", "parts", "protocol", "loading"},
    "seeding": set(),
    "files": set(),
    "tables": {"files"},
    "digests": set(),
    "outputs": set(),
    "recipes": set(),
    "options": set(),
    "startup": set(),
    "stopping": set(),
    "checkpoint_file": {"digests"},
    "weights": {"checkpoint_file", "loading"},
    "filling": {"loading"},
    "peers": {"distributed", "stopping"},
    "replay": {"classification", "blocks", "driver", "features", "outputs", "vit"},
    "tradeoff": {"classification", "driver", "features", "flops", "merger_file", "outputs", "parts", "tables", "vit"},
    "calibration": {"flops", "losses", "merger_file", "ops", "outputs", "replay", "vit"},
    "tasks": {
        "tasks",
        "meta_copy",
        "vit",
        "wrap",
        "outputs",
        "parts",
        "blocks",
        "losses",
        "ops",
        "distributed",
        "data",
        "seeding",
    },
    "training": {
        "training",
        "ops",
        "probing",
        "tasks",
        "data",
        "distributed",
        "seeding",
        "files",
        "digests",
        "checkpoint_file",
        "options",
        "stopping",
        "peers",
        "losses",
        "outputs",
        "vit",
    },
}
FILES = [
    f for f in PACKAGE.rglob("*.py") if f.relative_to(PACKAGE).parts[0] not in ("cli", "__init__.py", "__main__.py")
]


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        if isinstance(node, ast.ImportFrom) and node.module == "timm_tokens":
            modules = [f"timm_tokens.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        yield from (m for m in modules if m)


def test_imports_point_inwards():
    for file in FILES:
        layer, imported = file.relative_to(PACKAGE).parts[0].removesuffix(".py"), list(imports(file))
        own = {m.split(".")[1] for m in imported if m.startswith("timm_tokens.")} - {"timm_types"}
        assert own <= ALLOWED[layer], f"{file} imports {sorted(own - ALLOWED[layer])}"
        if layer in ("ops", "distributed", "probing"):
            roots = {m.split(".")[0] for m in imported}
            assert not roots & {"timm", "torchvision", "numpy"}, file


def lengths(node):
    return [
        (each.end_lineno - each.lineno + 1, each.name)
        for each in ast.walk(node)
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_files_and_functions_stay_short():
    files = {file: file.read_text() for file in PACKAGE.rglob("*.py")}
    lines = {file: len(text.splitlines()) for file, text in files.items()}
    functions = [(count, name, file) for file, text in files.items() for count, name in lengths(ast.parse(text))]
    assert {str(file): count for file, count in lines.items() if count > 250} == {}
    assert [function for function in functions if function[0] > 45] == []
    assert statistics.median(lines.values()) <= 90 and statistics.median(count for count, *_ in functions) <= 8


def test_docstrings_have_a_line_for_each_argument():
    """Of two on a line the reference pages show the first alone."""
    for node in (node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))):
        documented = isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", documented or "", re.MULTILINE)
        entries = re.findall(r"^    (?! )(.*)", section[1], re.MULTILINE) if section else []
        for entry in entries:
            two = re.search(r"[.;] (?!None|False|True)\w+: ", entry)
            assert re.match(r"\*?\w+: ", entry) and not two, f"{node.name}: {entry}"
