"""Starts a bundle's program, or says what this Python lacks for it. Shipped in bundles as `bench.py`.

Any Python 3.6 can read this file: one that is too old for the program must still be able to say so.
"""

import sys


def main() -> int:
    """Run `edgekd.device.bundle_bench`; returns the exit code, 2 where Python is too old or NumPy is missing."""
    if sys.version_info < (3, 8):  # noqa: UP036 - what the file is for
        return _refuse(
            f"this Python is too old: {sys.version.split()[0]}, expected 3.8 or later",
            "install Python 3.8 or later beside it, and start bench.py with that one",
        )
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        return _refuse(f"NumPy is missing: {error}", f"{sys.executable} -m pip install numpy; or apt's python3-numpy")
    from edgekd.device.bundle_bench import main as run

    return run()


def _refuse(what: str, fix: str) -> int:
    print(f"error: {what}\n  fix:      {fix}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
