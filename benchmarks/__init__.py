"""Benchmarks of sdekit: accuracy and cost of likelihoods, beside other packages. See README.md here."""
