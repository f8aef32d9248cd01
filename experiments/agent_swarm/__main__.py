"""The command line of `experiments.agent_swarm.context`."""

from absl import app

from experiments.agent_swarm.context import main

if __name__ == "__main__":
    app.run(main)
