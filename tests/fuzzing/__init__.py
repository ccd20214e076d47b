"""Parts of the fuzzer `tests/fuzz.py`: a call as a description, as source text, as the numbers it must give."""
