"""One self-contained HTML page, and tables, out of result files."""
