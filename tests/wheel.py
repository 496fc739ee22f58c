"""What a wheel has to have, run by cibuildwheel where one was installed, with no compiler: python tests/wheel.py."""

import platform

import po_bilevel
import torch

import po_kernels as pk


def main() -> None:
    state = pk.status()
    assert state["backends"]["native"] is None, state["backends"]["native"]
    assert state["build"]["cuda"] == "", state["build"]
    chosen_at_run_time = ["x86-64-v3", "x86-64-v4"] if platform.machine() in ("x86_64", "AMD64") else []
    assert state["build"]["simd"] == ["default", *chosen_at_run_time], state["build"]
    gradients = []
    for backend in ("native", "reference"):
        mean, log_std = (x.clone().requires_grad_() for x in torch.linspace(-1.0, 1.0, 70).reshape(2, 5, 7))
        with pk.use_backend(backend):
            target = mean.detach() + 1.0
            loss = pk.gaussian_policy_loss(mean, log_std, target, 2.0, estimator="dice", num_samples=8, seed=1)
        gradients.append(torch.autograd.grad(loss, (mean, log_std)))
    torch.testing.assert_close(*gradients)
    assert po_bilevel.__version__ == pk.__version__ == state["version"]
    print(f"po-kernels {pk.__version__} for {platform.platform()} runs at {state['simd']}")


if __name__ == "__main__":
    main()
