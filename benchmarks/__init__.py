"""Speed and memory, measured: `python -m mla bench --quick`, or one file at a time.

harness.py    clocks, interleaving, the correctness gate
sweep.py      a benchmark as data; its points measured one after the other
ceilings.py   what this machine can do at most, and each row's share of it
resume.py     rows of earlier runs that still hold
report.py     environment, tables, CSV and JSON under out/bench
run.py        all benchmarks
compare*.py   this tree against an older version, in two processes that take turns
bench_*.py    one question each: its points, its candidates, what is correct
plot*.py      figures from rows
"""
