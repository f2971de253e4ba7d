"""Runs to tables, figures, pages and dashboards."""
