"""Adds our code to a model folder, so that diffusers loads it where this package is missing.

diffusers executes ``pipeline.py`` of a folder, and ``models.py`` of each component's, when it is
told ``trust_remote_code=True``. Both are made from this package's own sources: the modules that the
class needs, one after another in one file, without the imports between them.
"""

import ast
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from ksr_distill.inference.enlarging import MODELS

PACKAGE = "ksr_distill"
INDEX = "model_index.json"

HEADER = '''"""{what} in one file, made from the package ksr_distill (Apache-2.0).

    DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
"""

'''

SHAPES = '''
class _Shaped:
    """Stands in for jaxtyping's annotations: Float[Tensor, "b c"] is a Tensor."""

    def __class_getitem__(cls, array_and_shape):
        return array_and_shape[0]


{names} = _Shaped
'''


LOOSER_TYPES = """

# The networks come from models.py: the same classes, but not this file's, and diffusers would warn.
for _component in {components}:
    {class_name}.__init__.__annotations__[_component] = ModelMixin
"""


def add_code(folder: Path) -> None:
    """Add ``pipeline.py`` and each component's ``models.py``, and name them in the index.

    Args:
        folder: A folder of KSRFlashPipeline or KSRTeacherPipeline.
    """
    index_file = folder / INDEX
    index = json.loads(index_file.read_text())
    class_name = index["_class_name"]
    pipeline_module = home_of("ksr_distill.inference", class_name)
    components = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and value[0] == MODELS
    }
    looser = LOOSER_TYPES.format(components=tuple(components), class_name=class_name)
    pipeline = one_file([pipeline_module], what=class_name) + looser
    (folder / "pipeline.py").write_text(pipeline)
    # One text for all: diffusers copies every component's file to one and the same name.
    modules = sorted({home_of(MODELS, model_class) for model_class in components.values()})
    models = one_file(modules, what="The networks")
    for name, model_class in components.items():
        (folder / name / "models.py").write_text(models)
        index[name] = ["models", model_class]
    index["_class_name"] = ["pipeline", class_name]
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def one_file(modules: list[str], *, what: str) -> str:
    """Return modules of this package, and those that they need, as the source of one file.

    Raises:
        ValueError: If two of them use one name at their top level for different things.
    """
    sections: dict[str, str] = {}
    external: set[tuple[str, str]] = set()
    definitions: dict[str, tuple[str, str]] = {}
    for module in in_order(modules):
        source = _source(module)
        tree = ast.parse(source)
        sections[module] = _without_imports(source, tree)
        external.update(_external_imports(tree))
        for name, definition in _definitions(tree):
            other, same = definitions.setdefault(name, (module, definition))
            if definition != same:
                raise ValueError(
                    f"{other} and {module} both define {name}, and one file cannot hold both; "
                    "rename one of them"
                )
    shaped = sorted(name for module, name in external if module == "jaxtyping")
    shapes = SHAPES.format(names=" = ".join(shaped)) if shaped else ""
    body = "\n\n".join(f"# {name}\n\n\n{text}" for name, text in sections.items())
    return HEADER.format(what=what) + _import_lines(external) + shapes + "\n\n" + body


def in_order(modules: list[str]) -> list[str]:
    """Return the modules and all of ours that they import, each after what it needs."""
    ordered: list[str] = []

    def visit(module: str) -> None:
        if module in ordered:
            return
        for needed, _, _ in _own_imports(ast.parse(_source(module))):
            visit(needed)
        ordered.append(module)

    for module in modules:
        visit(module)
    return ordered


def home_of(package: str, name: str) -> str:
    """Return the module that defines what a package's ``__init__`` offers."""
    module = import_module(package)
    if not hasattr(module, "__path__"):
        return package
    return getattr(module, name).__module__


def _source(module: str) -> str:
    file = import_module(module).__file__
    if file is None:
        raise ValueError(f"{module} has no source file, so its code cannot be added")
    return Path(file).read_text(encoding="utf-8")


def _own_imports(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (module, name, local name) of what comes from this package."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGE):
            for alias in node.names:
                home = home_of(str(node.module), alias.name)
                yield home, alias.name, alias.asname or alias.name


def _external_imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what comes from elsewhere; no name where the module is imported."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((ast.unparse(alias), "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(PACKAGE):
            yield from ((str(node.module), ast.unparse(alias)) for alias in node.names)


def _import_lines(external: set[tuple[str, str]]) -> str:
    plain = sorted(module for module, name in external if not name)
    modules = sorted({module for module, name in external if name} - {"jaxtyping"})
    names = {m: sorted(name for module, name in external if module == m and name) for m in modules}
    lines = [f"import {module}" for module in plain]
    lines += [f"from {module} import {', '.join(names[module])}" for module in modules]
    return "\n".join(lines) + "\n\n"


def _without_imports(source: str, tree: ast.Module) -> str:
    """Return the text without docstring and imports; names imported as others become aliases."""
    lines: list[str | None] = list(source.splitlines())
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or node is _docstring(tree):
            lines[node.lineno - 1 : node.end_lineno] = [None] * (
                (node.end_lineno or node.lineno) - node.lineno + 1
            )
    aliases = [f"{local} = {name}" for _, name, local in _own_imports(tree) if local != name]
    text = "\n".join(line for line in lines if line is not None).strip()
    return "\n".join([*aliases, "", "", text] if aliases else [text]) + "\n"


def _docstring(tree: ast.Module) -> ast.stmt | None:
    first = tree.body[0] if tree.body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first if is_text else None


def _definitions(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each name of the top level with what it stands for."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, ast.unparse(node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield ast.unparse(target), ast.unparse(node)
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), ast.unparse(node)
