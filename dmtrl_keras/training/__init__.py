"""The model of T tasks: losses, metrics, missing labels, data, optimizers, replicas."""
