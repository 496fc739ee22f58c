"""The launches of the CUDA C++ backend, as the PTX that nvcc compiles them to. `launches.cpp` is the host's part."""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from po_kernels import extension
from po_kernels.backends import cuda as backend
from po_kernels.backends.contract import OPS
from po_kernels.backends.cuda import kernels

from .calls import Calls
from .machine import Rules
from .memory import Memory

ROOT = Path(__file__).parents[2]
FAMILIES = ("gaussian", "mvn")


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    for tool in ("nvcc", "g++"):
        if shutil.which(tool) is None:
            return f"{tool} is not here"
    return None


@cache
def compiled() -> tuple[ModuleType, dict[str, str]]:
    """The host's part, and a text of PTX by the demangled name of its kernel; compiled again when sources change."""
    sources = sorted([*ROOT.glob("csrc/**/*.[hc]*"), Path(__file__).parent / "launches.cpp"])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "build" / "ptx" / digest
    folder.mkdir(parents=True, exist_ok=True)
    common = ["-std=c++17", "-DPK_LEVEL=kernels_cuda", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    include = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    to_do = {"launches.so": ["g++", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", *common, *include, sources[-1]]}
    for family in FAMILIES:
        source = ROOT / "csrc" / "cuda" / f"{family}.cu"
        to_do[f"{family}.ptx"] = ["nvcc", "-ptx", "-arch=compute_80", "--expt-relaxed-constexpr", *common, source]
    started = {
        name: subprocess.Popen([*command, "-o", folder / f"{name}.part"])
        for name, command in to_do.items()
        if not (folder / name).exists()
    }
    for name, process in started.items():
        if process.wait():
            raise RuntimeError(f"{to_do[name][0]} failed, see above")
        (folder / f"{name}.part").rename(folder / name)
    spec = importlib.util.spec_from_file_location("launches", folder / "launches.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = {}
    for family in FAMILIES:
        head, *each = re.split(r"(?m)^(?=\.visible \.entry )", (folder / f"{family}.ptx").read_text())
        texts |= {f"{module.demangled(text.split()[2].rstrip('('))} {family}": head + text for text in each}
    return module, texts


class _Kernel(kernels._Kernel):
    """Keeps what a call allocates."""

    def _prepared(self, request: Any) -> Any:
        arguments, outputs, keep = super()._prepared(request)
        self.outputs, self.keep = outputs, keep
        return arguments, outputs, keep


class CudaCalls(Calls):
    backend = backend
    rules = Rules(padded=True)  # tiles of four dimensions

    def serve(self, request: Any, op: str) -> Any:
        module, texts = compiled()
        kernel, partial_sums = _Kernel(OPS[op]), []
        empty = torch.empty

        def allocated(*given: Any, **named: Any) -> torch.Tensor:
            partial_sums.append(self.as_fresh(empty)(*given, **named))
            return partial_sums[-1]

        def launched(**arguments: Any) -> tuple[str, str]:
            refused, launches = getattr(module, f"cuda_{op}")(**arguments)
            inputs = [request.inputs, request.constants, request.tangents or ()]
            known = [x for each in inputs for x in each]
            known += [request.cotangent, request.cotangent_tangent, *kernel.keep, *partial_sums]
            known = [x for x in known if isinstance(x, torch.Tensor)]
            for x in kernel.outputs:
                if x is not None:
                    if all(x.data_ptr() != other.data_ptr() for other in known):
                        self.fresh[x.data_ptr()] = x, None
                    known.append(x)
            for name, parameter, blocks, threads, shared in launches:
                memory = Memory()
                for x in known:
                    self.add(memory, x)
                family = op.split("_")[0]
                (text,) = {
                    text
                    for key, text in texts.items()
                    if name.replace(">>", "> >") in key.replace(">>", "> >") and key.endswith(family)
                }
                self.launch(text, threads, memory, (blocks,), parameter, shared)
            return refused, ""

        stub = ModuleType("stub")
        setattr(stub, f"cuda_{op}", launched)
        with mock.patch.object(extension, "module", stub), mock.patch.object(torch, "empty", allocated):
            return kernel(request)
