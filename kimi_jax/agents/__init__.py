"""Agent Swarm: an orchestrator and its subagents, run concurrently, within a budget, with one record of what happened.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6.
"""
