"""Kernels that do what they must not, and their like that do not."""

import numpy as np
import pytest
from emulator.ptx import KernelError, PTXError
from emulator.ptx.testing import THREADS, run

NUMBERS = np.arange(THREADS * 4, dtype=np.uint32)
# %own: where a thread stores in shared memory; %next: where the thread after it does, or the warp after its own.
SHARED = """
.reg .b32 %own, %next, %m, %v, %i; .reg .b64 %x; .reg .pred %q;
mov.u32 %m, memory;
mad.lo.u32 %own, %t, 4, %m;
mov.u32 %v, 5;
"""
NEXT_WARP = "add.u32 %i, %t, 32; and.b32 %i, %i, 127; mad.lo.u32 %next, %i, 4, %m;\n"
NEXT_LANE = (
    "add.u32 %i, %t, 1; and.b32 %i, %i, 31; and.b32 %v, %t, 96; or.b32 %i, %i, %v; mad.lo.u32 %next, %i, 4, %m;\n"
)
WRITE, READ, BARRIER = "st.shared.b32 [%own], %t;\n", "ld.shared.b32 %v, [%next];\n", "bar.sync 0;\n"


def shared(*statements: str, **options) -> None:
    run(SHARED + "".join(statements), NUMBERS.copy(), shared=THREADS * 4, **options)


@pytest.mark.parametrize("ctas", [1, 3])
def test_reads_of_other_warps_writes_need_a_barrier(ctas):
    shared(NEXT_WARP, WRITE, BARRIER, READ, ctas=ctas)
    with pytest.raises(KernelError, match="read after a write with no barrier"):
        shared(NEXT_WARP, WRITE, READ, ctas=ctas)
    with pytest.raises(KernelError, match="read after a write with no barrier"):
        shared(NEXT_WARP, WRITE, "bar.warp.sync -1;\n", READ, ctas=ctas)
    shared(NEXT_WARP, WRITE, READ, check=False, ctas=ctas)


def test_reads_of_other_lanes_writes_need_a_barrier_of_the_warp():
    shared(NEXT_LANE, WRITE, "bar.warp.sync -1;\n", READ)
    with pytest.raises(KernelError, match="read after a write with no barrier"):
        shared(NEXT_LANE, WRITE, READ)


def test_a_thread_reads_its_own_writes():
    shared(WRITE, "ld.shared.b32 %v, [%own];\n")


@pytest.mark.parametrize(("neighbour", "enough"), [(NEXT_WARP, BARRIER), (NEXT_LANE, "bar.warp.sync -1;\n")])
def test_writes_after_reads(neighbour, enough):
    again = "add.u32 %v, %t, 1; st.shared.b32 [%own], %v;\n"
    shared(neighbour, WRITE, BARRIER, READ, enough, again)
    with pytest.raises(KernelError, match="write after a read with no barrier"):
        shared(neighbour, WRITE, BARRIER, READ, again)


@pytest.mark.parametrize(("neighbour", "enough"), [(NEXT_WARP, BARRIER), (NEXT_LANE, "bar.warp.sync -1;\n")])
def test_writes_after_writes(neighbour, enough):
    other = "st.shared.b32 [%next], %v;\n"
    shared(neighbour, "mov.u32 %v, 200;\n", WRITE, enough, other)
    with pytest.raises(KernelError, match="write after a write with no barrier"):
        shared(neighbour, "mov.u32 %v, 200;\n", WRITE, other)
    shared(neighbour, "mov.u32 %i, 7; st.shared.b32 [%own], %i; st.shared.b32 [%next], %i;\n")  # the same value


def test_different_values_to_one_place_at_once():
    with pytest.raises(KernelError, match="different values to one place"):
        shared("st.shared.b32 [memory], %t;\n")
    shared("st.shared.b32 [memory], %v;\n")


def test_many_lanes_read_one_place():
    one = "ld.shared.b32 %v, [memory];\n"
    first = "setp.eq.u32 %q, %t, 0; @%q st.shared.b32 [memory], 9;\n"
    shared(WRITE, BARRIER, one, BARRIER, first)
    with pytest.raises(KernelError, match="write after a read"):
        shared(WRITE, BARRIER, one, "bar.warp.sync -1;\n", first)
    in_warp_0 = "setp.lt.u32 %q, %t, 32; @%q ld.shared.b32 %v, [memory];\n"
    shared(WRITE, BARRIER, in_warp_0, "bar.warp.sync -1;\n", first)
    with pytest.raises(KernelError, match="write after a read"):
        shared(WRITE, BARRIER, in_warp_0, first)
    last = "setp.eq.u32 %q, %t, {}; @%q st.shared.b32 [memory], 9;\n"  # by the lane that read it last
    for read, lane in ((one, 127), (in_warp_0, 31)):
        with pytest.raises(KernelError, match="write after a read"):
            shared(WRITE, BARRIER, read, last.format(lane))


def test_uninitialised_shared_memory():
    with pytest.raises(KernelError, match="uninitialised"):
        shared(READ.replace("%next", "%own"))
    half = "setp.lt.u32 %q, %t, 64; @%q " + WRITE + BARRIER
    shared(half, "@%q ld.shared.b32 %v, [%own];\n")
    with pytest.raises(KernelError, match=r"uninitialised.*thread 64 "):
        shared(half, "ld.shared.b32 %v, [%own];\n")


def test_bounds_and_alignment_of_shared_memory():
    with pytest.raises(KernelError, match="shared access of 4 bytes out of bounds"):
        shared(WRITE, BARRIER, "ld.shared.b32 %v, [%own+4];\n")
    with pytest.raises(KernelError, match="misaligned"):
        shared(WRITE, BARRIER, "ld.shared.b32 %v, [%own+2];\n")


COPY = """
mad.lo.u64 %x, %tid, 16, %p0;
mad.lo.u32 %own, %t, 16, %m;
cp.async.cg.shared.global [%own], [%x], 16;
cp.async.commit_group;
"""
WAIT = "cp.async.wait_group 0;\n"
FIRST_WORD = "ld.shared.b32 %v, [%own];\n"


def copied(*statements: str, **options) -> None:
    run(SHARED + COPY + "".join(statements), NUMBERS.copy(), shared=THREADS * 16, **options)


def test_async_copies_are_waited_for():
    copied(WAIT, FIRST_WORD)
    for early in ("", "cp.async.wait_group 1;\n", BARRIER):
        with pytest.raises(KernelError, match="in flight"):
            copied(early, FIRST_WORD)
    with pytest.raises(KernelError, match=r"write to bytes that a cp\.async has in flight"):
        copied("st.shared.b32 [%own], %t;\n")


def test_a_wait_is_for_the_threads_own_copies():
    other = "xor.b32 %i, %t, 32; mad.lo.u32 %next, %i, 16, %m;\n"
    copied(other, WAIT, BARRIER, READ)
    with pytest.raises(KernelError, match="read after a write with no barrier"):
        copied(other, WAIT, READ)


def test_without_checks_a_copy_lands_late():
    """At the wait, and no sooner: what is read before is the poison."""
    for wait, wanted in ((WAIT, NUMBERS[::4]), ("", np.full(THREADS, 0xFFFFFFFF, np.uint32))):
        out = np.zeros(THREADS, np.uint32)
        store = "mad.lo.u64 %x, %tid, 4, %p1; st.global.b32 [%x], %v;\n"
        run(SHARED + COPY + wait + FIRST_WORD + store, NUMBERS.copy(), out, shared=THREADS * 16, check=False)
        np.testing.assert_array_equal(out, wanted)


def test_a_copy_may_read_less_than_it_writes():
    out = np.zeros(THREADS, np.uint32)
    part = COPY.replace("[%x], 16;", "[%x], 16, %i;")
    last_word = "ld.shared.b32 %v, [%own+12];\nmad.lo.u64 %x, %tid, 4, %p1; st.global.b32 [%x], %v;\n"
    for size, wanted in ((16, NUMBERS[3::4]), (12, 0), (0, 0)):
        run(f"{SHARED} mov.u32 %i, {size};{part}{WAIT}{last_word}", NUMBERS.copy(), out, shared=THREADS * 16)
        np.testing.assert_array_equal(out, wanted)
    nowhere = part.replace("16, %p0;", "16, 4096;")
    run(f"{SHARED} mov.u32 %i, 0;{nowhere}{WAIT}{last_word}", NUMBERS.copy(), out, shared=THREADS * 16)
    with pytest.raises(KernelError, match="out of bounds"):
        run(f"{SHARED} mov.u32 %i, 4;{nowhere}{WAIT}{last_word}", NUMBERS.copy(), out, shared=THREADS * 16)


GLOBAL = ".reg .b64 %x; .reg .b32 %v; .reg .pred %q;\nmad.lo.u64 %x, %tid, 4, %p0;\n"


@pytest.mark.parametrize("offset", [0, 4, -4, 2**40, -(2**40)])
@pytest.mark.parametrize("access", ["ld.global.b32 %v, [%x{}];", "st.global.b32 [%x{}], %t;"])
def test_bounds_of_global_memory(access, offset):
    buffer = np.zeros(THREADS, np.uint32)
    body = GLOBAL + f"add.u64 %x, %x, {offset};" + access.format("")
    if offset == 0:
        run(body, buffer)
    else:
        with pytest.raises(KernelError, match="out of bounds"):
            run(body, buffer)


def test_alignment_of_global_memory():
    with pytest.raises(KernelError, match="misaligned 4-byte global load"):
        run(GLOBAL + "add.u64 %x, %x, 2; ld.global.b32 %v, [%x];", NUMBERS.copy())
    with pytest.raises(KernelError, match="misaligned 16-byte"):
        run(".reg .b32 %v<4>;" + GLOBAL + "ld.global.v4.b32 {%v0, %v1, %v2, %v3}, [%x];", NUMBERS.copy())


def test_ctas_that_store_to_the_same_place():
    """Whether they run together or one after the other."""
    every = GLOBAL + "cvt.u64.u32 %tid, %t; mad.lo.u64 %x, %tid, 4, %p0;"
    for at_once in (THREADS, 2048):
        run(GLOBAL + "st.global.b32 [%x], %t;", np.zeros(3 * THREADS, np.uint32), ctas=3, threads_at_once=at_once)
        with pytest.raises(KernelError, match="race: CTA"):
            run(every + "st.global.b32 [%x], %cta;", NUMBERS.copy(), ctas=3, threads_at_once=at_once)
        store = "setp.eq.u32 %q, %cta, 0; @%q st.global.b32 [%x], 1;"
        with pytest.raises(KernelError, match=r"race: CTA \d reads"):
            run(every + store + "ld.global.b32 %v, [%x];", NUMBERS.copy(), ctas=3, threads_at_once=at_once)


def test_divergent_barriers():
    body = (
        SHARED
        + """
    setp.lt.u32 %q, %t, 64;
    @%q bra LOW;
    bar.sync 0;
    bra END;
    LOW: bar.sync 0;
    END: mov.u32 %v, 0;"""
    )
    with pytest.raises(KernelError, match="different barriers"):
        run(body, shared=4)


def test_loops_of_different_length_come_together():
    """Threads and CTAs that go round a loop for longer than others, with a barrier in it for whole CTAs."""
    out = np.zeros(4 * THREADS, np.uint32)
    body = """.reg .b32 %i, %sum, %end; .reg .b64 %x; .reg .pred %q;
    mov.u32 %i, 0; mov.u32 %sum, 0;
    add.u32 %end, {bound}, 3;
    LOOP: add.u32 %sum, %sum, %i;
    {barrier}
    add.u32 %i, %i, 1;
    setp.lt.u32 %q, %i, %end;
    @%q bra LOOP;
    mad.lo.u64 %x, %tid, 4, %p0;
    st.global.b32 [%x], %sum;"""
    triangle = np.array([n * (n - 1) // 2 for n in range(200)], np.uint32)
    run(body.format(bound="%cta", barrier="bar.sync 0;"), out, ctas=4)
    np.testing.assert_array_equal(out, np.repeat(triangle[3:7], THREADS))
    run(body.format(bound="%t", barrier=""), out, ctas=4)
    np.testing.assert_array_equal(out, np.tile(triangle[3 : 3 + THREADS], 4))


def test_threads_that_diverge_meet_again():
    """Before a warp-wide instruction, that is; and those that have returned stay away."""
    out = np.full(THREADS, 7, np.uint32)
    body = """.reg .b32 %v; .reg .b64 %x; .reg .pred %q;
    setp.ge.u32 %q, %t, 64;
    @%q ret;
    and.b32 %v, %t, 1;
    setp.eq.u32 %q, %v, 0;
    @%q bra EVEN;
    mov.u32 %v, 100;
    bra BOTH;
    EVEN: mov.u32 %v, 200;
    BOTH: shfl.sync.bfly.b32 %v, %v, 1, 31, -1;
    mad.lo.u64 %x, %tid, 4, %p0;
    st.global.b32 [%x], %v;"""
    run(body, out)
    np.testing.assert_array_equal(out, [*[100, 200] * 32, *[7] * 64])


@pytest.mark.parametrize(("type_", "wanted"), [("s8", -2), ("u8", 254), ("s16", -258), ("u16", 65278)])
def test_narrow_loads_into_wide_registers(type_, wanted):
    out = np.zeros(THREADS, np.int32)
    body = f"""
    .reg .b32 %v; .reg .b64 %x;
    ld.global.{type_} %v, [%p0];
    mad.lo.u64 %x, %tid, 4, %p1;
    st.global.b32 [%x], %v;"""
    run(body, np.array([0xFEFE] * 8, np.uint16), out)
    assert set(out.tolist()) == {wanted}


def test_endless_loops_end():
    with pytest.raises(KernelError, match="endless"):
        run("LOOP: bra LOOP;", max_blocks=1000)


def test_traps_and_divisions_by_zero():
    with pytest.raises(KernelError, match="a trap"):
        run("trap;")
    with pytest.raises(KernelError, match="division by zero"):
        run(".reg .b32 %v; div.u32 %v, 1, %t;")


@pytest.mark.parametrize(
    "statement",
    ["frobnicate.b32 %v, %t;", "mul.rz.f32 %v, %v, %v;", "mov.b32 %v, %undeclared;", "ex2.approx.f64 %x, %x;"],
)
def test_what_is_not_known_is_refused(statement):
    with pytest.raises(PTXError, match="PTX line"):
        run(GLOBAL + statement, NUMBERS.copy())


def test_local_memory_is_each_threads_own():
    out = np.zeros(THREADS, np.uint32)
    body = """.local .align 4 .b8 mine[8]; .reg .b64 %x; .reg .b32 %v;
    st.local.b32 [mine+4], %t;
    ld.local.b32 %v, [mine+4];
    mad.lo.u64 %x, %tid, 4, %p0;
    st.global.b32 [%x], %v;"""
    run(body, out)
    np.testing.assert_array_equal(out, np.arange(THREADS))
    with pytest.raises(KernelError, match="local access out of bounds"):
        run(body.replace("mine+4", "mine+8"), out)


def test_poison_shows_registers_that_nobody_wrote():
    seen = []
    for poison in (0, 1):
        out = np.zeros(THREADS, np.uint32)
        run(GLOBAL + "st.global.b32 [%x], %v;", out, poison=poison)
        seen.append(out)
    assert np.isnan(seen[0].view(np.float32)).all()
    assert (seen[0] != seen[1]).all()
