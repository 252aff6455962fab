"""What a job will take on Trainium nodes: a model."""
