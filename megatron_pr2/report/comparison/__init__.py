"""Runs side by side: sorted by setting, method and seed; one table of measures makes the page, the Markdown and the CSV files."""
