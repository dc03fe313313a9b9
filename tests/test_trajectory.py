"""The clock on its own: what starts a run, which branch, which step."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel.trajectory import MAX_NAMELESS_BRANCHES, Context, Facts, StateTable, Trajectory


class Clock:
    """A trajectory fed by hand."""

    def __init__(self, pipe=None):
        self.trajectory = Trajectory(pipe)
        self.conditions = {name: torch.zeros(1, 4, 8) for name in ("c", "u", "other")}

    def __call__(
        self,
        timestep,
        condition="c",
        name=None,
        step=None,
        shape=(1, 4, 2, 8, 8),
        role="transformer",
        ends=True,
        variant="",
    ):
        tensor = self.conditions.get(condition)
        facts = Facts(timestep=timestep, grid=(2, 4, 4), shape=shape, condition=tensor, variant=variant)
        call = self.trajectory.enter(role, facts, Context(name, step), n_layers=2)
        if ends:
            self.trajectory.leave(role)
        return call


@pytest.fixture
def clock():
    return Clock()


def runs(calls):
    return [call.run for call in calls]


def test_one_run(clock):
    calls = [clock(t, c) for t in (900, 500, 100) for c in ("c", "u")]
    assert runs(calls) == [1] * 6
    assert [call.branch for call in calls] == ["#0", "#1"] * 3
    assert [call.step for call in calls] == [0, 0, 1, 1, 2, 2]
    assert [call.noise for call in calls] == [0.9, 0.9, 0.5, 0.5, 0.1, 0.1]


@pytest.mark.parametrize("name", [None, "cond"])
def test_a_variant_is_a_branch_of_its_own_and_starts_no_run(clock, name):
    """Also with the same conditioning, and with one that is first seen late."""
    for condition in ("c", "other"):
        places = [(900, ""), (500, ""), (500, "skip"), (100, ""), (100, "skip")]
        calls = [clock(t, condition if v else "c", name=name, variant=v) for t, v in places]
        whole, without = ("#0", "#1") if name is None else ("cond", "cond, skip")
        assert [call.branch for call in calls] == [whole, whole, without, whole, without]
        assert len(set(runs(calls))) == 1 and [call.step for call in calls] == [0, 1, 1, 2, 2]


def test_equal_noise_is_no_signal(clock):
    assert runs(clock(500) for _ in range(4)) == [1] * 4


def test_rising_noise_starts_a_run(clock):
    assert runs(clock(t) for t in (900, 500, 900, 500, 501)) == [1, 1, 2, 2, 3]


def test_another_shape_starts_a_run(clock):
    assert runs([clock(500), clock(500, shape=(2, 4, 2, 8, 8))]) == [1, 2]


def test_a_forward_that_never_returned_starts_a_run(clock):
    assert runs([clock(500, ends=False), clock(500)]) == [1, 2]


def test_begin_starts_a_run(clock):
    first = clock(500)
    clock.trajectory.begin()
    assert runs([first, clock(500)]) == [1, 2]


def test_step_zero_again_starts_a_run(clock):
    calls = [clock(900, c, n, 0) for c, n in (("c", "cond"), ("u", "uncond"), ("c", "cond"), ("u", "uncond"))]
    assert runs(calls) == [1, 1, 2, 2]


def test_an_earlier_step_starts_a_run_and_the_same_later_step_does_not(clock):
    calls = [clock(900 - 100 * s, "c", "cond", s) for s in (0, 1, 2, 2)] + [clock(700, "c", "cond", 1)]
    assert runs(calls) == [1, 1, 1, 1, 2]


def test_new_conditioning_in_a_named_branch_starts_a_run(clock):
    calls = [clock(900, "c", "cond"), clock(900, "u", "uncond"), clock(900, "other", "cond")]
    assert runs(calls) == [1, 1, 2]


def test_new_conditioning_late_in_a_nameless_run_starts_a_run(clock):
    assert runs([clock(900, "c"), clock(500, "c"), clock(500, "other")]) == [1, 1, 2]


def test_views_of_one_buffer_are_different_branches(clock):
    both = torch.zeros(2, 4, 8)
    clock.conditions = {"c": both[:1], "u": both[1:], "again": both[:1]}
    assert [clock(500, c).branch for c in ("c", "u", "again")] == ["#0", "#1", "#0"]


def test_without_conditioning_or_with_too_many_the_branch_is_unknown(clock):
    assert clock(500, None).branch is None
    clock.conditions = {i: torch.zeros(1, 4, 8) for i in range(20)}
    clock.trajectory.begin()
    branches = [clock(500, i).branch for i in range(20)]
    assert branches[:2] == ["#0", "#1"] and branches[MAX_NAMELESS_BRANCHES:] == [None] * (
        20 - MAX_NAMELESS_BRANCHES
    )


def scheduler(**facts):
    return SimpleNamespace(
        **{"timesteps": torch.arange(3), "step_index": None, **facts},
        config=SimpleNamespace(num_train_timesteps=500),
    )


def test_a_known_scheduler_decides():
    pipe = SimpleNamespace(scheduler=scheduler())
    clock = Clock(weakrefable(pipe))
    assert [clock(250, c).branch for c in ("c", "u")] == ["#0", "#1"]
    assert clock(250).noise == 0.5  # in its own units
    pipe.scheduler.step_index = 1
    assert clock(125).step == 1
    pipe.scheduler.timesteps = torch.arange(3)  # equal, but made anew by set_timesteps
    pipe.scheduler.step_index = None
    again = clock(125)
    assert again.run == 2 and again.step == 0


def test_the_end_of_a_schedule_counts_from_zero():
    """Video-to-video: the scheduler says nothing first and then where it is in the whole schedule."""
    pipe = SimpleNamespace(scheduler=scheduler())
    clock = Clock(weakrefable(pipe))
    steps = []
    for index, timestep in ((None, 250), (3, 200), (4, 150)):
        pipe.scheduler.step_index = index
        steps.append(clock(timestep).step)
    assert steps == [0, 1, 2]


def test_two_experts_share_a_run(clock):
    calls = [clock(900, role="transformer"), clock(500, role="transformer_2"), clock(900, role="transformer")]
    assert runs(calls) == [1, 1, 2]
    assert [call.role for call in calls] == ["transformer", "transformer_2", "transformer"]


def test_state_is_keyed_checked_and_dropped(clock):
    table = StateTable(clock.trajectory)
    made = []

    def state(call, layer, shape=(1, 2)):
        return table.get(call.at(layer), shape, lambda: made.append(1) or {"x": torch.zeros(4)})

    call = clock(900, "c", "cond")
    assert state(call, 0) is state(call, 0) and len(made) == 1
    assert state(call, 0) is not state(call, 1)
    assert state(call, 0) is not state(clock(900, "u", "uncond"), 0)
    assert table.bytes_held() == 3 * 16 and len(table) == 3
    assert state(call, 0, (2, 2)) is not None and len(made) == 4  # another shape: made anew
    clock(950, "c", "cond")
    assert len(table) == 0


def weakrefable(pipe):
    """A pipeline that stays alive as long as the namespace does; the clock holds it weakly."""

    class Pipe:
        scheduler = property(lambda self: pipe.scheduler)

    pipe.owner = Pipe()
    return pipe.owner


def test_a_host_that_tells_runs_and_steps_is_believed(clock):
    """Levels may rise and sizes change within its runs: samplers look twice, and areas of a picture differ."""
    clock.trajectory = Trajectory(told_steps=4)
    cleared = []
    clock.trajectory.on_new_run(lambda: cleared.append(1))
    places = [(900, "cond", 0), (500, "cond", 1), (900, "cond", 0), (500, "uncond", 1)]
    calls = [clock(t, None, name, step, shape=(4, i)) for i, (t, name, step) in enumerate(places)]
    assert runs(calls) == [1] * 4
    assert [call.step for call in calls] == [0, 1, 0, 1]
    assert cleared == [1]
    assert clock.trajectory.n_steps() == 4
    clock.trajectory.begin()
    assert clock(900, None, "cond", 0).run == 2


def test_a_told_run_that_broke_off_is_over(clock):
    clock.trajectory = Trajectory(told_steps=4)
    clock(900, None, "cond", 0, ends=False)
    assert clock(900, None, "cond", 0).run == 2
