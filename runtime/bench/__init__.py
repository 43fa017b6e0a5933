"""`dspark-edge bench`: what each mode brings on this device, measured side by side.

settings.py    what is measured, and in which order
contenders.py  a mode of a bundle at a concurrency, ready to run
cells.py       from runs to cells: medians, ratios, what is worst
bench.py       the loop
report.py      JSON, tables and a page
"""
