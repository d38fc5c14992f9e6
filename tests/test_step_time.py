"""The model of a step's time, on made-up machine code whose chain is known."""

import pytest

pytest.importorskip("triton")
from bench.step_time import COSTS, LAUNCH_US, WAIT_US, busiest, estimate, path, walk
from gpn_triton.kernels.offline import Dependence, Instruction, Report

SHARED, SPECIAL, L2 = 29, 24, 262
CONSTANTS = {"num_warps": 4, "BLOCK_B": 16, "BLOCK_N": 32, "BLOCK_K": 16, "N": 32, "FAST": True}
# a load from shared memory, whose result a special function takes, whose result is added and
# stored for the next round: by scoreboards 0 and 1
LOOP = [
    Instruction("MOV R1, RZ"),
    Instruction("LDS R2, [R1]", stall=2, result=0),
    Instruction("MUFU.TANH R3, R2", stall=1, result=1, waits=0b01),
    Instruction("FADD R4, R3, R3", stall=4, waits=0b10),
    Instruction("STS [R1], R4", stall=1, operands=0),
    Instruction("BRA `(.L_x_0)", guard="P0", target=1, stall=5, waits=0b01),
    Instruction("EXIT", stall=5),
]


def test_a_round_of_the_loop_is_the_sum_of_its_chain():
    order = path(LOOP, 3)
    assert order == [0, *[1, 2, 3, 4, 5] * 3, 6]
    clocks = walk(LOOP, order, 90, CONSTANTS)
    starts = [clock for clock, at in zip(clocks, order, strict=False) if at == 1]
    # the store keeps shared memory busy for 4 cycles, then its operands are free
    load, special, add, store, branch = 4 + SHARED, 8 + SPECIAL, 4, 4, 5
    assert starts[2] - starts[1] == starts[1] - starts[0] == load + special + add + store + branch


def test_a_unit_that_all_warps_use_is_as_busy_as_they_make_it():
    order = path(LOOP, 10)
    # 8 cycles a special function, or a cycle a line
    assert busiest(LOOP, order, 90, 64, CONSTANTS) == max(10 * 8, 10 * 2 * 4, len(order)) == 80


def test_copies_are_waited_for_by_their_groups():
    copy = Instruction("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", stall=1)
    code = [
        copy,
        Instruction("LDGDEPBAR", result=0),
        *[copy] * 2,
        Instruction("LDGDEPBAR", result=0),
        Instruction("DEPBAR.LE SB0, 0x1", stall=1),
        Instruction("DEPBAR.LE SB0, 0x0", stall=1),
        Instruction("EXIT"),
    ]
    clocks = walk(code, path(code, 1), 90, CONSTANTS)
    # 16 bytes a thread are 512 a warp: 32 cycles at a quarter of 64 bytes a cycle
    assert clocks[5] == 32 + L2 and clocks[6] == 3 * 32 + L2


def test_products_of_a_warpgroup_follow_each_other_and_are_waited_for():
    product = "HGMMA.64x32x16.F32 R24, gdesc[UR16], R24"
    code = [
        Instruction(product),
        Instruction(product + ", gsb0"),
        Instruction("WARPGROUP.DEPBAR.LE gsb0, 0x0"),
        Instruction("EXIT"),
    ]
    clocks = walk(code, path(code, 1), 90, CONSTANTS)
    # 64 x 32 x 16 at 2048 a cycle, twice
    assert clocks[2] == 2 * 16 + 33


def test_branches_that_lead_to_the_loop_are_taken_and_others_are_not():
    code = [
        Instruction("BRA `(.L_x_1)", guard="P0", target=3),
        Instruction("MOV R1, RZ"),
        Instruction("BRA `(.L_x_9)", target=6),
        Instruction("FADD R1, R1, R1"),
        Instruction("BRA `(.L_x_1)", guard="P1", target=3),
        Instruction("BRA `(.L_x_9)", guard="P2", target=7),
        Instruction("FADD R2, R2, R2"),
        Instruction("EXIT"),
    ]
    assert path(code, 2) == [0, 3, 4, 3, 4, 5, 6, 7]


def test_a_launch_that_begins_early_saves_what_it_does_ahead_of_its_wait():
    code = [
        Instruction("LDG.E R1, desc[UR4][R2.64]", result=0),
        Instruction("FADD R1, R1, R1", stall=4, waits=0b1),
        Instruction("ACQBULK", stall=1),
        Instruction("PREEXIT", stall=1),
        Instruction("STG.E desc[UR4][R2.64], R1", stall=1),
        Instruction("EXIT", stall=5),
    ]
    constants = {**CONSTANTS, "GATES": "f i b theta"}
    kernel = "gpn_forward_stepwise_kernel"
    where = Dependence(2, 3, 4, frozenset(), frozenset())
    ordinary = Report(kernel, constants, 32, 0, 0, 0, 4, *[0] * 6, None, code)
    early = Report(kernel, constants, 32, 0, 0, 0, 4, *[0] * 6, where, code)
    found = estimate(early, 16, 90)
    assert found.step_us == pytest.approx(estimate(ordinary, 16, 90).step_us)
    # the load takes 8 cycles of the L2 cache's bandwidth, then its latency, and is added up
    ahead = (8 + L2 + 4) / 1980
    assert found.dependent_us == pytest.approx(found.step_us - LAUNCH_US + WAIT_US - ahead)
    # a second program on each multiprocessor's turn, for which there is no room
    full = Report(kernel, constants, 255, 0, 0, 200 << 10, 8, *[0] * 6, None, code)
    once, twice = (estimate(full, 16 * programs, 90) for programs in (132, 264))
    assert twice.step_us - LAUNCH_US == pytest.approx(2 * (once.step_us - LAUNCH_US))


def test_every_cost_says_where_it_is_from():
    for cost in COSTS:
        assert cost.source and set(cost.latency) == set(cost.interval) == {80, 90, 100}
