"""The parts of paper.py: models under test, scales to compare, images on disk, their judges, tables and figures."""
