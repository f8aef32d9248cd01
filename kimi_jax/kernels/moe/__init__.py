"""The routed experts: sorted by expert, multiplied in groups, exchanged between devices."""
