"""Random calls of every op on every backend, under the transforms and in the memory that programs have."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from po_kernels.backends.contract import OPS
from tests.ops.cases import FAST

from .calls import Call, calls

EXAMPLES = 5 if FAST else 40


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("op", OPS)
def test_calls(op):
    torch.set_num_threads(1)

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    @given(st.data())
    def run(data):
        call: Call = data.draw(calls(op))
        call.check()

    run()
