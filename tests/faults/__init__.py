"""Faults injected on purpose: what is promised to survive them, tried many times over.

    make faults          the gate, a quarter of an hour at most
    make faults-long     the release column: 300 kills, 1,000 damages

One line a fault: how often it was tried, held, and skipped. RELIABILITY.md has the last result.
"""
