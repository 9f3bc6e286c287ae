"""Prints the size of the product, and the files and functions that exceed the limits.

python tests/house.py            # or: make house
python tests/house.py --check    # status 1 where a limit is exceeded
"""

import ast
import pathlib
import sys
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parent.parent
ORDER = ("configs", "vqvae", "prior", "pipelines", "vqbeam")  # each imports only from its left
LIMITS = {
    "product files": 110,
    "files in a folder": 12,
    "lines of code in a function": 45,
    "parameters of a function": 7,
    "imports to the right, or of pipelines.cli": 0,
}


def functions(tree: ast.Module, source: list[str]):
    """Yields name, lines of code and parameters of every function; methods without `self`.

    Lines of code are those of the body that are neither blank, comment nor docstring. Keras layers
    take their whole configuration as arguments, so parameters of constructors count as 0.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = source[body[0].lineno - 1 : node.end_lineno] if body else []
            code = sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
            names = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            starred = sum(argument is not None for argument in (node.args.vararg, node.args.kwarg))
            count = sum(name not in ("self", "cls") for name in names) + starred
            yield node.name, code, 0 if node.name == "__init__" else count


def imports(tree: ast.Module):
    """Yields the modules below `vqbeam` that a file imports, without the `vqbeam.`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vqbeam"):
            inner = node.module.removeprefix("vqbeam").strip(".")
            yield from [inner] if inner else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("vqbeam.")
                for alias in node.names
                if alias.name.startswith("vqbeam.")
            )


def is_wrong(path: pathlib.Path, module: str) -> bool:
    """Tells whether an import goes to the right, or from the pipelines to the command line."""
    package, imported = path.parts[0], module.partition(".")[0]
    to_the_right = imported in ORDER and ORDER.index(imported) > ORDER.index(package)
    into_cli = module.startswith("pipelines.cli") and package == "pipelines"
    return to_the_right or (into_cli and path.parts[1] != "cli")


def main() -> int:
    """Prints the figures; returns the exit status."""
    paths = [
        p.relative_to(ROOT) for package in ORDER for p in sorted((ROOT / package).rglob("*.py"))
    ]
    texts = {path: (ROOT / path).read_text() for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    # Files that only say what a package holds are nothing to find.
    paths = [path for path in paths if len(trees[path].body) > 1]
    found = [
        (code, parameters, f"{path}:{name}")
        for path, tree in trees.items()
        for name, code, parameters in functions(tree, texts[path].splitlines())
    ]
    folders = Counter(str(path.parent) for path in paths)
    wrong = [
        f"{path} imports {module}"
        for path, tree in trees.items()
        for module in imports(tree)
        if is_wrong(path, module)
    ]
    figures = {
        "product files": len(paths),
        "files in a folder": max(folders.values()),
        "lines of code in a function": max(code for code, _, _ in found),
        "parameters of a function": max(parameters for _, parameters, _ in found),
        "imports to the right, or of pipelines.cli": len(wrong),
    }
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    print(f"product: {sum(text.count(chr(10)) for text in texts.values()):,} lines")
    print(f"tests:   {sum(text.count(chr(10)) for text in tests):,} lines")
    for folder, count in sorted(folders.items()):
        print(f"{count:>4}  {folder}")
    print("longest functions: " + ", ".join(f"{n} {c}" for c, _, n in sorted(found)[:-6:-1]))
    by_parameters = sorted(((p, name) for _, p, name in found), reverse=True)[:5]
    print("most parameters: " + ", ".join(f"{name} {count}" for count, name in by_parameters))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    for name, figure in figures.items():
        print(f"{name}: {figure} (limit {LIMITS[name]})")
    exceeded = [name for name, limit in LIMITS.items() if figures[name] > limit]
    for name in exceeded:
        print(f"{name}: {figures[name]} is above the limit of {LIMITS[name]}", file=sys.stderr)
    return int("--check" in sys.argv and bool(exceeded))


if __name__ == "__main__":
    sys.exit(main())
