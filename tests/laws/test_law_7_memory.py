"""Law 7: the fast path's peak memory is the dense path's, plus what the report declares, plus 2 %."""

import pytest
import torch

import dit_accel
from dit_accel.testing import peak_bytes


def test_peak_memory(model, method):
    transformer = model.make(**model.large)
    inputs = model.inputs(transformer, **model.large_inputs)

    @torch.no_grad()
    def forward():
        transformer(**inputs, return_dict=False)

    forward()
    dense, piece = peak_bytes(forward)
    handle = dit_accel.accelerate(transformer, None, method=method(0.25), min_tokens=0)
    forward()
    sparse, largest = peak_bytes(forward)
    report = handle.report()
    assert report.dense_calls == 0
    assert sparse <= (dense + report.bytes_held + report.bytes_working) * 1.02
    # nothing N x N, not even for one head, unless the model itself holds something as large
    assert largest < model.tokens**2 * 4 or largest <= piece


def test_peak_memory_sees_a_mask():
    assert peak_bytes(lambda: torch.zeros(1000, 1000, dtype=torch.bool))[1] >= 1_000_000


@pytest.mark.parametrize("under_the_meter", [False, True])
def test_what_others_leave_behind_makes_no_room(under_the_meter):
    kept = []

    def run():
        kept[:] = [torch.zeros(1000, 1000)]  # the former one is freed after this one is there

    peak_bytes(run) if under_the_meter else run()
    cycle = [torch.zeros(500, 500)]
    cycle.append(cycle)
    del cycle
    assert peak_bytes(run) == (4_000_000, 4_000_000)
