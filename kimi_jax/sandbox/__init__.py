"""The `ipython` tool: Python that a model wrote, run in a process of its own behind every wall that the machine offers.

Source: the tools of Kimi K2.5 (arXiv 2602.02276); docs/sandbox.md says what each wall does and does not hold.

  session.py   Session: one interpreter, state kept between calls        limits.py    what a session may use
  pool.py      Pool: pre-started sessions for RL, asyncio                walls.py     which walls there are here
  tool.py      the declaration of the tool, and message parts back       protocol.py  frames between parent and child
  child.py, cell.py, lock.py, landlock.py, seccomp.py, syscalls.py       run inside the sandbox

Nothing is imported here: the process inside the sandbox imports this package, and must start quickly.
"""
