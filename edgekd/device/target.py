"""Measuring on a device that is reached by ssh."""
