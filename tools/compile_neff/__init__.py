"""Compiles the graphs of a job by the Neuron compiler, on a machine without Neuron devices."""
