"""What will happen, made concrete before anything is allocated: free of torch."""
