"""Steps of a sweep by CUDA graphs, on a CPU: what stands in for a graph calls what was recorded once more."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from capsule_heads.heads import registered_heads
from capsule_heads.training.crews import Crew
from capsule_heads.training.graphs import MULTIPLE, GraphedSteps
from capsule_heads.training.members import Member
from capsule_heads.training.sweep import SweepArguments

SMALL = {"d_inp": 8, "n_parts": 4}
TRAINED = [name for name, head in registered_heads().items() if head.made_by is None]


class Operations(TorchDispatchMode):
    """Counts operations; one that reads a number from a tensor, or makes a size from its values, is refused."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            raise RuntimeError(f"{func} waits for the device")
        self.n += 1
        return func(*args, **(kwargs or {}))


class Recorder:
    """Records calls as a CUDA graph would, as far as a CPU can tell."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, calls):
        self.recorded += 1

        def replay():
            self.replayed += 1
            with Operations():
                for call in calls:
                    call()

        replay()
        return replay


@pytest.fixture
def recorder(monkeypatch):
    """What all crews record with. Labels and masks are checked on the host alone: here they count as on a GPU."""
    monkeypatch.setattr("capsule_heads.training.sweep.number_of_processes", lambda n_members, device: 1)
    for module in ("models.losses", "backbones.running"):
        monkeypatch.setattr(f"capsule_heads.{module}.is_readable", lambda tensor: False)
    recorder, make_crew = Recorder(), Crew.__init__

    def make(self, *args):
        make_crew(self, *args)
        self._graphs = GraphedSteps(recorder)

    monkeypatch.setattr(Crew, "__init__", make)
    return recorder


@pytest.mark.parametrize("head_type", [name for name in TRAINED if name != "spatial_pose"])  # of images
def test_members_end_with_the_weights_that_the_trainer_gives(make_sweep, train_alone, recorder, head_type):
    options = {x: v for x, v in SMALL.items() if x in registered_heads()[head_type].Options.names()}
    plan = SweepArguments(grid={"learning_rate": [2e-2], "mixup_alpha": [0.0, 0.2]}, heads=[head_type])
    sweep = make_sweep(plan, options, max_steps=30, seed=1, label_smoothing_factor=0.1)
    sweep.train()
    assert recorder.replayed > 20
    for member in sweep.members:
        expected = train_alone(sweep, member, max_steps=30, label_smoothing_factor=0.1)
        for name, x in member.weights().items():
            torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=1e-5)


def batch_of(tokens, seed=0, n=4):
    """A batch for `members`."""
    states = torch.randn(n, tokens, 3, 16, generator=torch.Generator().manual_seed(seed))
    return {"hidden_states": states, "attention_mask": torch.ones(n, tokens).long(), "labels": torch.arange(n) % 2}


@pytest.fixture
def make_members(make_sweep, recorder):
    def make(alphas=(0.0, 0.2)):
        sweep = make_sweep(SweepArguments(grid={"mixup_alpha": list(alphas)}, seeds=2), max_steps=30)
        for member in sweep.members:
            member.prepare(30)
        return sweep.members

    return make


def test_a_shape_is_recorded_once_when_it_comes_again(make_members, recorder):
    members, steps = make_members(), GraphedSteps(recorder)
    for seed, (tokens, expected) in enumerate([(5, 0), (MULTIPLE, 1), (6, 1), (MULTIPLE + 1, 1), (15, 2), (7, 2)]):
        steps.step(members, batch_of(tokens, seed))
        assert recorder.recorded == expected
    assert all(member.steps == 6 for member in members)
    steps.step(members[1:], batch_of(5))  # what was recorded has one member more
    steps.step(members[1:], batch_of(5))
    assert recorder.recorded == 3
    assert [member.steps for member in members] == [6, 8, 8, 8]


def test_beside_a_graph_a_step_has_few_operations(make_members, monkeypatch):
    """The graph does nothing here: what is left is said to the device in every step."""
    recorder = Recorder()
    members, steps = make_members([0.0]), GraphedSteps(lambda calls: recorder(calls) and (lambda: None))
    monkeypatch.setattr(Member, "update", lambda self, gradients: None)  # an optimizer has its own operations
    for seed in range(2):
        steps.step(members, batch_of(5, seed))
    with Operations() as operations:
        steps.step(members, batch_of(5))
    assert 0 < operations.n <= 20
    with Operations() as operations:
        members[0].differentiate(batch_of(5))
    assert operations.n > 100


def test_numbers_that_are_not_finite_are_found_at_the_end(make_members, recorder):
    members, steps = make_members(), GraphedSteps(recorder)
    for step in range(4):
        if step == 2:
            with torch.no_grad():
                next(members[1].model.head.parameters()).fill_(torch.nan)
        steps.step(members, batch_of(5, step))
    assert all(member.fault is None for member in members)
    steps.check()
    assert [member.fault for member in members] == [None, "step 3: not finite", None, None]


def test_what_cannot_be_recorded_is_stepped_one_by_one(make_members, caplog):
    def refuse(calls):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    members, steps = make_members(), GraphedSteps(refuse)
    for step in range(3):
        steps.step(members, batch_of(5, step))
    assert all(member.steps == 3 for member in members)
    messages = [x.getMessage() for x in caplog.records if "one by one" in x.getMessage()]
    assert len(messages) == 1 and messages[0].endswith("operation not permitted when stream is capturing")


def test_a_head_that_draws_on_the_cpu_is_not_recorded(make_members, recorder, caplog):
    members, steps = make_members(), GraphedSteps(recorder)
    head = members[0].model.head
    forward = head.forward
    head.forward = lambda states, *rest: forward([x + 0.1 * torch.randn(x.shape) for x in states], *rest)
    for step in range(3):
        steps.step(members, batch_of(5, step))
    assert all(member.steps == 3 for member in members)
    assert "a head draws random numbers on the CPU" in caplog.text
