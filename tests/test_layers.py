"""The order of the layers, read from the imports: a lower one never knows a higher one."""

import ast
import re
from pathlib import Path

import po_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "po_kernels"


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> set[str]:
    """Absolute names of all modules, and of what is taken from them, that a file imports anywhere."""
    module = module_of(path, root)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found
    return found


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def foreign(path: Path, *allowed: str) -> set[str]:
    """Imports from the package other than `allowed`."""
    return {name for name in imports_of(path, ROOT) if within(name, "po_kernels") and not within(name, *allowed)}


def test_backends_import_their_own_folder_and_what_all_share():
    shared = {path.stem for path in (PACKAGE / "backends").glob("*.py")} - {"__init__"}
    assert "contract" in shared
    common = [f"po_kernels.backends.{name}" for name in shared]
    folders = [folder for folder in (PACKAGE / "backends").iterdir() if (folder / "__init__.py").exists()]
    assert {folder.name for folder in folders} == set(po_kernels.dispatch.BACKENDS)
    for folder in folders:
        for path in files(folder):
            allowed = (f"po_kernels.backends.{folder.name}", "po_kernels.extension", *common)
            assert not foreign(path, *allowed), path
    for name in shared:
        assert not foreign(PACKAGE / "backends" / f"{name}.py", *common), name


def test_dispatch_imports_no_op():
    assert not foreign(PACKAGE / "dispatch.py", "po_kernels.backends")
    assert "po_kernels.ops" not in (PACKAGE / "dispatch.py").read_text()


def test_ops_import_no_backend():
    for path in files(PACKAGE / "ops"):
        tables = ("po_kernels.backends.contract", "po_kernels.backends.advantages")
        assert not foreign(path, "po_kernels.ops", "po_kernels.dispatch", *tables), path


def test_the_extension_loader_imports_nothing_of_the_package():
    assert not foreign(PACKAGE / "extension.py")


def test_po_kernels_knows_nothing_above_it():
    for path in files(PACKAGE):
        above = {name for name in imports_of(path, ROOT) if within(name, "po_bilevel", "benchmarks", "tests")}
        assert not above, path


def test_po_bilevel_uses_what_is_public():
    public = set(po_kernels.__all__) | {"__version__"}
    for path in files(ROOT / "python" / "po_bilevel"):
        tree = ast.parse(path.read_text())
        names = {name for name in imports_of(path, ROOT / "python") if within(name, "po_kernels")}
        assert names <= {"po_kernels", *(f"po_kernels.{name}" for name in public)}, path
        aliases = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name == "po_kernels"
        }
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
        }
        assert used <= public, path


def test_po_bilevel_imports_nothing_of_its_peers():
    for path in files(ROOT / "python" / "po_bilevel"):
        peers = ("hypergrad", "betty", "torchopt", "jaxopt", "jax")
        assert not {name for name in imports_of(path, ROOT / "python") if within(name, *peers)}, path


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in (".hpp", ".h", ".cpp", ".cu", ".cuh")]
    assert found
    return found


PYTHON = re.compile(r"^(Python\.h|pybind11/|torch/|ATen/|c10/|pyconfig\.h|numpy/)")
INTRINSICS = re.compile(r"(intrin\.h|arm_neon\.h|arm_sve\.h|cpuid\.h|altivec\.h)$")


def test_python_and_torch_are_known_to_the_bindings_only():
    for path in sources(ROOT / "csrc"):
        if "bindings" not in path.relative_to(ROOT / "csrc").parts:
            assert not [name for name in includes_of(path) if PYTHON.search(name)], path
        assert not [name for name in includes_of(path) if re.match(r"(torch|ATen|c10)/", name)], path


def test_shared_headers_fit_any_processor():
    for path in sources(ROOT / "csrc" / "include"):
        assert not [name for name in includes_of(path) if INTRINSICS.search(name)], path
        inner = [name for name in includes_of(path) if name.split("/")[0] in ("cpu", "cuda", "bindings")]
        assert not inner, path


def test_kernels_of_the_cpu_and_of_cuda_know_nothing_of_each_other():
    for folder, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in sources(ROOT / "csrc" / folder):
            assert not [name for name in includes_of(path) if name.split("/")[0] == other], path


def test_headers_of_cuda_are_known_to_what_nvcc_compiles_only():
    for path in sources(ROOT / "csrc"):
        if path.suffix != ".cu" and path != ROOT / "csrc" / "cuda" / "device.hpp":
            assert not [name for name in includes_of(path) if re.match(r"cuda\w*\.h$", name)], path
