"""Compare models on a data set: loss, perplexity and their answers."""
