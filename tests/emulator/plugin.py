"""pytest -p emulator.plugin: the tests of this process run on the emulated device.

It has to be loaded before conftest.py looks for a GPU. A process of its own is needed: torch.cuda is replaced, and
kernels that Triton's interpreter has been given cannot be compiled any more.
"""

import pytest

import emulator

try:
    emulator.install()
    OBSTACLE = ""
except emulator.EmulatorError as error:
    OBSTACLE = str(error)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every N-th test only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[:: config.getoption("--every")]
    for item in items if OBSTACLE else ():
        item.add_marker(pytest.mark.skip(reason=OBSTACLE))


def pytest_report_header() -> str:
    return f"no emulated GPU: {OBSTACLE}" if OBSTACLE else f"device: {emulator.install().name}"
