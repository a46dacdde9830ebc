"""Timings beside their peers, in one run: ``make bench``. Results of note are in results/."""
