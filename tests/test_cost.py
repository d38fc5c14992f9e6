"""Work counted from sizes is the design's, and a floor is what it and a device's ceilings give."""

import pytest
import torch

from gpn_triton.machine import device as machine
from gpn_triton.neurons import cost
from gpn_triton.neurons.networks import NEURONS
from gpn_triton.training.build import build_model
from gpn_triton.training.options import TrainConfig

CPU = torch.device("cpu")
SHD, SSC = ([128], 20), ([512, 256, 128], 35)
H200 = machine.Ceilings(790e12, 4.3e12, "stated")
GPN = NEURONS["gpn"].work
COUNTED = [name for name, row in NEURONS.items() if row.work is not None]


def test_counts_of_the_paper_s_networks_are_the_design_s():
    for (hidden, classes), forward, training in ((SHD, 0.446, 1.29), (SSC, 6.56, 21.7)):
        for backward, expected in ((False, forward), (True, training)):
            count = cost.network(GPN, hidden, 700, classes, backward)
            assert count.flops / 1e6 == pytest.approx(expected, rel=2e-3)
    # the serial share of a step without the recomputed gates: 23 to 29 %
    for (hidden, classes), recomputed, share in ((SHD, 0.131, 0.226), (SSC, 2.75, 0.290)):
        count = cost.network(GPN, hidden, 700, classes, True)
        rest = count.flops / 1e6 - recomputed
        assert count.serial_flops / 1e6 / rest == pytest.approx(share, abs=2e-3)


def test_floors_are_the_design_s_and_the_slower_of_arithmetic_and_traffic():
    def floor(sizes, T, samples, amp=torch.bfloat16):
        return cost.training_floor(GPN, sizes[0], 700, sizes[1], T, samples, amp, H200)

    assert floor(SHD, 100, 8156) == pytest.approx(2.5e-3, rel=0.06)
    for T, expected in ((50, 0.104), (100, 0.207), (250, 0.519)):
        assert floor(SSC, T, 75466) == pytest.approx(expected, rel=0.01)
    assert floor(SSC, 50, 6) == pytest.approx(2 * floor(SSC, 50, 3))
    assert floor(SSC, 50, 3, torch.float16) == floor(SSC, 50, 3) < floor(SSC, 50, 3, None)
    work = cost.Count(flops=6.0, bytes=10.0)
    assert cost.floor_seconds(work, machine.Ceilings(2.0, 5.0, "")) == 3.0
    assert cost.floor_seconds(work, machine.Ceilings(3.0, 2.0, "")) == 5.0
    # the two that are not counted have none
    assert set(COUNTED) == set(NEURONS) - {"cuba-lif", "cnn"}
    for name, row in NEURONS.items():
        none = cost.training_floor(row.work, [8], 12, 3, 5, 7, None, H200) is None
        assert none == (name not in COUNTED), name


@pytest.mark.parametrize("neuron", COUNTED)
def test_products_are_those_of_the_weights_a_network_has(neuron):
    C, classes, work = 12, 3, NEURONS[neuron].work
    cfg = TrainConfig(hidden=(8, 4), neuron=neuron)
    model = build_model(cfg, C, classes)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    forward, both = (cost.network(work, cfg.hidden, C, classes, b) for b in (False, True))
    # every weight multiplies once a step
    assert forward.flops == 2 * matrices
    # and twice more backward; the network's input gets no gradient, and GPN takes its z again
    linear = getattr(model.inputs[0], "weight", None)
    first = model.neurons[0].weight_ih_l0 if linear is None else linear
    again = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight_v"))
    assert both.flops == 2 * (3 * matrices - first.numel() + again)
    # a network is its layers
    assert both == (
        cost.layer(work, 8, C, True, False)
        + cost.layer(work, 4, 8, True, True)
        + cost.linear(4, classes, True, True, element=0)
    )
    assert (both * 3).bytes == 3 * both.bytes and both.serial_flops <= both.flops


def test_variants_move_less_the_fewer_gates_they_have():
    moved = [cost.neuron(cost.gated_spiking(G), 16, True).bytes for G in range(5)]
    assert moved == sorted(set(moved))
    # without gates x is written and read by the step, which writes v and spike; backward reads x, v
    # and gradient, writes g_x, which the input Linear reads; a spike held for backward is one bit
    assert moved[0] == 2 * 16 * 9
    assert moved[4] == 2 * 16 * (14 + 7 * 4)


def test_ceilings_of_a_cpu_are_measured_once_and_leave_random_draws_alone():
    state = torch.get_rng_state()
    found = machine.ceilings(CPU, 96)
    assert torch.equal(torch.get_rng_state(), state)
    # a CPU does between a million and a petaflop, and copies so
    assert 1e6 < found.flops_per_s < 1e15 and 1e6 < found.bytes_per_s < 1e15
    assert "96^3 product in float32" in found.source
    assert machine.ceilings(CPU, 96) is found
