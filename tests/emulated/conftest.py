"""The tests here need the emulated device from the start of the process: make test-emulated, or test_emulator.py."""

import sys

import pytest

if "emulator.plugin" in sys.modules:
    import emulator
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device():
    """The emulated device, with its options as they were."""
    device = emulator.install()
    device.launches.clear()
    with device.with_options():
        yield device
