"""Measurements: functions that return rows, for `lcab bench` to print and record."""
