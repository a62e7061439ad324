"""Runs side by side: what tools/compare_methods.py measured, as pages, tables and plots."""
