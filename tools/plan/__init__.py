"""What a job will take on Trainium nodes, by a model: memory, time and cost of a step."""
