"""Benchmarks of the installed package: `make bench`, or `python -m benchmarks NAME...`."""
