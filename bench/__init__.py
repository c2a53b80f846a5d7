"""Benchmarks with their peers; they need the checkout and the extra `bench`."""
