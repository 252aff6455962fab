"""From records to batches: records, tokens and labels, packed rows, and the batches of each rank."""
