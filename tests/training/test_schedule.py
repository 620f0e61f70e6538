import copy
import math

import pytest
import torch

from capsule_heads.training import OneCycle

PEAK, LOW = 5e-4, 1e-5
N, N_UP = 200, 20


def optimizer(cls=torch.optim.RAdam, **kwargs):
    return cls([torch.nn.Parameter(torch.zeros(2))], lr=PEAK, **kwargs)


def one_cycle(of, **kwargs):
    return OneCycle(of, **{"n_steps": N, "n_warmup_steps": N_UP, "min_lr": LOW, "min_beta1": 0.81, **kwargs})


def curve(of, schedule, n=N + 1):
    """Learning rates and beta1 at steps 0 to n - 1."""
    points = []
    for _ in range(n):
        points.append((of.param_groups[0]["lr"], of.param_groups[0]["betas"][0]))
        of.step()
        schedule.step()
    return points


def test_the_curve_against_its_closed_form():
    of = optimizer()
    points = curve(of, one_cycle(of))
    for step, (lr, beta1) in enumerate(points):
        if step <= 20:
            expected = 1e-5 + (5e-4 - 1e-5) * step / 20, 0.9 - 0.09 * step / 20
        else:
            fallen = (1 - math.cos(math.pi * (step - 20) / 180)) / 2
            expected = 5e-4 - (5e-4 - 1e-5) * fallen, 0.81 + 0.09 * fallen
        assert (lr, beta1) == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize(
    "step, lr, beta1",
    [
        (0, 1e-5, 0.9),
        (10, 0.5 * (1e-5 + 5e-4), 0.855),  # half of the rise
        (20, 5e-4, 0.81),
        (110, 0.5 * (1e-5 + 5e-4), 0.855),  # half of the fall
        (200, 1e-5, 0.9),
        (230, 1e-5, 0.9),  # past the end it stays there
    ],
)
def test_milestones(step, lr, beta1):
    of = optimizer()
    assert curve(of, one_cycle(of), n=step + 1)[-1] == pytest.approx((lr, beta1), rel=1e-12)


def test_the_second_beta_stays_and_get_last_lr_is_what_the_optimizer_has():
    of = optimizer(betas=(0.9, 0.98))
    schedule = one_cycle(of)
    curve(of, schedule, n=30)
    assert of.param_groups[0]["betas"][1] == 0.98
    assert schedule.get_last_lr() == [of.param_groups[0]["lr"]]


def test_parameter_groups_have_peaks_of_their_own():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-3, 1e-4)]
    groups[1]["betas"] = (0.95, 0.999)
    of = torch.optim.RAdam(groups)
    schedule = one_cycle(of)
    for expected in ([1e-5, 1e-5], [0.9, 0.95]), ([1e-3, 1e-4], [0.81, 0.81]), ([1e-5, 1e-5], [0.9, 0.95]):
        assert [group["lr"] for group in of.param_groups] == pytest.approx(expected[0])
        assert [group["betas"][0] for group in of.param_groups] == pytest.approx(expected[1])
        for _ in range(N_UP if schedule.last_epoch == 0 else N - N_UP):
            of.step()
            schedule.step()


def test_parameter_groups_have_ends_of_their_own():
    of = torch.optim.RAdam([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-3, 1e-6)])
    schedule = one_cycle(of, min_lr=[1e-5, 1e-8])
    for _ in range(N):
        first, second = (group["lr"] for group in of.param_groups)
        assert second == pytest.approx(first / 1000)
        of.step()
        schedule.step()
    assert first < 2e-5


@pytest.mark.parametrize("at", [5, 20, 90])
def test_a_saved_state_goes_on_along_the_same_curve(at):
    of = optimizer()
    whole = curve(of, one_cycle(of))

    of = optimizer()
    schedule = one_cycle(of)
    curve(of, schedule, n=at)
    states = copy.deepcopy((of.state_dict(), schedule.state_dict()))
    of = optimizer()
    schedule = one_cycle(of)
    of.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    assert curve(of, schedule, n=N + 1 - at) == whole[at:]

    of = optimizer()
    of.load_state_dict(states[0])  # it remembers its peaks, so that the schedule can begin anywhere, as in torch
    assert curve(of, one_cycle(of, last_epoch=at - 1), n=N + 1 - at) == whole[at:]


def test_an_optimizer_without_betas_keeps_its_momentum():
    of = optimizer(torch.optim.SGD, momentum=0.7)
    schedule = one_cycle(of)
    for _ in range(N_UP):
        of.step()
        schedule.step()
    assert of.param_groups[0]["lr"] == pytest.approx(PEAK)
    assert of.param_groups[0]["momentum"] == 0.7


def test_without_a_rise_it_begins_at_the_peak():
    of = optimizer()
    assert curve(of, one_cycle(of, n_warmup_steps=0), n=1) == [(PEAK, 0.81)]
