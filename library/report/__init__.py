"""A run as one HTML file: `python -m library.report output`, and at the end of every run."""
