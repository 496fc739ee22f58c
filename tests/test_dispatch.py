"""Which backend serves a call, how one is asked for, and what the package says about itself."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import po_kernels as pk
from po_kernels import dispatch, extension

MEAN, LOG_STD = torch.zeros(2, 3), torch.zeros(3)


@pytest.fixture(autouse=True)
def no_backend_asked_for(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


def usable() -> list[str]:
    return [name for name in dispatch.BACKENDS if refusal(name) is None]


def refusal(name: str) -> str | None:
    return dispatch.refusal("gaussian_policy_loss", name, "cpu", torch.float32)


def selected(backend: str | None = None) -> str:
    return dispatch.select("gaussian_policy_loss", "cpu", torch.float32, backend)


def loss(**options):
    return pk.gaussian_policy_loss(MEAN, LOG_STD, MEAN, 1.0, **options)


def test_the_first_that_can_serve_is_chosen():
    assert selected() == usable()[0]
    loss()
    decision = dispatch.decisions()["gaussian_policy_loss", "cpu", torch.float32]
    assert decision.backend == usable()[0]
    before = dispatch.BACKENDS[: dispatch.BACKENDS.index(decision.backend)]
    assert decision.refused == {name: refusal(name) for name in before}


def test_every_usable_backend_by_name():
    for name in usable():
        assert selected(name) == name
        assert torch.allclose(loss(backend=name), loss(backend="reference"))


def test_use_backend():
    default = selected()
    for name in usable():
        with pk.use_backend(name):
            assert selected() == name
            with pk.use_backend("reference"):
                assert selected() == "reference"
                assert selected(name) == name
            assert selected() == name
            with pytest.raises(KeyError), pk.use_backend("reference"):
                raise KeyError
            assert selected() == name
        assert selected() == default


def test_use_backend_is_of_one_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, pk.use_backend("reference"):
        assert pool.submit(selected).result() == usable()[0]
        assert selected() == "reference"


def test_environment_variable(monkeypatch):
    for name in usable():
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, name)
        assert selected() == name
        with pk.use_backend("reference"):
            assert selected() == "reference"
        assert selected("reference") == "reference"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "")
    assert selected() == usable()[0]


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"^use_backend: .*'native'.*got 'fast'"), pk.use_backend("fast"):
        pass
    with pytest.raises(ValueError, match=r"^gaussian_policy_loss: backend: .*got 'fast'"):
        loss(backend="fast")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"^gaussian_policy_loss: PO_KERNELS_BACKEND: .*got 'fast'"):
        loss()
    assert selected("reference") == "reference"


def test_a_backend_that_cannot_serve_raises(monkeypatch):
    """The two for CUDA never serve a tensor on the CPU."""
    for name in ("cuda", "triton"):
        reason = refusal(name)
        assert reason
        for call in (lambda n=name: loss(backend=n), lambda: loss()):
            with pk.use_backend(name), pytest.raises(RuntimeError) as raised:
                call()
            message = str(raised.value)
            assert message.startswith("gaussian_policy_loss: ")
            assert repr(name) in message
            assert reason in message
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, name)
        with pytest.raises(RuntimeError, match=r"PO_KERNELS_BACKEND"):
            loss()
        monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE)


def test_every_op_names_itself_when_a_backend_cannot_serve():
    with pytest.raises(RuntimeError, match=r"^group_advantage: "):
        pk.group_advantage(torch.ones(2, 3), backend="triton")
    with pytest.raises(RuntimeError, match=r"^categorical_sample: "):
        pk.categorical_sample(torch.ones(2, 3), 4, backend="triton")


def test_status():
    loss()
    status = pk.status()
    assert status["version"] == pk.__version__
    assert status["torch"] == torch.__version__
    assert status["backends"].keys() == set(dispatch.BACKENDS)
    assert status["backends"]["reference"] is None
    assert all(reason is None or reason for reason in status["backends"].values())
    assert status["decisions"]["gaussian_policy_loss on cpu in float32"]["backend"] == usable()[0]
    assert status["build"] == extension.build
    if extension.module is None:
        assert status["simd"] is None
        assert status["backends"]["native"] == extension.missing
    else:
        assert status["simd"] == extension.module.simd_level()
        assert status["simd"] in status["build"]["simd"]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_backend_that_the_suite_needs_is_missed():
    environment = {**os.environ, "PO_KERNELS_EXTENSION": "OFF", "PO_KERNELS_TEST_BACKENDS": "reference,native"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "PO_KERNELS_TEST_BACKENDS: native has to be there, but PO_KERNELS_EXTENSION=OFF" in done.stderr


def test_report():
    report = run("-m", "po_kernels")
    assert report.startswith(f"po-kernels {pk.__version__}")
    for name in dispatch.BACKENDS:
        assert name in report


def test_the_extension_needs_no_torch():
    if extension.module is None:
        assert extension.missing
        assert pk.status()["backends"]["native"] == extension.missing
        return
    program = """
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("po_kernels._native", sys.argv[1])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert "torch" not in sys.modules
        print(module.simd_level())
    """
    level = run("-c", textwrap.dedent(program), extension.module.__file__).strip()
    assert level == extension.module.simd_level()


def test_shapes_for_which_cuda_was_measured_to_be_faster(monkeypatch):
    """Nobody asked for a backend, and the call is of a class that was measured: its op, dtype and size."""
    monkeypatch.setattr(dispatch, "_cuda_serves", lambda op: True)
    least = dispatch.module("cuda").MEASURED["faster"]["gaussian_policy_loss"]
    size, group = (least["rows"], least["dim"]), least["num_samples"]

    def chosen(op="gaussian_policy_loss", size=size, group=group, backend=None, dtype=torch.float32, name="triton"):
        return dispatch.by_shape(op, name, backend, [torch.empty(size, dtype=dtype, device="meta")], group)

    assert chosen() == "cuda"
    others = (
        {"op": "gaussian_log_prob"}, {"size": (size[0] - 1, size[1])}, {"size": (size[0], size[1] + 1)},
        {"group": group - 1}, {"backend": "triton"}, {"dtype": torch.float64},
    )  # fmt: skip
    for changes in others:
        assert chosen(**changes) == "triton", changes
    assert chosen(name="reference") == "reference"
    monkeypatch.setattr(dispatch, "_cuda_serves", lambda op: False)
    assert chosen() == "triton"
