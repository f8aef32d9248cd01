"""What a training step would cost on a pod, without a pod: compile it for the topology, read the compiled program."""
