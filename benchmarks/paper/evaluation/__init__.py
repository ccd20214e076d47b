"""What paper.py is made of: models under test, scales to compare, images kept on disk, and their judges."""
