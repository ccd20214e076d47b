"""Parts of the fuzzer `tests/fuzz.py`: descriptions of calls, their source text and their expected results."""
