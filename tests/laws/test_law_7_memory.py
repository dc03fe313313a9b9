"""Law 7: the fast path's peak memory is the dense path's, plus what the report declares, plus 2 %."""

import torch

from dit_accel import SparseProcessor
from dit_accel.testing import peak_bytes


def test_peak_memory(model, method):
    transformer = model.make(**model.large)
    inputs = model.inputs(transformer, **model.large_inputs)

    @torch.no_grad()
    def forward():
        transformer(**inputs, return_dict=False)

    forward()
    dense, piece = peak_bytes(forward)
    processor = SparseProcessor(transformer, method(0.25), min_tokens=0)
    transformer.set_attn_processor(processor)
    forward()
    sparse, largest = peak_bytes(forward)
    assert processor.report.dense_calls == 0
    report = processor.report
    assert sparse <= (dense + report.bytes_held + report.bytes_working) * 1.02
    # nothing N x N, not even for one head, unless the model itself holds something as large
    assert largest < model.tokens**2 * 4 or largest <= piece


def test_peak_memory_sees_a_mask():
    assert peak_bytes(lambda: torch.zeros(1000, 1000, dtype=torch.bool))[1] >= 1_000_000
