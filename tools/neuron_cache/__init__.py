"""Pack the Neuron compiler's cache into an archive, and unpack it on another machine."""
