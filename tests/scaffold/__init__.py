"""Writes a new op, working and tested, from template/: python -m tests.scaffold NAME."""
