"""From the runs of a sweep to tables, figures and pages: what report.py is made of."""
