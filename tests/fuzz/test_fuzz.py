"""Random calls of every op on every backend, under the transforms and in the memory that programs have."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from po_kernels.backends.contract import OPS
from tests.ops.cases import FAST

from .calls import Call, calls

EXAMPLES = 5 if FAST else 60


# Torch warns of its own doings once in a process, which no second run of a call could repeat.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("op", OPS)
def test_calls(op):
    torch.set_num_threads(1)

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    @given(calls(op))
    def run(call: Call):
        call.check()

    run()
