"""Writes a run's report, one HTML file: `python -m library.report output`, and at the end of every run."""
