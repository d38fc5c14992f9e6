"""A profile's rows are what a step did and add up to it, on a CPU and from a GPU's events."""

import gzip
import json

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.nn import functional as F
from torch.profiler import record_function

from gpn_triton import SpikingClassifier
from gpn_triton.profile import SHOWN, STEP, Row, StepProfile, kernel_name, kernel_rows, op_rows

T, B, C = 6, 3, 10


class Training:
    """A small network and its optimiser; step() makes a training step and returns the loss."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = SpikingClassifier([8], inputs=C, classes=4, backend="torch")
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.x, self.labels = torch.rand(T, B, C), torch.zeros(B, dtype=torch.long)

    def step(self):
        with record_function("forward"):
            loss = F.cross_entropy(self.model(self.x)[0], self.labels)
        with record_function("backward"):
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def profiled(steps, warmup, made):
    """A profile of a training of so many steps."""
    training, profile = Training(), StepProfile(steps, warmup)
    with profile:
        for _ in range(made):
            training.step()
            profile.step()
    return profile


@pytest.fixture(scope="module")
def three():
    """Three steps recorded of seven."""
    return profiled(steps=3, warmup=2, made=7)


def rows(profile):
    """Rows by name, the last one's name apart."""
    return {row.name: row for row in profile.rows[:-1]}, profile.rows[-1]


def test_rows_are_a_step_s_ops_and_add_up_to_it(three):
    assert three.recorded == 3 and three.ended
    ops, rest = rows(three)
    schemas = {s.name for s in torch._C._jit_get_all_schemas()}
    named = [name for name in ops if name.startswith("aten::")]
    assert len(named) > 20 and set(named) <= schemas
    # one forward, one backward and one update a step, and a product with v at each of T bins
    for name in ("gpn_triton::recurrence", "gpn_triton::recurrence_backward"):
        assert ops[name].calls == 1
    assert ops["aten::addmm_"].calls >= T
    assert ops["AddmmBackward0"].calls == 2
    assert rest.name.startswith("in no op") and rest.ms > 0
    assert all(row.ms >= 0 for row in three.rows)
    times = [row.ms for row in three.rows[:-1]]
    assert times == sorted(times, reverse=True)
    trace = json.loads(gzip.decompress(three._read[2]))
    steps = [e for e in trace["traceEvents"] if e.get("name") == STEP]
    wall = sum(e["dur"] for e in steps) / 1e3 / 3
    assert len(steps) == 3
    assert sum(row.ms for row in three.rows) == pytest.approx(wall, rel=1e-6)
    assert sum(row.ms for row in three.regions) == pytest.approx(wall, rel=1e-6)


def test_regions_are_those_of_record_function(three):
    *regions, rest = three.regions
    names = {row.name: row for row in regions}
    assert {"forward", "backward", "Optimizer.step#Adam.step"} <= names.keys()
    assert all(row.calls == 1 for row in regions) and rest.name == "in no region"
    # what is inside a region is at most the region
    assert rows(three)[0]["gpn_triton::recurrence"].ms < names["forward"].ms


def test_table_s_shares_add_up_to_100(three):
    first, _, *tables = three.table().splitlines()
    assert first.startswith("3 training steps of ") and "after 2 that were not recorded" in first
    ops = tables[[line.startswith("op, self time") for line in tables].index(True) + 1 :]
    shares = [float(line.split()[-2]) for line in ops]
    assert shares[-1] == 100.0 and ops[-1].startswith("all ")
    # each is rounded to 0.1
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.05 * len(shares))
    assert len(ops) == SHOWN + 3 and f"{len(three.rows) - 1 - SHOWN} others" in ops[-3]


def test_files_are_a_table_and_a_trace_that_holds_the_ops(three, tmp_path):
    three.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"profile.txt", "trace.json.gz"}
    assert (tmp_path / "profile.txt").read_text() == three.table() + "\n"
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::addmm_", "gpn_triton::recurrence", "forward", STEP} <= names


def test_profile_changes_no_number_and_draws_nothing():
    losses = []
    for profile in (None, StepProfile(2, 1)):
        training = Training()
        if profile is None:
            losses.append([training.step() for _ in range(5)])
            continue
        with profile:
            losses.append([])
            for _ in range(5):
                losses[-1].append(training.step())
                profile.step()
    assert losses[0] == losses[1] and len(set(losses[0])) == 5


def test_nothing_is_recorded_or_kept_once_the_steps_are():
    profile = profiled(steps=1, warmup=0, made=4)
    assert profile.recorded == 1 and not torch.autograd._profiler_enabled()
    assert rows(profile)[0]["gpn_triton::recurrence"].calls == 1
    assert profile._profiler is None


def test_training_that_ends_early_has_a_table_of_what_was_recorded():
    profile = profiled(steps=5, warmup=1, made=3)
    assert profile.recorded == 2 and profile.table().startswith("2 training steps of ")
    assert rows(profile)[0]["gpn_triton::recurrence"].calls == 1


@pytest.mark.parametrize("made", [0, 1, 2])
def test_training_that_ends_before_the_first_recorded_step_says_so(made, tmp_path):
    profile = profiled(steps=5, warmup=2, made=made)
    assert profile.rows == [] and not torch.autograd._profiler_enabled()
    assert profile.table() == (
        f"profile: nothing recorded: training ended after {made} steps, and the first 2 are not "
        "recorded"
    )
    profile.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.txt"]


def test_interrupted_and_failed_training_leave_the_profiler_off():
    for error in (SystemExit, ArithmeticError):
        training, profile = Training(), StepProfile(5, 0)
        with pytest.raises(error), profile:
            training.step()
            profile.step()
            training.step()
            raise error
        assert not torch.autograd._profiler_enabled() and profile.ended
        # the step that was not finished is not counted
        assert profile.recorded == 1
        assert rows(profile)[0]["gpn_triton::recurrence"].calls == 1


def test_what_is_done_in_a_pause_is_left_out():
    training, profile = Training(), StepProfile(4, 1)
    with profile:
        for _ in range(3):
            for _ in range(2):
                training.step()
                profile.step()
            with profile.paused():
                torch.linalg.svd(torch.eye(3))
    ops, _ = rows(profile)
    assert profile.recorded == 4 and ops["gpn_triton::recurrence"].calls == 1
    assert not [name for name in ops if "svd" in name]


def test_table_before_the_end_is_refused():
    profile = StepProfile(3, 0)
    with profile:
        with pytest.raises(RuntimeError, match="0 of 3 steps are recorded"):
            profile.table()
    assert "nothing recorded" in profile.table()


@pytest.mark.parametrize(("options", "name"), [((0, 1), "steps"), ((1, -1), "warmup")])
def test_sizes_that_cannot_be_are_refused(options, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least"):
        StepProfile(*options)


def event(name, start, end, device=DeviceType.CPU, annotation=False):
    """An event as torch's profiler makes one; times in microseconds."""
    return FunctionEvent(
        0, name, 1, start, end, device_type=device, is_user_annotation=annotation, use_device="cuda"
    )


def kernel(name, start, end, annotation=False):
    return event(name, start, end, DeviceType.CUDA, annotation)


# two steps, enqueued at once; a pause, in which the device finishes them; one more step
GPU = [
    event(STEP, 0, 10, annotation=True),
    event(STEP, 10, 20, annotation=True),
    event(STEP, 20, 1000, annotation=True),
    event(STEP, 2000, 2500, annotation=True),
    event("aten::mm", 1, 4),
    event("cudaGraphLaunch", 2, 3),
    # the region's shadow on the device is no kernel
    kernel(STEP, 100, 900, annotation=True),
    kernel("void at::native::add<float>(int, float*)", 100, 400),
    # in another stream, half of it beside the last
    kernel("recurrence_forward_kernel", 300, 500),
    kernel("void at::native::add<float>(int, float*)", 600, 900),
    # an evaluation's, in the pause
    kernel("recurrence_forward_kernel", 1200, 1900),
    kernel("Memcpy DtoH (Device -> Pinned)", 1900, 1990),
    kernel("recurrence_forward_kernel", 2100, 2400),
]


def test_kernels_gaps_and_overlaps_add_up_to_the_steps_on_the_wall_clock():
    found = kernel_rows(GPU, [True, True, False, True])
    assert found == [
        Row("add<float>", 2 / 3, pytest.approx((200 + 50 + 300) / 3e3)),
        Row("recurrence_forward_kernel", 2 / 3, pytest.approx((50 + 100 + 300) / 3e3)),
        Row("in no kernel: gaps, the host", 0, pytest.approx((200 + 100 + 200) / 3e3)),
    ]
    assert sum(row.ms for row in found) == pytest.approx((1000 + 500) / 3e3)


def test_step_that_was_not_finished_after_a_pause_is_left_out():
    found = kernel_rows(GPU, [True, True, False, False])
    assert [row.name for row in found] == [
        "add<float>", "recurrence_forward_kernel", "in no kernel: gaps, the host",
    ]  # fmt: skip
    assert sum(row.ms for row in found) == pytest.approx(1000 / 2e3)


def test_table_of_a_gpu_names_kernels_and_says_when_none_was_seen():
    profile = StepProfile(3, 0, "cuda:0")
    profile.recorded, profile.ended = 3, True
    profile._read = kernel_rows(GPU, [True, True, False, True]), [], b""
    lines = profile.table().splitlines()
    assert lines[0] == "3 training steps of 0.500 ms on cuda:0, after 0 that were not recorded"
    assert [line.split()[0] for line in lines[2:]] == [
        "kernel", "add<float>", "recurrence_forward_kernel", "in", "all",
    ]  # fmt: skip
    assert lines[3].split()[1:] == ["0.6667", "0.183", "36.7", "%"]
    events = [e for e in GPU if e.device_type == DeviceType.CPU]
    profile._read = kernel_rows(events, [True, True, False, True]), [], b""
    assert "the profiler saw no kernel" in profile.table()


@pytest.mark.gpu
def test_replayed_graph_is_split_into_its_kernels():
    a = torch.randn(2048, 2048, device="cuda")
    b = torch.empty_like(a)

    def work():
        for _ in range(3):
            torch.mm(a, a, out=b)
        b.relu_()

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    profile = StepProfile(4, 2, "cuda")
    with profile:
        for _ in range(7):
            graph.replay()
            profile.step()
            if profile.recorded == 2:
                with profile.paused():
                    b.sigmoid_()
    kernels, rest = rows(profile)
    assert sum(row.calls for row in kernels.values()) >= 4
    assert any("elementwise" in name and row.calls == 1 for name, row in kernels.items())
    assert not [name for name in kernels if "sigmoid" in name]
    assert rest.ms > 0 and "saw no kernel" not in profile.table()


def test_op_rows_of_made_up_events_are_their_self_times():
    step, region = event(STEP, 0, 100, annotation=True), event("forward", 10, 60, annotation=True)
    outer, inner, node = event("aten::linear", 20, 50), event("aten::mm", 30, 45), "MmBackward0"
    around = event(f"autograd::engine::evaluate_function: {node}", 70, 90)
    inside = event(node, 75, 85)
    for parent, child in ((step, region), (region, outer), (outer, inner), (step, around)):
        parent.append_cpu_child(child)
    around.append_cpu_child(inside)
    ops, regions = op_rows([step, region, outer, inner, around, inside], [True])
    assert ops == [
        Row(node, 1, 0.02), Row("aten::linear", 1, 0.015), Row("aten::mm", 1, 0.015),
        Row("in no op: Python, gaps", 0, 0.05),
    ]  # fmt: skip
    assert regions == [Row("forward", 1, 0.05), Row("in no region", 0, 0.05)]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("recurrence_forward_kernel", "recurrence_forward_kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
        ("Memset (Device)", "Memset (Device)"),
        (
            "void at::native::(anonymous namespace)::foo<4, at::native::Add<float>, "
            "std::array<char*, 3ul> >(int, at::native::Add<float>)",
            "foo<4, Add<float>>",
        ),
        (
            "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            "ncclDevKernel_AllReduce_Sum_f32_RING_LL",
        ),
        ("f<g(int)::{lambda(float)#1}>(h(int), float)", "f<g(int)::{lambda(float)#1}>"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, "
            "float, float, at::native::binary_internal::MulFunctor<float> >, "
            "std::array<char*, 3ul> >(int, std::array<char*, 3ul>)",
            "vectorized_elementwise_kernel<...ernal::MulFunctor<float> >>",
        ),
    ],
)
def test_kernel_names_lose_parameters_and_namespaces(name, short):
    assert kernel_name(name) == short
