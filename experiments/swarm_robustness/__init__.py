"""How the gain of a swarm scales, and where it breaks when its subagents degrade: scripted agents, no model."""
