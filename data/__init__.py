"""Records -> tokens and labels -> packed rows -> batches of each rank."""
