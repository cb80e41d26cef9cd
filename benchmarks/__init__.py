"""Speed and memory, measured: `python -m benchmarks.run --quick`, or one file at a time.

harness.py    clocks, interleaving, the correctness gate
report.py     environment, tables, CSV and JSON under out/bench
bench_*.py    one question each: its points, its candidates, what is correct
"""
