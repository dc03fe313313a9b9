"""Law 2: equal seeds give equal results, whatever ran before and however it ended."""

import inspect

import pytest
import torch


class Stop(Exception):
    pass


def stop_in_forward(bench, at_call):
    """Raise inside a block of the first transformer at the n-th of its forwards."""
    attention, calls = bench.attentions()[-1], [0]

    def hook(module, args):
        calls[0] += 1
        if calls[0] == at_call:
            raise Stop

    return attention.register_forward_pre_hook(hook)


def stop_in_callback(pipe, step, timestep, kwargs):
    raise Stop


def test_two_runs_with_one_seed_are_equal(bench, method, install):
    install(bench.pipe, method(0.4))
    assert torch.equal(bench.sample(), bench.sample())


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_does_not_depend_on_the_one_before(bench, method, install, steps):
    install(bench.pipe, method(0.4))
    alone = bench.sample(seed=1, steps=steps)
    bench.sample(seed=2, steps=2, batch=2)
    assert torch.equal(bench.sample(seed=1, steps=steps), alone)
    bench.sample(seed=2, steps=3, other=True)
    assert torch.equal(bench.sample(seed=1, steps=steps), alone)


@pytest.mark.parametrize("at_call", [1, 2, 3], ids=["step 0, first branch", "step 0, second branch", "later"])
@pytest.mark.parametrize("embedded", [False, True], ids=["new prompts", "the same tensors"])
def test_a_run_after_an_exception_is_as_fresh(bench, method, install, at_call, embedded):
    install(bench.pipe, method(0.4))
    fresh = bench.sample(embedded=embedded)
    hook = stop_in_forward(bench, at_call)
    # steps so that the first transformer of two experts gets that many calls too
    with pytest.raises(Stop):
        bench.sample(steps=8, embedded=embedded)
    hook.remove()
    assert torch.equal(bench.sample(embedded=embedded), fresh)


@pytest.mark.where("calls_back")
@pytest.mark.parametrize("embedded", [False, True], ids=["new prompts", "the same tensors"])
def test_a_run_after_a_stopped_callback_is_as_fresh(bench, method, install, embedded):
    install(bench.pipe, method(0.4))
    fresh = bench.sample(embedded=embedded)
    with pytest.raises(Stop):
        bench.sample(callback_on_step_end=stop_in_callback, embedded=embedded)
    assert torch.equal(bench.sample(embedded=embedded), fresh)


def test_the_table_says_which_pipelines_call_back(bench):
    assert bench.family.calls_back == ("callback_on_step_end" in inspect.signature(bench.pipe.__call__).parameters)


def test_the_report_counts_runs(bench, method, install):
    handle = install(bench.pipe, method(0.4))
    for _ in range(3):
        bench.sample(steps=1)
    assert handle.report().runs == 3
