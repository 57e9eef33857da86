"""What a run needs before anything is spent: parameters, memory, throughput, hours and price."""
