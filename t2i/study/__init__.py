"""What runs say together: figures and reports, read from run folders alone."""
