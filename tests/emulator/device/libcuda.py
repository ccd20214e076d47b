"""The stub of libcuda.so.1: compiled with the C compiler that Triton needs too, and loaded before the real one."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("libcuda.c")
BUILD = Path(__file__).parents[3] / "build" / "emulator"
_KEPT: list[object] = []  # callbacks that C holds

LaunchCallback = Callable[[int, int, int, int, int, int, int], int]


class EmulatorError(Exception):
    """The emulator cannot run on this machine; the text says what is missing."""


def compiler() -> str:
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not found:
        raise EmulatorError("the emulated GPU needs a C compiler (gcc, clang or CC), as Triton's launcher does")
    return found


def triton_folder() -> Path:
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise EmulatorError("the emulated GPU needs Triton (pip install triton)")
    return Path(found.origin).parent


def build() -> Path:
    """The folder with libcuda.so.1, which is built where it is not there yet."""
    cc, include = compiler(), triton_folder() / "backends" / "nvidia" / "include"
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    try:
        folder = BUILD / name
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"emulator-{os.getuid()}-{name}"
        folder.mkdir(exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        part = folder / f"part-{os.getpid()}"
        command = [cc, "-shared", "-fPIC", "-O1", "-w", "-I", str(include), str(SOURCE), "-o", str(part)]
        try:
            subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise EmulatorError(f"{cc} cannot build the emulated libcuda: {getattr(error, 'stderr', error)}") from error
        os.replace(part, library)
    with contextlib.suppress(FileExistsError):
        (folder / "libcuda.so").symlink_to(library.name)  # the name that older versions of Triton link
    return folder


def load(
    on_launch: LaunchCallback, is_device_pointer: Callable[[int], bool], *, multiprocessors: int, shared_opt_in: int,
    shared_of_multiprocessor: int,
) -> None:  # fmt: skip
    """Make the stub this process's CUDA driver. on_launch(x, y, z, threads, shared bytes, function, void **parameters)
    returns a CUresult."""
    folder = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    launch = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint] * 5, ctypes.c_ulonglong, ctypes.c_void_p)(on_launch)
    pointer = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_ulonglong)(lambda address: int(is_device_pointer(address)))
    _KEPT.extend((launch, pointer, library))
    library.emulator_setup(launch, pointer, multiprocessors, shared_opt_in, shared_of_multiprocessor)
