"""What can go wrong: PTX that the emulator does not know, and kernels that do what they must not."""


class PTXError(Exception):
    """The emulator cannot read this PTX, or does not know one of its instructions. It never guesses."""


class KernelError(Exception):
    """The kernel did what it must not: out of bounds, misaligned, a race, a read of what nobody wrote."""
