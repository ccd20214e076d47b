"""What the benchmark scripts share: description of the machine, interleaved timing, peak memory, axes of pictures."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import entropy_attn

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
FLUSH_BYTES = 256 << 20  # larger than the last-level cache of any GPU to date


def ignore_interrupts() -> None:
    """Ignore Ctrl-C in a worker process: the process that collects the rows handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def need_gpu(script_name: str, otherwise: str = "") -> None:
    """End with code 2 and one sentence to stderr where there is no CUDA or ROCm device."""
    if torch.cuda.is_available():
        return
    hint = f", or {otherwise}" if otherwise else ""
    print(
        f"{script_name} needs a CUDA or ROCm device, and PyTorch {torch.__version__} sees none: "
        f"run `python benchmarks/{script_name}` on a machine with one and a PyTorch built for it{hint}.",
        file=sys.stderr,
    )
    sys.exit(2)


def machine(device: str | None = None) -> dict[str, Any]:
    """The hardware and the versions of a run. The device is the first GPU if there is one and `device` is not "cpu"."""
    result: dict[str, Any] = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    if torch.cuda.is_available() and device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        result["device"] = properties.name
        if torch.version.hip is None:
            result["compute_capability"] = f"{properties.major}.{properties.minor}"
        else:
            result["architecture"] = properties.gcnArchName
        result["memory_gib"] = round(properties.total_memory / 2**30, 1)
        result |= clocks()
    result["cpu"] = _cpu_model()
    result.setdefault("device", result["cpu"])
    result["threads"] = torch.get_num_threads()
    result["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY")  # it matters on a shared machine
    result["python"] = platform.python_version()
    result["torch"] = torch.__version__
    result["cuda"] = torch.version.cuda or torch.version.hip
    result["triton"] = version("triton")
    result["entropy_attn"] = entropy_attn.__version__
    return result


def version(distribution: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def clocks() -> dict[str, float]:
    """SM clock, maximum SM clock (MHz) and power limit (W) of the first GPU; empty where nvidia-smi does not tell."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return {}
    fields = {"sm_clock_mhz": "clocks.sm", "sm_clock_max_mhz": "clocks.max.sm", "power_limit_w": "power.limit"}
    uuid = torch.cuda.get_device_properties(0).uuid  # CUDA_VISIBLE_DEVICES may have renumbered the devices
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields.values())}"]
    try:
        output = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
        return {name: float(x) for name, x in zip(fields, output.strip().split(","), strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def describe(machine: dict[str, Any]) -> str:
    """One line for the head of a table or a picture."""
    clock = f", {machine['sm_clock_mhz']:.0f} MHz" if "sm_clock_mhz" in machine else ""
    power = f", {machine['power_limit_w']:.0f} W" if "power_limit_w" in machine else ""
    versions = f"torch {machine['torch']}, triton {machine['triton']}, entropy_attn {machine['entropy_attn']}"
    return f"{machine['device']}{clock}{power}, {machine['threads']} CPU threads, {versions}, {machine['date'][:10]}"


def interleaved(
    ways: dict[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    repetitions: int | None = None,
    failed: dict[str, Exception] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each way in each round, after one round to warm up.

    A way that raises ends the run with its exception. With `failed` it is put there instead, and the others go on.

    Within a round the ways run one after the other. A disturbance of the machine then slows all of them, and the ratios
    of one round stay comparable. The time of a way in a round is the median of its repetitions. On a GPU there are 10,
    timed by CUDA events, and the L2 cache is flushed before each. On a CPU there is 1, timed by `time.perf_counter`.
    """
    on_gpu = torch.device(device).type == "cuda"
    time_way, default = (_gpu_times, 10) if on_gpu else (_cpu_times, 1)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name in list(times):
            try:
                taken = time_way(ways[name], repetitions or default)
            except Exception as error:  # whatever a library raises
                if failed is None:
                    raise
                check_device(device, error)
                failed[name] = error
                del times[name]
                continue
            if round_ > 0:
                times[name].append(statistics.median(taken))
    return times


class DeviceLostError(RuntimeError):
    """The device no longer works in this process, as after an illegal memory access."""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def check_device(device: str, error: Exception) -> None:
    """Raise DeviceLostError if the device cannot be used any more after `error`. Out of memory leaves it usable."""
    if torch.device(device).type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except RuntimeError as also:
        raise DeviceLostError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from also


def _cpu_times(way: Callable[[], Any], repetitions: int) -> list[float]:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        way()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def _gpu_times(way: Callable[[], Any], repetitions: int) -> list[float]:
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repetitions)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        _flush_buffer().zero_()  # also keeps the GPU busy while the host launches what is timed
        start.record()
        way()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return low, middle, high


def peak_memory(way: Callable[[], Any], device: str = "cpu") -> float:
    """Peak of PyTorch's allocated memory while `way` runs, in MiB, minus what was allocated before.

    The result of `way` counts; its inputs do not. On a GPU the figure is the allocator's own. On a CPU it is the peak
    of the running sum of the allocations and releases that PyTorch's profiler lists.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no message at each start and stop of the profiler
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = way()
    del result
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def pyplot() -> Any:
    """matplotlib.pyplot with the backend that draws to files."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("matplotlib is missing: pip install 'entropy_attn[bench]'")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def token_ticks(tokens: Iterable[int]) -> list[int]:
    """The numbers of tokens to label on a logarithmic axis: all of them, less those whose labels would overlap."""
    ticks: list[int] = []
    tokens = sorted(set(tokens))
    for N in tokens:
        if not ticks or N / ticks[-1] >= max(1.1, (tokens[-1] / tokens[0]) ** 0.09):
            ticks.append(N)
    return ticks


def token_axis(axes: Any, tokens: Iterable[int]) -> None:
    """A logarithmic x axis whose ticks are numbers of tokens."""
    ticks = token_ticks(tokens)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(N) for N in ticks])
    axes.minorticks_off()
