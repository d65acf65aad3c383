"""The machine under test: its sensors, and a bundle that measures itself on a device without edgekd.

Everything here but `bundle` and `target` is shipped inside bundles. It runs on Python 3.8 with NumPy alone.
"""
